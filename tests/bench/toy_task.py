"""A toy task: items are numbers, methods are waits, and plain doubles."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from tokenmill.bench.task import Item, MethodSpec, Metric, Outcome, Scalar
from tokenmill.errors import LimitError


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of the toy."""

    limit: int = 4
    repeats: int = 1
    seed: int = 0


class Subject:
    def __init__(self, task: Task, spec: MethodSpec) -> None:
        self.task, self.spec, self.seen = task, spec, 0

    def run(self, item: Item, /) -> Outcome:
        self.task.ran.append((self.spec.text, item.id))
        self.seen += 1
        if self.spec.slug == "raises" and item.content == 2:
            raise RuntimeError("the toy broke")
        if self.task.interrupt == (self.spec.slug, item.id):
            raise KeyboardInterrupt
        time.sleep(1e-3)
        wrong = self.spec.slug == "wrong" and item.content == 1
        return Outcome(item.content * 2 + wrong, {"tokens": 2.0, "model_calls": 1.0, "seen": self.seen})


class Task:
    """The toy."""

    name = "generate"  # a task of the catalog, since the report looks up its metrics
    METRICS: Mapping[str, Metric] = {"identical": Metric("equal", "higher")}
    BASELINES = ("plain", "raises", "wrong", "never")

    def __init__(self, options: Options, interrupt: tuple[str, str] = ("", "")) -> None:
        self.options, self.interrupt = options, interrupt
        self.ran: list[tuple[str, str]] = []
        self.made: list[str] = []

    def model_name(self) -> str:
        return "toy"

    def weights(self) -> str:
        return "none"

    def settings(self) -> dict[str, Scalar]:
        return {"repeats": self.options.repeats}

    def kinds(self) -> list[str]:
        return ["a", "b"]

    def items(self, kind: str, /) -> list[Item]:
        return [Item(f"{kind}{i}", kind, i) for i in range(self.options.limit)]

    def data(self, kind: str, /) -> dict[str, str]:
        return {"name": "toys", "kind": kind, "sha256": "0", "split": "test"}

    def check(self, spec: MethodSpec, /) -> MethodSpec:
        if spec.slug not in (*self.BASELINES, "lawless"):
            raise LimitError("toy", "method", spec.slug, "a toy")
        return spec

    def subject(self, spec: MethodSpec, kind: str, /) -> Subject:
        if spec.slug == "never":
            raise LimitError("toy", "k", 0, "at least 1")
        self.made.append(f"{spec.text} {kind}")
        return Subject(self, spec)

    def quality(self, item: Item, plain: Outcome, ours: Outcome, /) -> dict[str, float]:
        return {"identical": float(plain.output == ours.output)}

    def derive(self, totals: Mapping[str, float], /) -> dict[str, float]:
        return {"tokens_per_call": totals["tokens"] / totals["model_calls"]}
