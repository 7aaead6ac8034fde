"""What a task is, and how methods are named in a run."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from tokenmill import catalog, settings
from tokenmill.catalog import Card
from tokenmill.errors import LimitError, UnsupportedError, unknown_name

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


@dataclass(frozen=True, slots=True, kw_only=True)
class NoSettings:
    """A baseline without settings."""


def read_spec(task: str, baselines: Mapping[str, Any], spec: MethodSpec) -> tuple[dict[str, Any], Card | None]:
    """The settings of a spec as values, and the method's card; None for a baseline, whose settings are tried.

    Args:
        task: the task's name.
        baselines: slug -> frozen dataclass of settings.
        spec: as it was written.

    Raises:
        LimitError: unknown method or setting, or a baseline's value outside its limit.
        UnsupportedError: a method of another task.
    """
    if spec.slug in baselines:
        params = settings.from_text(spec.slug, baselines[spec.slug], spec.params)
        baselines[spec.slug](**params)
        return params, None
    known = catalog.entries()
    if spec.slug not in known:
        raise unknown_name(f"bench {task}", "method", spec.slug, [*known, *baselines])
    card = catalog.card(spec.slug)
    if card.task != task:
        what = f"{spec.slug} belongs to the task {card.task}"
        raise UnsupportedError(f"bench {task}", what, f"Use bench {card.task}.")
    return settings.from_text(spec.slug, catalog.method(spec.slug), spec.params), card


def held_weights(model: str, dtype: str, *, packed: bool) -> str:
    """What a model's weights are and how they are run, for a result line."""
    from tokenmill import models

    held = str(models.info(model).get("weights", "as published")) if model in models.names() else "as published"
    return ", ".join([held, f"run in {dtype}", *(["packed"] if packed else [])])


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
