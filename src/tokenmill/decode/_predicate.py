"""Any Python function on text as a constraint."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tokenmill.decode._potential import ContractError, Potential, State, begin, score
from tokenmill.errors import LimitError, TokenmillError
from tokenmill.text._utf8 import text_of

__all__ = ["predicate"]


def predicate(
    prefix_fn: Callable[[str], bool], complete_fn: Callable[[str], bool] | None = None, name: str = ""
) -> Potential:
    """The strings on which functions of one's own say yes.

    A character whose bytes are not all there yet is held back: the functions see whole characters only, and bytes
    that are no UTF-8 are refused. Every check hands over the whole text so far.

    Args:
        prefix_fn: can this text still be completed? It may say yes too often, never no to a text that can.
        complete_fn: is this text a whole one? Without it every text that ``prefix_fn`` allows is.
        name: what errors call the constraint; the function's name by default.

    Raises:
        LimitError: what was given is no function; later, an answer that is no bool.
        ContractError: later, when ``complete_fn`` says yes to a text that ``prefix_fn`` refuses.
        TokenmillError: later, from an exception in a function; it names the text.
    """
    for parameter, function in (("prefix_fn", prefix_fn), ("complete_fn", complete_fn)):
        if not (callable(function) or (function is None and parameter == "complete_fn")):
            raise LimitError("predicate", parameter, function, "a function from text to bool")
    return _Predicate(prefix_fn, complete_fn, name or getattr(prefix_fn, "__qualname__", repr(prefix_fn)))


def named_function(where: str, name: str) -> Callable[..., Any]:
    """The function ``module:name``, from the current folder or an installed package. Importing runs the module.

    Raises:
        LimitError: no such module, no such name, or not a function.
    """
    module, colon, inner = name.partition(":")
    if not (module and colon and inner):
        raise LimitError(where, "predicate", name, "written module:function")
    sys.path.insert(0, str(Path.cwd()))
    try:
        found: Any = importlib.import_module(module)
        for part in inner.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise LimitError(where, "predicate", name, f"a function that can be imported: {error}") from error
    finally:
        sys.path.pop(0)
    if not callable(found):
        raise LimitError(where, "predicate", name, f"a function from text to bool, not a {type(found).__name__}")
    return found


class _Predicate:
    """A potential made of functions on text."""

    def __init__(self, prefix_fn: Callable[[str], Any], complete_fn: Callable[[str], Any] | None, name: str) -> None:
        self.prefix_fn, self.complete_fn, self.name = prefix_fn, complete_fn, name

    def __repr__(self) -> str:
        return f"predicate({self.name})"

    def prefix(self, context: bytes, /) -> float:
        found = text_of(context)
        return -math.inf if found is None else score(self._ask("prefix_fn", self.prefix_fn, found[0]))

    def complete(self, context: bytes, /) -> float:
        found = text_of(context)
        if found is None or found[1]:
            return -math.inf
        if self.complete_fn is None:
            return score(self._ask("prefix_fn", self.prefix_fn, found[0]))
        whole = self._ask("complete_fn", self.complete_fn, found[0])
        if whole and not self._ask("prefix_fn", self.prefix_fn, found[0]):
            raise ContractError(repr(self), context, "complete_fn says yes where prefix_fn says no")
        return score(whole)

    def start(self) -> State:
        return begin(self)

    def _ask(self, which: str, function: Callable[[str], Any], text: str) -> bool:
        try:
            found = function(text)
        except Exception as error:
            raise TokenmillError(f"{self!r}: {which} raised {type(error).__name__} at {text!r}: {error}") from error
        if not isinstance(found, (bool, np.bool_)):
            raise LimitError(repr(self), f"{which}({text!r})", found, "True or False", "Return a bool.")
        return bool(found)
