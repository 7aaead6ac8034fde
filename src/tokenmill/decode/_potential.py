"""Constraints on strings of bytes: what a Boolean constraint must answer, and how two become one.

The score is that of Lipkin et al., "Fast Controlled Generation from Language Models with Adaptive Weighted Rejection
Sampling" (arXiv 2504.05410), in log space: 0 where a string may stay, -inf where it may not. ``prefix`` asks whether
a string can still be completed, ``complete`` whether it is whole. A constraint must keep one promise: what is complete
has prefixes that can be completed. Saying yes to a dead end costs variance only; saying no to a live one loses strings.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from tokenmill.errors import LimitError, TokenmillError

__all__ = ["ContractError", "Potential", "State", "as_potential", "both", "check_contract"]


class State(Protocol):
    """What a constraint knows behind the bytes it has read: a value that never changes.

    Advancing gives a new state and leaves the old one as it was, so particles that were copied share nothing.
    """

    def allows(self, data: bytes, /) -> bool:
        """Can the bytes read so far, followed by ``data``, still be completed?"""
        ...

    def advance(self, data: bytes, /) -> State:
        """The state behind ``data``; to be called only after ``allows(data)`` said yes."""
        ...

    def accepting(self) -> bool:
        """Are the bytes read so far a whole string of the constraint?"""
        ...


class Potential(Protocol):
    """A Boolean constraint on bytes in log space: every score is 0.0 (yes) or -inf (no)."""

    def prefix(self, context: bytes, /) -> float:
        """0.0 where ``context`` can be completed."""
        ...

    def complete(self, context: bytes, /) -> float:
        """0.0 where ``context`` is a whole string."""
        ...

    def start(self) -> State:
        """The state that has read nothing."""
        ...


class ContractError(TokenmillError):
    """A constraint contradicts itself: one of its answers rules out another.

    Attributes:
        context: the bytes at which it did.
    """

    def __init__(self, where: str, context: bytes, what: str, *, partial: Any = None) -> None:
        super().__init__(f"{where}: {what} at {context!r}. Mend the constraint's functions.", partial=partial)
        self.where, self.context, self.what = where, context, what


def score(allowed: bool) -> float:
    """A Boolean answer as a score in log space."""
    return 0.0 if allowed else -math.inf


def _is_score(found: Any) -> bool:
    # A bool is refused: False equals 0, and 0 says yes.
    return not isinstance(found, bool) and found in (0, -math.inf)


def as_potential(constraint: Any) -> Potential:
    """Give ``start()`` to a constraint that has ``prefix`` and ``complete`` only; others come back as they are.

    The state of such a constraint is the bytes so far, so every question reads the whole context again. Its answers
    are checked: they must be 0 or -inf, the empty string must have a completion, and a whole string must be a prefix.

    Raises:
        LimitError: ``constraint`` has no ``prefix`` or ``complete``; later, an answer that is neither 0 nor -inf.
        ContractError: later, when ``complete`` says yes where ``prefix`` says no.
    """
    missing = [name for name in ("prefix", "complete") if not callable(getattr(constraint, name, None))]
    if missing:
        raise LimitError(
            "as_potential",
            "constraint",
            constraint,
            f"an object with methods prefix and complete; {' and '.join(missing)} is missing",
            "Use regex, json_schema, grammar, predicate or DFA, or write the two methods on bytes.",
        )
    return constraint if callable(getattr(constraint, "start", None)) else _Stateful(constraint)


class _Stateful:
    """A potential whose states are the bytes so far."""

    def __init__(self, scores: Any) -> None:
        self.scores = scores

    def __repr__(self) -> str:
        return repr(self.scores)

    def prefix(self, context: bytes, /) -> float:
        return self._boolean("prefix", context)

    def complete(self, context: bytes, /) -> float:
        found = self._boolean("complete", context)
        if found == 0.0 and self._boolean("prefix", context) != 0.0:
            raise ContractError(repr(self.scores), context, "complete says yes where prefix says no")
        return found

    def start(self) -> State:
        return begin(self)

    def _boolean(self, name: str, context: bytes) -> float:
        found = getattr(self.scores, name)(context)
        if not _is_score(found):
            raise LimitError(
                repr(self.scores),
                f"the score of {name}",
                found,
                f"0 or -inf: needs a Boolean constraint, got {found!r} at {context!r}",
                "Give soft scores as a critic.",
            )
        return float(found)


@dataclass(frozen=True, slots=True)
class _Read:
    potential: Potential
    context: bytes

    def allows(self, data: bytes, /) -> bool:
        return self.potential.prefix(self.context + data) == 0

    def advance(self, data: bytes, /) -> State:
        return _Read(self.potential, self.context + data)

    def accepting(self) -> bool:
        return self.potential.complete(self.context) == 0


def begin(potential: Potential) -> State:
    """The first state of a potential whose states are the bytes so far.

    Raises:
        LimitError: the empty string is refused, so nothing satisfies the constraint.
    """
    if potential.prefix(b"") != 0:
        raise LimitError(
            repr(potential), "prefix(b'')", -math.inf, "0", "A constraint that no string satisfies has no sample."
        )
    return _Read(potential, b"")


def both(a: Any, b: Any) -> Potential:
    """The strings that satisfy both constraints.

    The prefix score is the product of the two, so it may say yes to a dead end: a prefix that each can complete, but
    in no common way. That keeps the law and costs variance.

    Raises:
        LimitError: one of them is no constraint.
    """
    return _Both(as_potential(a), as_potential(b))


class _Both:
    """The product of two Boolean potentials."""

    def __init__(self, a: Potential, b: Potential) -> None:
        self.a, self.b = a, b

    def __repr__(self) -> str:
        return f"both({self.a!r}, {self.b!r})"

    def prefix(self, context: bytes, /) -> float:
        return score(self.a.prefix(context) == 0 and self.b.prefix(context) == 0)

    def complete(self, context: bytes, /) -> float:
        return score(self.a.complete(context) == 0 and self.b.complete(context) == 0)

    def start(self) -> State:
        return _BothState(self.a.start(), self.b.start())


@dataclass(frozen=True, slots=True)
class _BothState:
    a: State
    b: State

    def allows(self, data: bytes, /) -> bool:
        return self.a.allows(data) and self.b.allows(data)

    def advance(self, data: bytes, /) -> State:
        return _BothState(self.a.advance(data), self.b.advance(data))

    def accepting(self) -> bool:
        return self.a.accepting() and self.b.accepting()


def check_contract(constraint: Any, strings: Iterable[bytes]) -> None:
    """Put a constraint of one's own to the test on these strings, whether they satisfy it or not.

    Checked for each: scores are 0 or -inf; nothing complete has a prefix that is refused; the states answer as
    ``prefix`` and ``complete`` do, whether the bytes come one by one or at once; asking and advancing leave a state
    as it was.

    Raises:
        LimitError: a score that is neither 0 nor -inf, or an empty string that is refused.
        ContractError: two answers contradict each other; names the context.
    """
    potential = as_potential(constraint)
    where = repr(potential)
    for string in strings:
        prefixes = [_score_of(potential, "prefix", string[:i]) for i in range(len(string) + 1)]
        completes = [_score_of(potential, "complete", string[:i]) for i in range(len(string) + 1)]
        if not prefixes[0]:
            raise LimitError(where, "prefix(b'')", -math.inf, "0", "No string satisfies this constraint.")
        refused = prefixes.index(False) if False in prefixes else len(prefixes)
        late = next((i for i in range(refused, len(prefixes)) if completes[i]), None)
        if late is not None:
            what = f"complete says yes to {string[:late]!r}, prefix says no"
            raise ContractError(where, string[:refused], what)
        _check_states(where, potential.start(), string, prefixes, completes)


def _score_of(potential: Potential, name: str, context: bytes) -> bool:
    found = getattr(potential, name)(context)
    if not _is_score(found):
        raise LimitError(repr(potential), f"{name}({context!r})", found, "0 or -inf", "Give soft scores as a critic.")
    return found == 0


def _check_states(where: str, start: State, string: bytes, prefixes: list[bool], completes: list[bool]) -> None:
    for i, allowed in enumerate(prefixes):
        if start.allows(string[:i]) != allowed:
            raise ContractError(where, string[:i], "start().allows and prefix differ")
    state, read = start, []
    for i in range(len(string) + 1):
        if state.accepting() != completes[i]:
            raise ContractError(where, string[:i], "the state's accepting and complete differ")
        read.append(state)
        if i == len(string):
            break
        if state.allows(string[i : i + 1]) != prefixes[i + 1]:
            raise ContractError(where, string[: i + 1], "the state's allows and prefix differ")
        if not prefixes[i + 1]:
            break
        state = state.advance(string[i : i + 1])
    for i, old in enumerate(read):
        if old.accepting() != completes[i] or (i < len(string) and old.allows(string[i : i + 1]) != prefixes[i + 1]):
            raise ContractError(where, string[:i], "a state changed while others were advanced")
        if prefixes[-1] and old.advance(string[i:]).accepting() != completes[-1]:
            raise ContractError(where, string, f"advancing at once from {string[:i]!r} and byte by byte differ")
