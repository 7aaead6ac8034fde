"""A deterministic automaton over bytes as a constraint: one table, one look-up a byte."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tokenmill.decode._potential import State, score
from tokenmill.errors import LimitError

__all__ = ["DFA"]

DEAD = -1


class DFA:
    """The strings of bytes that lead from ``start`` to an accepting state.

    States from which no accepting state can be reached are cut off when the object is made, so a prefix is allowed
    exactly when it can be completed.

    Args:
        transitions: (S, 256) integers (array, tensor or lists), the next state for each byte; -1 for none.
        accepting: (S,) booleans.
        start: the first state.

    Attributes:
        transitions: (S, 256) int32 array after the cut; read-only.
        accepting: (S,) bool array; read-only.

    Raises:
        LimitError: wrong shapes, kinds or state numbers, or a language with no string in it.
    """

    def __init__(self, transitions: npt.ArrayLike, accepting: npt.ArrayLike, start: int = 0) -> None:
        table, final = np.asarray(transitions), np.asarray(accepting)
        _check(table, final, start)
        live = _co_accessible(table, final)
        if not live[start]:
            raise LimitError(
                "DFA", "start", start, "a state from which an accepting one can be reached", "The language is empty."
            )
        table = np.where((table >= 0) & live[table], table, DEAD).astype(np.int32)
        # A state that is itself cut off is never entered, but its row must not lead back either.
        table[~live] = DEAD
        self.transitions, self.accepting, self.first = table, final.copy(), int(start)
        self.transitions.flags.writeable = self.accepting.flags.writeable = False
        self._next: list[int] = table.reshape(-1).tolist()
        self._final: list[bool] = self.accepting.tolist()

    def __repr__(self) -> str:
        return f"DFA({len(self._final)} states)"

    def prefix(self, context: bytes, /) -> float:
        """0.0 where an accepting state can be reached behind ``context``, else -inf."""
        return score(self.run(self.first, context) >= 0)

    def complete(self, context: bytes, /) -> float:
        """0.0 where ``context`` ends in an accepting state, else -inf."""
        state = self.run(self.first, context)
        return score(state >= 0 and self._final[state])

    def start(self) -> State:
        """The state that has read nothing."""
        return _At(self, self.first)

    def run(self, state: int, data: bytes) -> int:
        """The number of the state behind ``data``, or -1."""
        following = self._next
        for byte in data:
            state = following[state << 8 | byte]
            if state < 0:
                break
        return state

    def final(self, state: int) -> bool:
        """Is this state an accepting one?"""
        return self._final[state]


@dataclass(frozen=True, slots=True)
class _At:
    dfa: DFA
    number: int

    def allows(self, data: bytes, /) -> bool:
        return self.dfa.run(self.number, data) >= 0

    def advance(self, data: bytes, /) -> State:
        number = self.dfa.run(self.number, data)
        if number < 0:
            raise LimitError("DFA", "data", data, "allowed in this state", "Ask allows() before advance().")
        return _At(self.dfa, number)

    def accepting(self) -> bool:
        return self.dfa.final(self.number)


def _check(table: npt.NDArray[Any], final: npt.NDArray[Any], start: int) -> None:
    shape = table.shape
    if table.ndim != 2 or shape[1] != 256 or shape[0] < 1 or table.dtype.kind not in "iu":
        raise LimitError("DFA", "transitions", f"{table.dtype} {shape}", "integers (S, 256) with S >= 1")
    if final.shape != shape[:1] or final.dtype != np.bool_:
        raise LimitError("DFA", "accepting", f"{final.dtype} {final.shape}", f"booleans (S,) = ({shape[0]},)")
    if isinstance(start, bool) or not 0 <= start < shape[0]:
        raise LimitError("DFA", "start", start, f"a state in [0, S={shape[0]})")
    low, high = int(table.min()), int(table.max())
    if low < DEAD or high >= shape[0]:
        wrong = high if high >= shape[0] else low
        raise LimitError("DFA", "transitions", wrong, f"in [0, S={shape[0]}) everywhere, or -1 for no transition")


def _co_accessible(table: npt.NDArray[Any], final: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """(S,) bool: can an accepting state be reached from here?"""
    source, byte = np.nonzero(table >= 0)
    edges = np.unique(np.stack([table[source, byte], source], axis=1), axis=0)  # (E, 2) target, source
    before: list[list[int]] = [[] for _ in final]
    for target, origin in edges.tolist():
        before[target].append(origin)
    live, reached = final.copy(), np.flatnonzero(final).tolist()
    while reached:
        for origin in before[reached.pop()]:
            if not live[origin]:
                live[origin] = True
                reached.append(origin)
    return live
