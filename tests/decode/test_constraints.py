"""Constraints on bytes: what they promise, products, automata, and predicates on text."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenmill.decode._dfa import DFA
from tokenmill.decode._potential import ContractError, as_potential, both, check_contract
from tokenmill.decode._predicate import predicate
from tokenmill.errors import LimitError, TokenmillError

A, B = b"ab"
Automaton = tuple[np.ndarray, np.ndarray]


def strings(alphabet: bytes, longest: int) -> list[bytes]:
    return [bytes(s) for n in range(longest + 1) for s in itertools.product(alphabet, repeat=n)]


def even_as() -> DFA:
    """Strings over a and b with an even number of a's; c leads nowhere."""
    table = np.full((3, 256), -1)
    table[0, [A, B]], table[1, [A, B]] = [1, 0], [0, 1]
    table[0, ord("c")] = table[2, ord("c")] = 2
    return DFA(table, [True, False, False])


@st.composite
def automata(draw: st.DrawFn) -> Automaton:
    """Up to four states over a and b, with an accepting state within reach."""
    n = draw(st.integers(1, 4))
    moves = draw(st.lists(st.integers(-1, n - 1), min_size=2 * n, max_size=2 * n))
    table = np.full((n, 256), -1)
    table[:, [A, B]] = np.array(moves).reshape(n, 2)
    final = np.array(draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    return table, final


class Scores:
    """A constraint with two methods only, from sets of strings."""

    def __init__(self, prefixes: dict[bytes, float], completes: dict[bytes, float]) -> None:
        self.prefixes, self.completes = prefixes, completes

    def prefix(self, context: bytes) -> float:
        return self.prefixes.get(context, -math.inf)

    def complete(self, context: bytes) -> float:
        return self.completes.get(context, -math.inf)


def runs(automaton: Automaton, string: bytes) -> bool:
    """The slow twin: does the automaton accept this string?"""
    table, final = automaton
    state = 0
    for byte in string:
        state = int(table[state, byte])
        if state < 0:
            return False
    return bool(final[state])


@given(automata())
def test_an_automaton_allows_exactly_what_can_be_completed(automaton: Automaton) -> None:
    accepted = {s for s in strings(b"ab", 7) if runs(automaton, s)}
    # From any state a string shorter than the number of states leads to an accepting one, if any does.
    if not any(len(s) < 4 for s in accepted):
        with pytest.raises(LimitError, match="language is empty"):
            DFA(*automaton)
        return
    dfa = DFA(*automaton)
    prefixes = {s[:i] for s in accepted for i in range(len(s) + 1)}
    for s in strings(b"ab", 4):
        assert (dfa.prefix(s) == 0) == (s in prefixes)
        assert (dfa.complete(s) == 0) == (s in accepted)
    check_contract(dfa, [*strings(b"ab", 4), b"c", b"a\xff"])


def test_an_automaton_takes_tensors_and_lists() -> None:
    dfa = even_as()
    for table in (torch.tensor(dfa.transitions), dfa.transitions.tolist(), dfa.transitions.astype(np.uint8) * 0):
        other = DFA(table, torch.tensor([True, False, False]))
        assert other.complete(b"") == 0
    assert DFA(dfa.transitions, dfa.accepting, start=1).complete(b"a") == 0
    assert dfa.transitions.dtype == np.int32
    with pytest.raises(ValueError, match="read-only"):
        dfa.transitions[0, 0] = 1


def test_a_state_of_an_automaton_is_a_value() -> None:
    start = even_as().start()
    assert start.advance(b"aa") == start.advance(b"bb")
    assert hash(start.advance(b"aa")) == hash(start.advance(b"bb"))
    assert start.advance(b"a") != start
    with pytest.raises(LimitError, match="allows"):
        start.advance(b"c")


@pytest.mark.parametrize(
    ("table", "final", "start", "parameter"),
    [
        (np.zeros((2, 255), dtype=int), [True, True], 0, "transitions"),
        (np.zeros(256, dtype=int), [True], 0, "transitions"),
        (np.zeros((0, 256), dtype=int), np.zeros(0, dtype=bool), 0, "transitions"),
        (np.zeros((1, 256)), [True], 0, "transitions"),
        (np.full((2, 256), 2), [True, True], 0, "transitions = 2"),
        (np.full((2, 256), -2), [True, True], 0, "transitions = -2"),
        (np.zeros((2, 256), dtype=int), [True], 0, "accepting"),
        (np.zeros((2, 256), dtype=int), [1, 0], 0, "accepting"),
        (np.zeros((2, 256), dtype=int), [True, True], 2, "start = 2"),
        (np.zeros((2, 256), dtype=int), [True, True], -1, "start = -1"),
        (np.zeros((2, 256), dtype=int), [False, True], 0, "language is empty"),
    ],
)
def test_what_is_no_automaton_is_refused(table: Any, final: Any, start: int, parameter: str) -> None:
    with pytest.raises(LimitError, match=parameter):
        DFA(table, final, start)


def test_two_methods_are_enough() -> None:
    dfa = even_as()
    potential = as_potential(Scores(dict.fromkeys(strings(b"ab", 5), 0.0), {b"aa": 0, b"": 0.0}))
    check_contract(potential, strings(b"abc", 3))
    state = potential.start().advance(b"a")
    assert state.allows(b"a")
    assert not state.allows(b"c")
    assert state.advance(b"a").accepting()
    assert not state.accepting()
    assert as_potential(dfa) is dfa


def test_what_has_no_methods_is_no_constraint() -> None:
    with pytest.raises(LimitError, match="prefix and complete is missing"):
        as_potential("[0-9]+")
    with pytest.raises(LimitError, match="complete is missing"):
        both(even_as(), type("Half", (), {"prefix": lambda self, context: 0.0})())


@pytest.mark.parametrize("wrong", [-1.5, 0.5, math.inf, math.nan, True, False, None])
def test_soft_scores_are_refused(wrong: Any) -> None:
    soft = as_potential(Scores({b"": 0.0, b"a": wrong}, {b"": wrong}))
    with pytest.raises(LimitError, match=r"needs a Boolean constraint.*b'a'"):
        soft.start().allows(b"a")
    with pytest.raises(LimitError, match="0 or -inf"):
        soft.start().accepting()


def test_a_constraint_that_contradicts_itself_is_named() -> None:
    torn = as_potential(Scores({b"": 0.0, b"ab": 0.0}, {b"a": 0.0, b"ab": 0.0}))
    with pytest.raises(ContractError, match="complete says yes where prefix says no at b'a'") as caught:
        torn.complete(b"a")
    assert caught.value.context == b"a"
    skipped = Scores({b"": 0.0, b"ab": 0.0}, {b"ab": 0.0})
    with pytest.raises(ContractError, match="complete says yes to b'ab', prefix says no at b'a'"):
        check_contract(skipped, [b"abc"])
    with pytest.raises(LimitError, match="no string satisfies"):
        as_potential(Scores({}, {})).start()
    with pytest.raises(LimitError, match="No string satisfies"):
        check_contract(predicate(lambda text: text != ""), [b"a"])


class Moving:
    """A state that moves itself: what a particle that shares it would see."""

    def __init__(self, dfa: DFA, state: int = 0) -> None:
        self.dfa, self.state = dfa, state

    def allows(self, data: bytes) -> bool:
        return self.dfa.run(self.state, data) >= 0

    def advance(self, data: bytes) -> Moving:
        self.state = self.dfa.run(self.state, data)
        return self

    def accepting(self) -> bool:
        return self.dfa.final(self.state)


class Hasty:
    """A state that looks at the first byte only."""

    def __init__(self, state: Any) -> None:
        self.state = state

    def allows(self, data: bytes) -> bool:
        return self.state.allows(data[:1])

    def advance(self, data: bytes) -> Hasty:
        return Hasty(self.state.advance(data))

    def accepting(self) -> bool:
        return self.state.accepting()


def refuses_longer(self: Any, context: bytes) -> float:
    return -math.inf if len(context) > 1 else 0.0


@pytest.mark.parametrize(
    ("string", "change", "what"),
    [
        (b"aa", {"start": lambda self: Moving(self)}, "a state changed"),
        (b"aa", {"start": lambda self: DFA(self.transitions, [False, True, False]).start()}, "accepting and complete"),
        (b"c", {"start": lambda self: DFA(self.transitions[[0]] * 0, [True]).start()}, "allows and prefix differ"),
        (b"ac", {"start": lambda self: Hasty(DFA.start(self))}, r"start\(\).allows and prefix differ at b'ac'"),
        (b"aa", {"prefix": refuses_longer}, "complete says yes to b'aa', prefix says no"),
        (b"aa", {"complete": lambda self, context: -1.0}, "0 or -inf"),
    ],
)
def test_the_laws_find_what_breaks_them(string: bytes, change: dict[str, Any], what: str) -> None:
    dfa = even_as()
    check_contract(dfa, [string])
    broken = type("Broken", (DFA,), change)(dfa.transitions, dfa.accepting)
    with pytest.raises((ContractError, LimitError), match=what):
        check_contract(broken, [string])


def test_both_is_the_product() -> None:
    short = predicate(lambda text: len(text) < 4, name="short")
    product = both(even_as(), short)
    for s in strings(b"abc", 4):
        assert (product.complete(s) == 0) == (s.count(b"a") % 2 == 0 and b"c" not in s and len(s) < 4)
        assert (product.prefix(s) == 0) == (b"c" not in s and len(s) < 4)
    check_contract(product, strings(b"abc", 4))
    assert repr(product) == "both(DFA(3 states), predicate(short))"


def test_a_predicate_sees_whole_characters_only() -> None:
    seen: list[str] = []

    def no_e(text: str) -> bool:
        seen.append(text)
        return "e" not in text

    potential = predicate(no_e)
    check_contract(potential, ["aé€𝐢e".encode(), b"a\xff", b"\xc3(", b"\xed\xa0\x80", b"\xf4\x90", b"e"])
    assert set("".join(seen)) <= set("aé€𝐢e")
    for whole in ("é", "€", "𝐢"):
        data = whole.encode()
        for i in range(1, len(data)):
            assert potential.prefix(data[:i]) == 0
            assert potential.complete(data[:i]) == -math.inf
        assert potential.complete(data) == 0
    for broken in (b"\xff", b"\xc0", b"\xc3(", b"\xed\xa0", b"\xf4\x90", b"\x80"):
        assert potential.prefix(broken) == potential.complete(broken) == -math.inf


def test_a_predicate_may_say_apart_what_is_whole() -> None:
    potential = predicate(lambda text: set(text) <= set("ab"), lambda text: text.endswith("b"))
    with pytest.raises(ContractError, match="complete_fn says yes where prefix_fn says no at b'cb'"):
        potential.complete(b"cb")
    check_contract(potential, strings(b"ab", 4))
    numpy: Any = predicate(lambda text: np.bool_("e" not in text))  # type: ignore[arg-type]
    assert numpy.complete(b"e") == -math.inf


def test_what_a_predicate_does_wrong_comes_out_with_the_text() -> None:
    def failing(text: str) -> bool:
        return bool(1 / (3 - len(text)))

    potential = predicate(failing, name="thirds")
    with pytest.raises(
        TokenmillError, match="predicate\\(thirds\\): prefix_fn raised ZeroDivisionError at 'abc'"
    ) as caught:
        potential.start().advance(b"ab").allows(b"c")
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    for answer in (1, None, "yes"):
        with pytest.raises(LimitError, match="True or False"):
            predicate(lambda text, answer=answer: answer).start()  # type: ignore[arg-type]
    with pytest.raises(LimitError, match="complete_fn"):
        predicate(str.isascii, True)  # type: ignore[arg-type]
    with pytest.raises(LimitError, match="no sample"):
        predicate(lambda text: False).start()
