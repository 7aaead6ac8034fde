"""What the scripts of this folder write: lines of JSON that name their command and machine."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenmill.bench.environment import environment

RESULTS = Path(__file__).parent / "results"


class Lines:
    """Lines of one benchmark. Each is appended at once: what was measured before an interruption stays.

    Args:
        task: names the file.
        method: slug of the method that is measured.
        more: fields of every line.
    """

    def __init__(self, task: str, method: str, **more: Any) -> None:
        self.path = RESULTS / f"{task}.jsonl"
        command = " ".join(["python", *sys.argv])
        self.about = {"schema": 1, "task": task, "method": method, "cmd": command, "env": environment(), **more}

    def keep(self, what: str, **values: Any) -> None:
        """Show a line and append it."""
        line = {"what": what, **values}
        print(json.dumps(line), flush=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**line, "status": "ok", **self.about}) + "\n")


def seconds(what: Callable[[], Any]) -> float:
    """The time that one call takes."""
    start = time.perf_counter()
    what()
    return time.perf_counter() - start
