"""What a task is, and how methods are named in a run."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from tokenmill.errors import LimitError, unknown_name

Scalar = bool | int | float | str | None


@dataclass(frozen=True, slots=True)
class MethodSpec:
    """A method with settings, written ``slug`` or ``slug:key=value:key=value``."""

    slug: str
    params: Mapping[str, Scalar] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> MethodSpec:
        """Read a spec.

        Raises:
            LimitError: for a part that is not ``key=value``, or a key that comes twice.
        """
        slug, *parts = text.strip().split(":")
        params: dict[str, Scalar] = {}
        for part in parts:
            key, found, value = part.partition("=")
            if not (found and key) or key in params:
                raise LimitError("method spec", "part", part, "key=value, each key once", f"It stands in {text!r}.")
            params[key] = value
        return cls(slug.replace("_", "-"), params)

    @property
    def text(self) -> str:
        """The spec as it is written."""
        return ":".join([self.slug, *(f"{key}={value}" for key, value in self.params.items())])


@dataclass(frozen=True, slots=True)
class Metric:
    """A measure of quality: what it says, and which way is better."""

    title: str
    better: Literal["higher", "lower"]


@dataclass(frozen=True, slots=True)
class Item:
    """One piece of data: what a method is run on once."""

    id: str
    kind: str
    content: Any


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one run on one item gave: the output, and counts. The time is taken outside."""

    output: Any
    counts: Mapping[str, float]


class Subject(Protocol):
    """A method made ready for a task."""

    def run(self, item: Item, /) -> Outcome: ...


class Task(Protocol):
    """A model, data with a metric, and a cost. A module of ``bench/tasks`` has a class `Task` like this one.

    Its `Options` are a frozen dataclass; they become the flags of the command and are kept in every result line.
    """

    name: str
    METRICS: Mapping[str, Metric]
    BASELINES: tuple[str, ...]
    options: Any

    def model_name(self) -> str: ...
    def weights(self) -> str: ...
    def settings(self) -> dict[str, Scalar]: ...
    def kinds(self) -> list[str]: ...
    def items(self, kind: str, /) -> list[Item]: ...
    def data(self, kind: str, /) -> dict[str, str]: ...
    def check(self, spec: MethodSpec, /) -> MethodSpec: ...
    def subject(self, spec: MethodSpec, kind: str, /) -> Subject: ...
    def quality(self, item: Item, plain: Outcome, ours: Outcome, /) -> dict[str, float]: ...
    def derive(self, totals: Mapping[str, float], /) -> dict[str, float]: ...


def load_task(name: str) -> Any:
    """The module of a task: `Task`, `Options`.

    Raises:
        LimitError: for a name that is no task, with the nearest names.
    """
    from tokenmill import bench

    known = bench.task_names()
    if (slug := name.replace("_", "-")) not in known:
        raise unknown_name("bench", "task", name, known)
    return importlib.import_module(f"{__package__}.tasks.{slug.replace('-', '_')}")
