"""Batch-level merging: the incremental algorithm against a recount, boundaries, bytes, labels."""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from tests.text import vocabularies
from tokenmill import models
from tokenmill.errors import LimitError, UnsupportedError
from tokenmill.text import DynamicBPE
from tokenmill.text._batch_merging import Merging, Token, merged
from tokenmill.text.dynamic_tokenization import small

LETTERS = {i: bytes([97 + i]) for i in range(6)}


def spelt(token: Token) -> bytes:
    return b"".join(LETTERS[i] for i in token)


def recount(units: list[list[Token]], merges: int | None, ties: str) -> tuple[list[list[Token]], list[Any]]:
    """The plain algorithm: count every pair anew for each merge."""
    rows = [list(unit) for unit in units]
    done: list[Any] = []
    while merges is None or len(done) < merges:
        counts: Counter[Any] = Counter()
        for row in rows:
            counts.update(pairwise(row))
        if not counts:
            break
        top = max(counts.values())
        tied = [pair for pair in counts if counts[pair] == top]  # in the order of first sight
        best = tied[0] if ties == "first" else min(tied, key=lambda p: (spelt(p[0]), spelt(p[1]), p))
        rows = [merged(row, best) for row in rows]
        done.append(best)
    return rows, done


def incremental(units: list[list[Token]], merges: int | None, ties: Any) -> tuple[list[list[Token]], list[Any], int]:
    """The same through `Merging`, which sees each different unit once."""
    order = list(dict.fromkeys(map(tuple, units)))
    counts = Counter(map(tuple, units))
    merging = Merging([list(u) for u in order], [counts[u] for u in order], ties, spelt)
    merging.run(merges, None)
    place = {unit: i for i, unit in enumerate(order)}
    return [merging.units[place[tuple(unit)]] for unit in units], merging.merges, merging.saved


@pytest.mark.prop("dynamic-tokenization", 5)
@pytest.mark.parametrize("ties", ["bytes", "first"])
def test_incremental_merging_is_the_recount_in_a_thousand_batches(ties: str) -> None:
    rng = random.Random(ties)
    ended_early = 0
    for _ in range(1000):
        alphabet = rng.randrange(1, 5)  # few letters: runs of one letter, and many ties
        units = [[(rng.randrange(alphabet),) for _ in range(rng.randrange(1, 9))] for _ in range(rng.randrange(1, 12))]
        merges = rng.choice([None, 0, 1, 2, 5])
        rows, done = recount(units, merges, ties)
        ours, ours_done, saved = incremental(units, merges, ties)
        assert ours_done == done
        assert ours == rows
        assert saved == sum(map(len, units)) - sum(map(len, rows))
        ended_early += merges is not None and len(done) < merges
    assert ended_early > 20


@pytest.mark.prop("dynamic-tokenization", 5)
def test_runs_count_every_neighbour_and_merge_without_overlap() -> None:
    run = [[(0,)] * 5, [(1,), (2,)], [(1,), (2,)], [(1,), (2,)]]
    rows, done, _ = incremental(run, 1, "bytes")
    assert done == [((0,), (0,))]  # four neighbours in the run against three pairs
    assert rows[0] == [(0, 0), (0, 0), (0,)]


@pytest.mark.prop("dynamic-tokenization", 3)
def test_each_merge_shortens_and_exhaustion_leaves_no_pair() -> None:
    rng = random.Random(3)
    for _ in range(50):
        units = [[(rng.randrange(3),) for _ in range(rng.randrange(1, 9))] for _ in range(5)]
        total = sum(map(len, units))
        lengths = []
        for merges in range(12):
            rows, done, saved = incremental(units, merges, "bytes")
            lengths.append(sum(map(len, rows)))
            assert lengths[-1] == total - saved
            if len(done) == merges and merges:
                assert lengths[-1] <= lengths[-2] - 1
        assert incremental(units, None, "bytes")[0] == [[sum(unit, ())] for unit in units]


