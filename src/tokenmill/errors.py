"""Errors of tokenmill: each names the place, the parameter, its value, the limit and the mend."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class TokenmillError(Exception):
    """Base of every error that tokenmill raises on purpose.

    Attributes:
        partial: what had been produced when the work stopped (``None`` when nothing had been).
    """

    def __init__(self, message: str, *, partial: Any = None) -> None:
        super().__init__(message)
        self.partial = partial


class LimitError(TokenmillError, ValueError):
    """A parameter is outside its limit.

    ``LimitError("divprune_select", "k", 64, "in [1, N=20]", "Lower it.")`` prints
    ``divprune_select: k = 64, but it must be in [1, N=20]. Lower it.``
    """

    def __init__(
        self, where: str, parameter: str, value: Any, limit: str, mend: str = "", *, partial: Any = None
    ) -> None:
        message = f"{where}: {parameter} = {value!r}, but it must be {limit}."
        super().__init__(f"{message} {mend}".rstrip(), partial=partial)
        self.where, self.parameter, self.value, self.limit, self.mend = where, parameter, value, limit, mend


class UnsupportedError(TokenmillError, NotImplementedError):
    """The request is well formed, but this method or class cannot serve it."""

    def __init__(self, where: str, what: str, mend: str = "", *, partial: Any = None) -> None:
        super().__init__(f"{where}: {what}. {mend}".rstrip(), partial=partial)
        self.where, self.what, self.mend = where, what, mend


class MissingExtraError(TokenmillError, ImportError):
    """A package of an optional extra is not installed; the message holds the one command that mends it."""

    def __init__(self, where: str, package: str, extra: str) -> None:
        super().__init__(f"{where} needs the package {package!r}. Install it with: pip install 'tokenmill[{extra}]'")
        self.where, self.package, self.extra = where, package, extra


class NonFiniteError(TokenmillError, FloatingPointError):
    """A model answered NaN or infinity; ``.partial`` holds what had been produced before."""


class StoppedError(TokenmillError):
    """Work was stopped before its end; ``.partial`` holds what had been produced."""


def unknown_name(where: str, parameter: str, value: str, known: Iterable[str]) -> LimitError:
    """A ``LimitError`` for a name that is not known, with the nearest names as the mend."""
    names = sorted(known)
    near = difflib.get_close_matches(value, names, n=3, cutoff=0.4)
    mend = f"Did you mean {', '.join(near)}?" if near else ""
    return LimitError(where, parameter, value, f"one of {', '.join(names) or '(nothing is registered)'}", mend)
