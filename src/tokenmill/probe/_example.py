"""One question about one haystack, and files of them with the columns of the published rows."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenmill.errors import LimitError

TASKS = ("single", "multiple", "conditional", "threading", "multi-threading", "branched")
NOT_APPLICABLE = "N/A"
COLUMNS = (
    "context_length",
    "num_kv_pairs",
    "repeat_number",
    "needle_depth",
    "num_needles",
    "needle_placement",
    "conditional_character",
    "thread_length",
    "thread_direction",
    "num_threads",
)
_OURS = (
    "task",
    "branching_factor",
    "branches",
    "key_kind",
)  # the published files hold one task each and no branched threads


@dataclass(frozen=True, slots=True)
class Example:
    """A haystack, a question, and the right answer.

    Attributes:
        id: number within its suite.
        haystack: a JSON object of strings.
        question: what is asked about it.
        keys: what the question names: keys, start keys, or nothing (conditional needles).
        values: the right answer, in order.
        meta: the published columns (context_length counts characters), and "task".
    """

    id: int
    haystack: str
    question: str
    keys: list[str]
    values: list[str]
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def task(self) -> str:
        """Which of the tasks it belongs to."""
        return str(self.meta["task"])

    @property
    def prompt(self) -> str:
        """What a model is given: the haystack, a line end, the question."""
        return f"{self.haystack}\n{self.question}"

    @property
    def ordered(self) -> bool:
        """Whether the order of the answer counts: where keys are listed, not where all of a set is asked."""
        return self.task != "conditional" and self.meta.get("branches") != "all"

    def row(self) -> dict[str, Any]:
        """One flat row; a lone key or value of a single needle is a string, as published."""
        alone = self.task == "single"
        return {
            "id": self.id,
            "haystack": self.haystack,
            "keys": self.keys[0] if alone else self.keys,
            "values": self.values[0] if alone else self.values,
            "question": self.question,
            **{name: self.meta[name] for name in (*COLUMNS, *_OURS) if name in self.meta},
        }


def to_jsonl(examples: Iterable[Example], path: str | Path) -> int:
    """Write examples one a line, all or nothing; gives how many there are."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    count = 0
    try:
        with temporary.open("w", encoding="utf-8") as file:
            for example in examples:
                file.write(json.dumps(example.row()) + "\n")
                count += 1
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    return count


def from_jsonl(path: str | Path) -> Iterator[Example]:
    """Read examples; rows of the published files, which do not name their task, are recognised by their columns.

    Raises:
        LimitError: no such file, or a line that is no example.
    """
    source = Path(path)
    if not source.is_file():
        raise LimitError("from_jsonl", "path", str(path), "a file of JSON lines")
    with source.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _example(f"{source}:{number}", line)


def _example(where: str, line: str) -> Example:
    try:
        row = json.loads(line)
        strings = {name: row[name] for name in ("haystack", "question")}
        lists = {name: [row[name]] if isinstance(row[name], str) else list(row[name]) for name in ("keys", "values")}
        content = json.loads(strings["haystack"])
        number = int(row["id"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        limit = "a JSON object with id, haystack (itself JSON), question, keys, values"
        raise LimitError(where, "line", line[:60].strip(), limit, f"{type(error).__name__}: {error}") from error
    plain = isinstance(content, dict) and all(isinstance(v, str) for v in content.values())
    if not plain or not lists["values"] or not all(isinstance(v, str) for v in (*lists["keys"], *lists["values"])):
        raise LimitError(where, "line", line[:60].strip(), "a haystack of strings, and at least one value")
    meta = {name: row[name] for name in (*COLUMNS, *_OURS) if name in row}
    meta.setdefault("task", _task_of(meta))
    if meta["task"] not in TASKS:
        raise LimitError(where, "task", meta["task"], f"one of {', '.join(TASKS)}")
    meta["context_length"] = len(strings["haystack"])
    return Example(number, strings["haystack"], strings["question"], lists["keys"], lists["values"], meta)


def _task_of(meta: Mapping[str, Any]) -> str:
    if meta.get("conditional_character", NOT_APPLICABLE) != NOT_APPLICABLE:
        return "conditional"
    if _number(meta.get("num_threads")) > 1:
        return "multi-threading"
    if _number(meta.get("thread_length")) > 1:
        return "threading"
    return "multiple" if _number(meta.get("num_needles")) > 1 else "single"


def _number(value: Any) -> int:
    try:
        return int(value)
    except (TypeError, ValueError):
        return 0