def bpes(**more: Any) -> dict[str, DynamicBPE]:
    return {
        "minilm": DynamicBPE(models.tokenizer("all-minilm-l6-v2"), **more),
        "gemma": DynamicBPE(vocabularies.gemma_tokenizer(), **more),
        "python": DynamicBPE(vocabularies.python_target(), **more),
    }


TEXTS = [line for line in vocabularies.LINES if line.strip()]


@pytest.mark.prop("dynamic-tokenization", 1)
def test_no_merges_are_the_ordinary_tokens() -> None:
    for bpe in bpes(max_merges=0).values():
        batch = bpe.merge(TEXTS)
        plain = bpe.tokenizer(TEXTS)["input_ids"]
        assert batch.base_ids == plain
        assert [[token for (token,) in row] for row in batch.pieces] == plain
        assert batch.cut == 0
        assert not batch.merges


@pytest.mark.prop("dynamic-tokenization", 2)
@pytest.mark.parametrize("boundary", ["pretoken", "word", "word_hyphen", "sentence"])
def test_bytes_and_pieces_are_those_of_the_base_tokens(boundary: Any) -> None:
    for name, bpe in bpes(boundary=boundary, target_reduction=1.0).items():
        batch = bpe.merge(TEXTS)
        zero = DynamicBPE(bpe.tokenizer, boundary=boundary, max_merges=0).merge(TEXTS)
        for row, base in enumerate(batch.base_ids):
            assert [i for token in batch.pieces[row] for i in token] == base
            assert b"".join(batch.tokens[row]) == b"".join(zero.tokens[row]), name
            numbers = [n for n in batch.word_ids[row] if n is not None]
            assert numbers == sorted(numbers)
            # At the start of a merged token the unit is what it was before.
            starts = [sum(map(len, batch.pieces[row][:i])) for i in range(len(batch.pieces[row]))]
            assert batch.word_ids[row] == [zero.word_ids[row][at] for at in starts]


@pytest.mark.prop("dynamic-tokenization", 4)
def test_exhausted_pretokens_are_the_pre_tokenizers_own() -> None:
    for name in ("minilm", "python"):
        bpe = bpes(target_reduction=1.0)[name]
        for text in ("The naïve fox's 12345 jumps-over, x_y = f(ü)!", "Überraschung für Übermorgen"):
            backend = bpe.tokenizer.backend_tokenizer
            normal = backend.normalizer.normalize_str(text) if backend.normalizer else text
            cut = [part for part, _ in backend.pre_tokenizer.pre_tokenize_str(normal)]
            batch = bpe.merge([text], add_special_tokens=False)
            assert len(batch.pieces[0]) == len(cut) == batch.limit
            if name == "minilm":
                found = [data.decode().strip() for data in batch.tokens[0]]
                assert found == cut


@pytest.mark.prop("dynamic-tokenization", 6)
def test_special_tokens_stay_alone_and_tails_are_protected() -> None:
    bpe = bpes(target_reduction=1.0, boundary="sentence")["minilm"]
    batch = bpe.merge(["unbelievable overtokenisation", "unbelievable overtokenisation"])
    for row, numbers in zip(batch.pieces, batch.word_ids, strict=True):
        assert (row[0], row[-1]) == ((101,), (102,))
        assert (numbers[0], numbers[-1]) == (None, None)
        assert len(row) == 3
    kept = bpe.merge(["unbelievable overtokenisation"], add_special_tokens=False, protect_tail=2)
    base = kept.base_ids[0]
    assert kept.pieces[0][-2:] == [(base[-2],), (base[-1],)]
    assert kept.pieces[0][0] == tuple(base[:-2])


