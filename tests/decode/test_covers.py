"""The lemma on a toy: every probability of bytes against sums over all strings."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

from tests.decode import byte_toys as toys
from tokenmill.decode._byte_view import ByteTokenizerView
from tokenmill.decode._byte_vocabulary import END, OTHER, Vocabulary
from tokenmill.decode._covers import Covers, Machine, start_all, start_valid
from tokenmill.errors import LimitError

SEED = 5


@pytest.fixture(scope="module", params=["slow twin", "view"])
def view(request: pytest.FixtureRequest) -> Any:
    return toys.SlowView() if request.param == "slow twin" else ByteTokenizerView(toys.toy_tokenizer())


def machine(view: Any, *, leak: bool = False, valid: bool = True, beam: int | None = None) -> Machine:
    vocabulary = Vocabulary.of(view, 9, [toys.END], torch.device("cpu"))
    return Machine(toys.ToyContexts(SEED, leak=leak), view if valid else None, vocabulary, beam)


def valid(view: Any, x: bytes, *, scored: bool = True, leak: bool = False) -> Covers:
    return start_valid(machine(view, leak=leak), view, x, [toys.END], scored=scored)


@cache
def law(ids: tuple[int, ...], leak: bool, valid: bool) -> torch.Tensor:
    """The model's next-token probabilities (9,), renormalised over valid continuations or as they are."""
    row = toys.ToyContexts(SEED, leak=leak).logits(ids)
    if valid:
        mask = [toys.encoding(toys.spelled((*ids, v))) == (*ids, v) for v in range(toys.END)]
        row = row.masked_fill(~torch.tensor([*mask, True]), -math.inf)
    return row.softmax(0)


def whole(ids: tuple[int, ...], leak: bool, valid: bool) -> float:
    """Probability of a token sequence that ends."""
    p = float(law(ids, leak, valid)[toys.END])
    for at, token in enumerate(ids):
        p *= float(law(ids[:at], leak, valid)[token])
    return p


@cache
def valid_strings(leak: bool) -> dict[bytes, float]:
    return {s: whole(toys.encoding(s), leak, True) for s in toys.strings()}


@cache
def all_strings() -> dict[bytes, float]:
    return {s: sum(whole(t, True, False) for t in toys.all_segmentations(s)) for s in toys.strings(5)}


def prefix(table: dict[bytes, float], x: bytes) -> float:
    return sum(p for s, p in table.items() if s.startswith(x))


@pytest.mark.prop("byte-level-probabilities", 3)
@pytest.mark.parametrize("leak", [False, True])
def test_all_strings_together_have_probability_one(leak: bool) -> None:
    assert sum(valid_strings(leak).values()) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.prop("byte-level-probabilities", 1)
@pytest.mark.parametrize("leak", [False, True])
def test_prefix_probabilities_and_next_bytes_equal_brute_force(view: Any, leak: bool) -> None:
    table = valid_strings(leak)
    checked = 0
    for x in toys.strings(5):
        exact = prefix(table, x)
        state = valid(view, x, leak=leak)
        assert math.exp(state.logp) == pytest.approx(exact, abs=1e-12)
        ours = state.logprobs().exp()
        for byte in b"ab ":
            assert float(ours[byte]) == pytest.approx(prefix(table, x + bytes([byte])) / exact, abs=1e-12)
        assert float(ours[END]) == pytest.approx(table[x] / exact, abs=1e-12)
        checked += 1
    assert checked == sum(3**n for n in range(6))


@pytest.mark.prop("byte-level-probabilities", 3)
def test_whole_strings_have_the_law_of_the_token_model(view: Any) -> None:
    table = valid_strings(False)
    for s in (b"", b"abab", b"a bb ab", b"babba"):
        state = valid(view, s)
        assert math.exp(state.logp + float(state.logprobs()[END])) == pytest.approx(table[s], rel=1e-12)


@pytest.mark.prop("byte-level-probabilities", 2)
def test_laws_sum_to_one_and_chain_to_the_prefix(view: Any) -> None:
    x = b"abba ab"
    state, chain = valid(view, b""), 0.0
    assert state.logp == pytest.approx(0.0, abs=1e-12)
    for byte in x:
        logs = state.logprobs()
        assert float(logs.exp().sum()) == pytest.approx(1.0, abs=1e-12)
        assert float(logs[OTHER]) == -math.inf
        chain += float(logs[byte])
        state = state.push(byte)
    assert chain == pytest.approx(valid(view, x).logp, abs=1e-9)


@pytest.mark.prop("byte-level-probabilities", 4)
@pytest.mark.parametrize("leak", [False, True])
def test_pushing_equals_starting_anew_at_every_byte(view: Any, leak: bool) -> None:
    for x in (b"ababab", b"abb aba", b" a abab", b"bbbabba"):
        state = valid(view, b"", leak=leak)
        for at, byte in enumerate(x):
            state = state.push(byte)
            fresh = valid(view, x[: at + 1], leak=leak)
            torch.testing.assert_close(state.logprobs(), fresh.logprobs(), rtol=0, atol=1e-12)
            assert state.logp == pytest.approx(fresh.logp, abs=1e-12)
            relative = valid(view, x[: at + 1], leak=leak, scored=False)
            torch.testing.assert_close(relative.logprobs(), fresh.logprobs(), rtol=0, atol=1e-12)


