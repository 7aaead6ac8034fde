from __future__ import annotations

from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import BPE

from tokenmill.text._merges import Merges, Pairs, first_symbols
from tokenmill.text._ranks import merge_bytes

Rules = list[tuple[str, str]]


@st.composite
def rules(draw: st.DrawFn) -> Rules:
    """Random merges over three letters in random order, so that a rank may be below those it needs."""
    pieces, found = ["a", "b", "c"], []
    for _ in range(draw(st.integers(0, 9))):
        pair = (draw(st.sampled_from(pieces)), draw(st.sampled_from(pieces)))
        if pair not in found and len(pair[0] + pair[1]) <= 6:
            found.append(pair)
            if pair[0] + pair[1] not in pieces:
                pieces.append(pair[0] + pair[1])
    return draw(st.permutations(found))


def model_of(merges: Rules) -> tuple[dict[str, int], Tokenizer]:
    pieces = list(dict.fromkeys([*"abc", *(a + b for a, b in merges)]))
    vocab = {piece: i for i, piece in enumerate(pieces)}
    return vocab, Tokenizer(BPE(vocab, merges))


def pairs_of(vocab: dict[str, int], merges: Merges) -> Pairs:
    table = np.full(0x110000, -1, dtype=np.int32)
    table[[ord(letter) for letter in "abc"]] = [vocab[letter] for letter in "abc"]
    return Pairs(merges, *first_symbols(list(vocab), table), np.array(list(vocab.values())))


@given(rules())
def test_two_tokens_stay_apart_exactly_when_the_tokenizer_gives_them_back(merges: Rules) -> None:
    vocab, tokenizer = model_of(merges)
    pairs = pairs_of(vocab, Merges.from_model(len(vocab), vocab, merges))
    for piece, i in vocab.items():
        assert pairs.reachable[i] == (tokenizer.encode(piece).ids == [i])
    reachable = [(piece, i) for piece, i in vocab.items() if pairs.reachable[i]]
    for a, i in reachable:
        clashing = set(pairs.clashing(i).tolist())
        for b, j in reachable:
            assert (j not in clashing) == pairs.fits(i, j) == (tokenizer.encode(a + b).ids == [i, j]), (a, b)


@given(rules())
def test_three_tokens_stay_apart_when_each_two_do(merges: Rules) -> None:
    vocab, tokenizer = model_of(merges)
    pairs = pairs_of(vocab, Merges.from_model(len(vocab), vocab, merges))
    reachable = [(piece, i) for piece, i in vocab.items() if pairs.reachable[i]][:6]
    for chain in product(reachable, repeat=3):
        text, ids = "".join(piece for piece, _ in chain), [i for _, i in chain]
        fit = all(pairs.fits(i, j) for i, j in pairwise(ids))
        assert fit == (tokenizer.encode(text).ids == ids), chain


@given(rules())
def test_ranks_of_unions_are_simulated_alike(merges: Rules) -> None:
    """tiktoken's rule: any two parts whose union is a token, several derivations with one rank."""
    vocab, _ = model_of(merges)
    ranks = {piece.encode(): i for piece, i in vocab.items()}
    pairs = pairs_of(vocab, Merges.from_ranks(len(ranks), ranks))
    reachable = [(t, i) for t, i in ranks.items() if pairs.reachable[i]]
    assert {i for t, i in ranks.items() if merge_bytes(ranks, t) == (i,)} == {i for _, i in reachable}
    for (a, i), (b, j) in product(reachable, repeat=2):
        assert pairs.fits(i, j) == (merge_bytes(ranks, a + b) == (i, j)), (a, b)


def slow_merge(ranks: dict[bytes, int], data: bytes) -> tuple[int, ...]:
    parts = [data[i : i + 1] for i in range(len(data))]
    while True:
        unions = [(ranks[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ranks]
        if not unions:
            return tuple(ranks[part] for part in parts)
        _, i = min(unions)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


@given(rules(), st.text("abc", max_size=20))
def test_merging_by_ranks_is_the_slow_loop(merges: Rules, text: str) -> None:
    ranks = {piece.encode(): i for piece, i in model_of(merges)[0].items()}
    assert merge_bytes(ranks, text.encode()) == slow_merge(ranks, text.encode())


@pytest.mark.parametrize(
    ("merges", "a", "b", "apart"),
    [
        ([("a", "b"), ("c", "a")], "a", "b", False),
        # "c" + "ab": the boundary pair (c, a) would merge, but "ab" is made first.
        ([("a", "b"), ("c", "a")], "c", "ab", True),
        ([("c", "a"), ("a", "b")], "c", "ab", False),
        # On a tie the left token goes first: "aa" "a" of "aaa".
        ([("a", "a")], "aa", "a", True),
        ([("a", "a")], "a", "aa", False),
        # "ca" needs rank 1, then "cab" has rank 0: it waits for nothing once "ca" is there.
        ([("ca", "b"), ("c", "a"), ("b", "c")], "ca", "b", False),
        # The right edge "b" of "cab" is gone at time 1, not at its merge's own rank 0.
        ([("ca", "b"), ("c", "a"), ("b", "b")], "cab", "b", True),
        ([("ca", "b"), ("b", "b"), ("c", "a")], "cab", "b", False),
    ],
)
def test_ranks_that_do_not_ascend(merges: Rules, a: str, b: str, apart: bool) -> None:
    vocab, tokenizer = model_of(merges)
    pairs = pairs_of(vocab, Merges.from_model(len(vocab), vocab, merges))
    assert (tokenizer.encode(a + b).ids == [vocab[a], vocab[b]]) == apart
    assert pairs.fits(vocab[a], vocab[b]) == apart


def test_of_a_pair_given_twice_the_last_counts() -> None:
    merges = [("a", "b"), ("b", "c"), ("a", "b")]
    vocab, tokenizer = model_of(merges)
    pairs = pairs_of(vocab, Merges.from_model(len(vocab), vocab, merges))
    assert tokenizer.encode("abc").ids == [vocab["a"], vocab["bc"]]
    assert pairs.fits(vocab["a"], vocab["bc"])
