"""Result lines: their schema, and files of them that are appended to and never edited."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from tokenmill.errors import LimitError

SCHEMA = 1
FILE = "results.jsonl"
_KEY = ("task", "model", "data", "method", "params", "settings", "seed", "n")


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One line: what one method did on one kind of data. The schema only grows.

    Attributes:
        task: the bench task.
        model: the model's name as it was given.
        weights: what the weights are and how they are held, for instance "Q4_K_M dequantised, bfloat16, packed".
        data: name, kind, sha256 and split.
        method: slug of the method or name of the baseline.
        params: settings of the method that differ from its defaults.
        settings: options of the task.
        seed: seed of data and sampling.
        n: number of items.
        status: "ok", or "failed" with a message and without a cost.
        quality: metric -> mean over the items.
        cost: milliseconds (percentiles over the items) and counts (means over the items).
        ratio: measure -> [ratio to plain, low, high], a 95 % bootstrap interval over the items.
        items: for each item its id, ms, tokens and ratio to plain.
        cmd: the command that reproduces the line.
        env: machine and versions.
        when: time of writing, UTC, ISO 8601.
        sweep: name of the sweep, or an empty string.
        message: why it failed.
        schema: version of this schema.
    """

    task: str
    model: str
    weights: str
    data: Mapping[str, str]
    method: str
    params: Mapping[str, Any]
    settings: Mapping[str, Any]
    seed: int
    n: int
    status: Literal["ok", "failed"]
    cmd: str
    env: Mapping[str, Any]
    when: str
    quality: Mapping[str, float] = field(default_factory=dict)
    cost: Mapping[str, float] = field(default_factory=dict)
    ratio: Mapping[str, list[float]] = field(default_factory=dict)
    items: list[dict[str, Any]] = field(default_factory=list)
    sweep: str = ""
    message: str = ""
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        for name in ("task", "model", "method"):
            if not getattr(self, name):
                raise LimitError("Result", name, getattr(self, name), "a name")
        if self.status not in ("ok", "failed"):
            raise LimitError("Result", "status", self.status, "'ok' or 'failed'")
        if (self.status == "failed") != bool(self.message):
            raise LimitError("Result", "message", self.message, "given when, and only when, the run failed")
        if self.status == "failed" and self.cost:
            raise LimitError("Result", "cost", dict(self.cost), "empty for a failed run")
        if self.status == "ok" and "ms_p50" not in self.cost:
            raise LimitError("Result", "cost", dict(self.cost), "a mapping with ms_p50")
        for where in ("quality", "cost"):
            for key, value in getattr(self, where).items():
                _finite_number(f"{where}[{key!r}]", value)
        for key, interval in self.ratio.items():
            if len(interval) != 3:
                raise LimitError("Result", f"ratio[{key!r}]", interval, "[ratio, low, high]")
            for value in interval:
                _finite_number(f"ratio[{key!r}]", value)
        missing = {"name", "kind", "sha256", "split"} - set(self.data)
        if missing:
            raise LimitError("Result", "data", dict(self.data), f"a mapping with {', '.join(sorted(missing))}")

    @property
    def key(self) -> str:
        """What makes two lines the same measurement, as text."""
        return key({name: getattr(self, name) for name in _KEY})


def key(about: Mapping[str, Any]) -> str:
    """The key of a line from the fields that make it the same measurement as another."""
    return json.dumps({name: about[name] for name in _KEY}, sort_keys=True)


def _finite_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise LimitError("Result", name, value, "a finite number")


def append(path: Path, line: Result | dict[str, Any]) -> None:
    """Add a line to a file in one write, so that a crash leaves at most one unfinished line at the end."""
    text = json.dumps(asdict(line) if isinstance(line, Result) else line, allow_nan=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        size = os.fstat(handle).st_size
        unfinished = size > 0 and os.pread(handle, 1, size - 1) != b"\n"
        os.write(handle, (("\n" if unfinished else "") + text + "\n").encode())
        os.fsync(handle)
    finally:
        os.close(handle)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file as plain data, without a line that was cut off while it was written."""
    if not path.is_file():
        return []
    lines = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError as error:
            if text.endswith("}"):
                raise LimitError(f"{path}:{number}", "line", text[:60], "JSON", str(error)) from error
    return lines


def read_results(path: Path) -> list[Result]:
    """The results of a file, or of every ``*.jsonl`` of a folder that is not a file of unfinished work.

    Raises:
        LimitError: when there is nothing at `path`, or a line does not follow the schema.
    """
    if not path.exists():
        raise LimitError("results", "path", str(path), "a file of results or a folder of them")
    files = sorted(p for p in path.glob("*.jsonl") if not p.name.startswith("partial")) if path.is_dir() else [path]
    known = {f.name for f in fields(Result)}
    found = []
    for file in files:
        for number, line in enumerate(read_lines(file), start=1):
            where = f"{file}:{number}"
            schema = line.get("schema", SCHEMA) if isinstance(line, dict) else None
            if not isinstance(schema, int):
                raise LimitError(where, "line", str(line)[:60], "a result")
            unknown = set(line) - known
            # A later schema may hold more; this one holds what it names.
            if unknown and schema <= SCHEMA:
                raise LimitError(where, "keys", sorted(unknown), "keys of a result")
            try:
                found.append(Result(**{key: value for key, value in line.items() if key in known}))
            except (TypeError, LimitError) as error:
                raise LimitError(where, "line", str(line)[:60], "a result", str(error)) from error
    return found
