"""Laws: what every method of a kind must satisfy, wherever it comes from.

Laws are small functions outside the methods. They are chosen by the card's kind, run by the tests and by
``tokenmill check``, and the bench runs them before it times anything. A method's module offers ``small()``, an instance
that is fit for the tiny models of `tokenmill.models.tiny` (64 tokens) or for the tensors of its kind's laws.

A module ``laws/<kind>.py`` holds ``LAWS``, ``ON_MODELS`` and ``stage``, which says how a method of that kind is used
once; the laws of `general` that need a method in use are built on it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

from tokenmill import catalog
from tokenmill.catalog import Card

if TYPE_CHECKING:
    from torch import Tensor, nn


class BrokenLawError(AssertionError):
    """A law does not hold; the message says what was seen."""


class DoesNotApply(Exception):  # noqa: N818 - it is an answer of a law, not an error
    """A law does not apply to this method; the message is the reason."""


def expect(condition: Any, message: str) -> None:
    """Break the law with this message unless the condition holds."""
    if not condition:
        raise BrokenLawError(message)


@dataclass(frozen=True, slots=True)
class Case:
    """A method under test: its card and its module."""

    card: Card
    module: ModuleType

    @classmethod
    def of(cls, slug: str) -> Case:
        """The case of a method of the catalog."""
        return cls(catalog.card(slug), catalog.load(slug))

    def small(self) -> Any:
        """A new instance that is fit for tiny models."""
        make = getattr(self.module, "small", None)
        expect(callable(make), f"{self.module.__name__} has no function small()")
        return make() if make is not None else None


@dataclass(frozen=True, slots=True)
class Law:
    """A named check; `check` returns when the law holds and raises `BrokenLawError` when it does not."""

    name: str
    check: Callable[[Case], None]

    @classmethod
    def all(cls, *checks: Callable[[Case], None]) -> tuple[Law, ...]:
        """One law a function, named after it."""
        return tuple(cls(check.__name__.replace("_", " "), check) for check in checks)


@dataclass(frozen=True, slots=True)
class Stage:
    """One use of a method, made ready from a seed.

    Attributes:
        run: uses the method once and gives the tensors that come out; for None, those of the untouched model or of
            the neutral setting (a kind without either raises `DoesNotApply`).
        inputs: tensors that go in, by name.
        model: the model that it runs on, or None.
        error_at: the forward pass in which the law about exceptions raises.
    """

    run: Callable[[Any], tuple[Tensor, ...]]
    inputs: dict[str, Tensor]
    model: nn.Module | None = None
    error_at: int = 1


class Kind(Protocol):
    """What the laws of a kind are: a module of this package."""

    LAWS: tuple[Law, ...]
    ON_MODELS: bool

    def stage(self, model: str | None, seed: int, /) -> Stage: ...


@dataclass(frozen=True, slots=True)
class Result:
    """What one law said about one method."""

    slug: str
    law: str
    status: Literal["ok", "broken", "does not apply"]
    message: str = ""


def laws_for(kind: str) -> tuple[Law, ...]:
    """The laws of a kind: the general ones, then its own.

    A kind without a module of its own has the laws about card and settings alone.
    """
    from . import general

    if not (Path(__file__).parent / f"{kind}.py").is_file():
        return general.LAWS
    own = cast(Kind, importlib.import_module(f"{__name__}.{kind}"))
    in_use = tuple(Law(law.__name__.replace("_", " "), partial(law, own)) for law in general.IN_USE)
    return general.LAWS + in_use + own.LAWS


def each(slug: str) -> Iterator[Result]:
    """Run the laws of one method one after another."""
    card = catalog.card(slug)
    for law in laws_for(card.kind):
        yield judge(slug, law)


def run(slug: str) -> list[Result]:
    """Run all the laws of one method."""
    return list(each(slug))


def judge(slug: str, law: Law) -> Result:
    """Run one law on one method. An error inside the method breaks the law as well."""
    try:
        law.check(Case.of(slug))
    except DoesNotApply as reason:
        return Result(slug, law.name, "does not apply", str(reason))
    except Exception as error:  # noqa: BLE001 - whatever the method raises here is the finding
        text = str(error) if isinstance(error, BrokenLawError) else f"{type(error).__name__}: {error}"
        return Result(slug, law.name, "broken", text)
    return Result(slug, law.name, "ok")
