"""Result lines: the schema, and files that survive a crash."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from tokenmill.bench.result import FILE, Result, append, read_lines, read_results
from tokenmill.errors import LimitError

LINE = Result(
    task="generate",
    model="toy",
    weights="none",
    data={"name": "toys", "kind": "a", "sha256": "0", "split": "test"},
    method="spectr",
    params={"num_drafts": 4},
    settings={"new_tokens": 8},
    seed=0,
    n=2,
    status="ok",
    cmd="tokenmill bench generate",
    env={"cpu": "some"},
    when="2026-01-01T00:00:00+00:00",
    quality={"identical": 1.0},
    cost={"ms_p50": 3.5},
    ratio={"ms_p50": [0.5, 0.4, 0.6]},
)


def test_a_line_comes_back_as_it_was(tmp_path: Path) -> None:
    failed = replace(LINE, status="failed", message="boom", cost={}, ratio={}, quality={})
    for line in (LINE, failed):
        append(tmp_path / FILE, line)
    assert read_results(tmp_path) == [LINE, failed]
    assert read_results(tmp_path / FILE) == [LINE, failed]


@pytest.mark.parametrize(
    "bad",
    [
        {"task": ""},
        {"status": "good"},
        {"status": "failed"},
        {"message": "but it was ok"},
        {"status": "failed", "message": "boom"},
        {"cost": {}},
        {"cost": {"ms_p50": math.nan}},
        {"cost": {"ms_p50": "3.5"}},
        {"quality": {"identical": True}},
        {"ratio": {"ms_p50": [1.0, 1.0]}},
        {"ratio": {"ms_p50": [1.0, 1.0, math.inf]}},
        {"data": {"name": "toys"}},
    ],
)
def test_a_line_against_the_schema_is_refused(bad: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(LimitError):
        replace(LINE, **bad)
    (tmp_path / FILE).write_text(json.dumps({**asdict(LINE), **bad}) + "\n")
    with pytest.raises(LimitError, match=rf"{FILE}:1"):
        read_results(tmp_path)


def test_unknown_keys_are_errors_except_from_a_later_schema(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(json.dumps({**asdict(LINE), "extra": 1}) + "\n")
    with pytest.raises(LimitError, match="extra"):
        read_results(tmp_path)
    (tmp_path / FILE).write_text(json.dumps({**asdict(LINE), "extra": 1, "schema": 2}) + "\n")
    assert read_results(tmp_path) == [replace(LINE, schema=2)]


def test_a_line_that_a_crash_cut_off_is_left_out_and_the_next_one_is_whole(tmp_path: Path) -> None:
    append(tmp_path / FILE, LINE)
    with (tmp_path / FILE).open("a") as file:
        file.write(json.dumps(asdict(LINE))[:40])
    assert read_results(tmp_path) == [LINE]
    append(tmp_path / FILE, replace(LINE, seed=1))
    assert [r.seed for r in read_results(tmp_path)] == [0, 1]


def test_a_damaged_line_is_an_error(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text('{"task": nothing}\n')
    with pytest.raises(LimitError, match="JSON"):
        read_lines(tmp_path / FILE)


def test_nothing_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(LimitError, match="missing"):
        read_results(tmp_path / "missing")


def test_the_key_tells_measurements_apart_and_nothing_else() -> None:
    assert replace(LINE, cmd="other", when="later", env={}).key == LINE.key
    for other in ({"method": "plain"}, {"params": {}}, {"seed": 1}, {"n": 3}, {"settings": {}}, {"model": "m"}):
        assert replace(LINE, **other).key != LINE.key
    assert replace(LINE, data={**LINE.data, "kind": "b"}).key != LINE.key
