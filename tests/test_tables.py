"""The tables of README.md and docs/ are what benchmarks/tables.py makes of the result lines."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "tables.py"


def test_every_table_comes_from_the_result_lines() -> None:
    check = subprocess.run([sys.executable, str(SCRIPT), "--check"], capture_output=True, text=True, cwd=ROOT)
    assert check.returncode == 0, check.stdout + check.stderr


def test_every_result_line_says_how_to_make_it_again() -> None:
    files = sorted((ROOT / "benchmarks" / "results").glob("*.jsonl"))
    assert {file.stem for file in files} >= {"speed", "accepted", "spectr", "exactness", "profile"}
    for file in files:
        for line in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
            assert line["cmd"], file.name
            assert line["status"] in ("ok", "failed"), file.name
            assert line["env"]["torch"], file.name