def covers_of(state: Covers, x: bytes) -> dict[tuple[int, ...], float]:
    """Token sequence -> log-probability, written out of a state's contexts."""
    order = state.machine.vocabulary.order
    found: dict[tuple[int, ...], float] = {}
    for c in state.contexts:
        if c.bytes is not None:
            assert c.ids not in found
            found[c.ids] = c.logp
            continue
        for at in range(c.lo, c.hi):
            logp = float(c.law[at - c.lo])
            if logp > -math.inf:
                ids = (*c.ids, int(order[at]))
                assert ids not in found
                found[ids] = c.logp + logp
    return found


@pytest.mark.prop("byte-level-probabilities", 5)
def test_covers_are_the_valid_sequences_that_straddle_the_end(view: Any) -> None:
    sequences = {toys.encoding(s)[:n] for s in toys.strings() for n in range(len(toys.encoding(s)) + 1)}
    several = 0
    for x in toys.strings(5):
        expected = {
            t
            for t in sequences
            if ((t and len(toys.spelled(t[:-1])) < len(x)) or t == () == tuple(x)) and toys.spelled(t).startswith(x)
        }
        state = valid(view, x, leak=False)
        found = covers_of(state, x)
        # A cover beyond the longest string has no mass and is left out.
        assert found.keys() == {t for t in expected if len(toys.spelled(t)) <= toys.LONGEST}
        empty = [t for t in found if toys.spelled(t) == x]
        assert empty == [toys.encoding(x)]
        for ids, logp in found.items():
            direct = sum(math.log(law(ids[:i], False, True)[t]) for i, t in enumerate(ids))
            assert logp == pytest.approx(direct, abs=1e-12)
        several += len(found) > 1
        beyond = sum(math.exp(logp) for ids, logp in found.items() if toys.spelled(ids) != x)
        assert state.straddling == pytest.approx(beyond / math.exp(state.logp), abs=1e-12)
    assert several > 50


@pytest.mark.prop("byte-level-probabilities", 9)
def test_all_segmentations_equal_enumeration() -> None:
    table = all_strings()
    vocabulary_view = toys.SlowView()

    def state(x: bytes) -> Covers:
        return start_all(machine(vocabulary_view, leak=True, valid=False), x, [toys.END], [], 0)

    for s, exact in table.items():
        made = state(s)
        assert math.exp(made.logp + float(made.logprobs()[END])) == pytest.approx(exact, abs=1e-12)
        assert float(made.logprobs().exp().sum()) == pytest.approx(1.0, abs=1e-12)
    x = b"abab"
    longer = [x + s for s in toys.strings(3)]
    total = sum(sum(whole(t, True, False) for t in toys.all_segmentations(s)) for s in longer)
    assert math.exp(state(x).logp) == pytest.approx(total, abs=1e-12)


def test_the_two_targets_differ_where_the_model_leaks(view: Any) -> None:
    of_valid = valid(view, b"abab", leak=True)
    of_all = start_all(machine(view, leak=True, valid=False), b"abab", [toys.END], [], 0)
    assert abs(of_valid.logp - of_all.logp) > 0.05
    assert of_valid.machine.trace.leak > 0.05
    assert of_all.machine.trace.leak == 0


@pytest.mark.parametrize("beam", [1, 2, 64])
def test_a_beam_only_loses_mass(beam: int) -> None:
    view = toys.SlowView()
    x = b"abababa"
    full = start_all(machine(view, leak=True, valid=False), x, [toys.END], [], 0)
    cut = start_all(machine(view, leak=True, valid=False, beam=beam), x, [toys.END], [], 0)
    assert cut.logp <= full.logp + 1e-12
    if beam == 64:
        assert cut.logp == pytest.approx(full.logp, abs=1e-12)
    else:
        assert cut.machine.contexts.rows < full.machine.contexts.rows  # type: ignore[attr-defined]


def test_a_byte_costs_one_row(view: Any) -> None:
    state = valid(view, b"")
    before = state.machine.contexts.rows  # type: ignore[attr-defined]
    for byte in b"abab ab":
        state = state.push(byte)
    assert state.machine.contexts.rows - before == 7  # type: ignore[attr-defined]
    assert state.machine.trace.bytes == 7


def refused(call: Callable[[], Any], *words: str) -> None:
    with pytest.raises(LimitError) as caught:
        call()
    assert all(word in str(caught.value) for word in words), caught.value


def test_impossible_bytes_are_refused(view: Any) -> None:
    refused(lambda: valid(view, b"ab").push(0x63), "0x63", "after 2 bytes")
    refused(lambda: valid(view, b"ab").push(256), "256")
    refused(lambda: Vocabulary.of(view, 5, [], torch.device("cpu")), "7", "below 5")
    refused(lambda: Vocabulary.of(view, 9, [12], torch.device("cpu")), "12", "below 9")