@pytest.mark.prop("dynamic-tokenization", 7)
def test_the_order_of_a_batch_matters_only_with_the_papers_ties() -> None:
    texts = ["abcd efgh abcd", "efgh ijkl", "mnop qrst uvwx"]
    for ties, same in (("bytes", True), ("first", False)):
        bpe = DynamicBPE(small().tokenizer, ties=ties, max_merges=5)  # type: ignore[arg-type]
        one, two = bpe.merge(texts), bpe.merge(texts[::-1])
        assert (one.merges == two.merges) == same
    together = DynamicBPE(small().tokenizer, max_merges=2).merge(texts)
    alone = DynamicBPE(small().tokenizer, max_merges=2).merge(texts[1:2])
    assert together.pieces[1] != alone.pieces[0]
    each = DynamicBPE(small().tokenizer, max_merges=2, per_example=True).merge(texts)
    assert each.pieces[1] == alone.pieces[0]


@pytest.mark.prop("dynamic-tokenization", 12)
def test_every_word_keeps_exactly_one_label() -> None:
    bpe = bpes(target_reduction=0.6)["minilm"]
    texts = ["Überraschungsgäste kommen nächste Woche", "tokenisation works"]
    batch = bpe.merge(texts)
    words = [max(n for n in row if n is not None) + 1 for row in batch.word_ids]
    labels = [[100 + w for w in range(n)] for n in words]
    found = batch.labels(labels)
    for row, own in zip(found, labels, strict=True):
        assert [x for x in row if x != -100] == own
        assert (row[0], row[-1]) == (-100, -100)
    assert [len(r) for r in found] == [len(r) for r in batch.pieces]
    with pytest.raises(LimitError, match="labels of text 0"):
        batch.labels([[1], [1]])


def test_targets_are_shares_of_what_can_be_saved() -> None:
    bpe = bpes()["minilm"]
    full = DynamicBPE(bpe.tokenizer, target_reduction=1.0).merge(TEXTS)
    assert full.reduction == 1
    assert full.length == full.limit
    previous = 0.0
    for share in (0.0, 0.2, 0.5, 0.8):
        batch = DynamicBPE(bpe.tokenizer, target_reduction=share).merge(TEXTS)
        assert share <= batch.reduction < share + 0.1
        assert batch.cut >= previous
        previous = batch.cut
    assert DynamicBPE(bpe.tokenizer, max_merges=3).merge(TEXTS).merges == full.merges[:3]


def test_a_token_across_a_border_stays_alone() -> None:
    bpe = DynamicBPE(vocabularies.gemma_tokenizer(), boundary=lambda t: [(0, 3), (3, len(t))], target_reduction=1.0)
    text = "a hello world"  # the second border cuts " hello"
    batch = bpe.merge([text], add_special_tokens=False)
    across = bpe.tokenizer(" hello", add_special_tokens=False)["input_ids"][0]
    assert (across,) in batch.pieces[0]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=30), min_size=1, max_size=4), st.floats(0, 1))
def test_any_text_gives_its_base_tokens_back(texts: list[str], share: float) -> None:
    bpe = DynamicBPE(vocabularies.python_target(), target_reduction=share)
    batch = bpe.merge(texts)
    assert [[i for token in row for i in token] for row in batch.pieces] == bpe.tokenizer(texts)["input_ids"]


def test_bad_input_is_refused() -> None:
    bpe = small()
    with pytest.raises(LimitError, match="max_merges = -1"):
        DynamicBPE(bpe.tokenizer, max_merges=-1)
    with pytest.raises(LimitError, match="target_reduction"):
        DynamicBPE(bpe.tokenizer, target_reduction=1.5)
    with pytest.raises(LimitError, match="free of lone surrogates"):
        bpe.merge(["a\ud800"])
    with pytest.raises(LimitError, match="a list of texts"):
        bpe.merge("text")
    with pytest.raises(LimitError, match="protect_tail"):
        bpe.merge(["a"], protect_tail=-1)
    with pytest.raises(UnsupportedError, match="no offsets"):
        DynamicBPE(object())
    assert bpe.merge([]).pieces == []
    assert bpe.merge(["", "a"]).pieces[0] == []
    same = DynamicBPE(bpe.tokenizer, max_merges=10_000).merge(["abc"] * 3)
    assert [len(row) for row in same.pieces] == [1, 1, 1]  # fewer merges than asked: it ends quietly
    assert isinstance(bpe.tokenizer, PreTrainedTokenizerFast)
