"""StochasTok in use: bytes, lengths, alignment, determinism, columns, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.text.stochastok_toys import TOY
from tests.text.vocabularies import (
    cl100k,
    corpus,
    deepseek,
    minilm,
    mistral,
    o200k,
    python_target,
    qwen,
)
from tokenmill.errors import LimitError, UnsupportedError
from tokenmill.text import ExpansionTable, StochasTok, TokenBytes, bpe_dropout

TABLE = ExpansionTable.from_list(TOY)
REAL = [cl100k, o200k, qwen, mistral, minilm, deepseek]


@pytest.mark.prop("stochastok", 1)
@pytest.mark.prop("stochastok", 5)
@pytest.mark.parametrize("make", REAL)
def test_the_bytes_stay_as_they_are_token_by_token(make: Any) -> None:
    view = TokenBytes.of(make())
    table = ExpansionTable.from_tokenizer(view)
    texts = corpus(3, texts=40)
    rng = np.random.default_rng(0)
    usable = np.flatnonzero(view.lengths)
    rows = [view.encode(text) for text in texts]
    rows = [[i for i in row if view[i] is not None] for row in rows]
    rows += [rng.choice(usable, 50).tolist() for _ in range(10)]  # also pieces of characters
    for p in (0.1, 1.0, 4.0):
        made = StochasTok(table, p=p, seed=int(p)).expand_batch(rows)
        for row, ids, sources in zip(rows, made.input_ids, made.sources, strict=True):
            assert view.join(ids.tolist()) == view.join(row)
            assert (np.diff(sources) >= 0).all()
            assert set(sources.tolist()) == set(range(len(row)))
            for i in set(sources.tolist()):
                assert view.join(ids[sources == i].tolist()) == view[row[i]]
        assert sum(map(len, made.input_ids)) > sum(map(len, rows))


@pytest.mark.prop("stochastok", 1)
def test_tokenizers_decode_the_same_text() -> None:
    for tokenizer in (mistral(), deepseek(), minilm()):
        table = ExpansionTable.from_tokenizer(tokenizer)
        for text in corpus(5, texts=15)[:28]:
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            out = StochasTok(table, p=1.0).expand(ids)
            assert tokenizer.decode(out) == tokenizer.decode(ids)


@pytest.mark.prop("stochastok", 2)
@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(0, 5), max_size=30), st.floats(0, 10), st.integers(0, 2**40))
def test_lengths(ids: list[int], p: float, seed: int) -> None:
    out = StochasTok(TABLE, p=p, seed=seed).expand(ids)
    assert len(ids) <= len(out) <= len(ids) + math.floor(p * len(ids))
    assert StochasTok(TABLE, p=0, seed=seed).expand(ids) == ids
    assert b"".join(TOY[i] or b"?" for i in out) == b"".join(TOY[i] or b"?" for i in ids)


@pytest.mark.prop("stochastok", 2)
def test_the_number_of_attempts_is_rounded_down() -> None:
    how = StochasTok(TABLE, p=0.1)
    assert how.expand([3] * 9) == [3] * 9
    assert len(how.expand([3] * 10)) == len(how.expand([3] * 19)) - 9 == 11
    assert len(how.expand([3] * 20)) == 22


@pytest.mark.prop("stochastok", 3)
def test_replacements_are_pairs_of_the_table() -> None:
    table = ExpansionTable.from_tokenizer(python_target())
    ids = np.random.default_rng(1).choice(np.flatnonzero(table.splittable), 400)
    out, sources = StochasTok(table, p=0.3).expand(ids, alignment=True)
    counts = np.bincount(sources)
    for i in np.flatnonzero(counts == 2):
        assert tuple(out[sources == i].tolist()) in table.pairs(int(ids[i]))
    assert (counts == 2).sum() > 50


@pytest.mark.prop("stochastok", 5)
def test_specials_padding_and_ignored_labels_are_never_split() -> None:
    how = StochasTok(TABLE, p=5.0)
    ids = [5, 3, 3, 5, 2, 2, 3, 3]
    out, sources = how.expand(ids, labels=[0, -100, 0, 0, -100, 0, 0, -100], alignment=True)
    counts = np.bincount(sources)
    assert counts[[0, 1, 3, 4, 7]].tolist() == [1] * 5
    assert (counts[[2, 5, 6]] > 1).all()
    assert [out[sources.index(i)] for i in (0, 1, 3, 4, 7)] == [5, 3, 5, 2, 3]
    padded = torch.tensor([[3, 3, 3, 3], [3, 3, 3, 3]])
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 1]])
    made = how.expand_batch(padded, attention_mask=mask)
    assert [sorted(set(s.tolist())) for s in made.sources] == [[0, 1], [3]]
    assert b"".join(TOY[i] or b"" for i in made.input_ids[1]) == b"abb"
    left = how.expand_batch([[0, 0, 3, 3, 3]], attention_mask=[[0, 0, 1, 1, 1]], labels=[[-100, -100, 3, -100, 3]])
    assert np.bincount(left.sources[0])[3] == 1
    assert np.bincount(left.sources[0])[[2, 4]].min() > 1
    alone = how.expand_batch([[3, 3], [3]])
    assert [a.tolist() for a in alone.input_ids] == [a.tolist() for a in made.input_ids]


@pytest.mark.prop("stochastok", 6)
def test_draws_belong_to_the_example() -> None:
    table = ExpansionTable.from_tokenizer(python_target())
    rng = np.random.default_rng(2)
    rows = [rng.integers(0, len(table), n).tolist() for n in rng.integers(0, 80, 50)]
    how = StochasTok(table, p=0.7, seed=3)
    whole = [ids.tolist() for ids in how.expand_batch(rows).input_ids]
    order = rng.permutation(50)
    turned = how.expand_batch([rows[i] for i in order], indices=order.tolist()).input_ids
    assert [ids.tolist() for ids in turned] == [whole[i] for i in order]
    assert [how.expand(row, index=i) for i, row in enumerate(rows)] == whole
    assert [ids.tolist() for ids in how.expand_batch(rows, epoch=1).input_ids] != whole
    assert [ids.tolist() for ids in StochasTok(table, p=0.7, seed=4).expand_batch(rows).input_ids] != whole


@pytest.mark.prop("stochastok", 7)
def test_many_attempts_end_at_single_bytes() -> None:
    for view in (cl100k(), qwen()):
        table = ExpansionTable.from_tokenizer(view)
        ids = view.encode("Fixed points: naïve, 12345 and 天地")[:12]
        how, size = StochasTok(table, p=10.0), len(view.join(ids))
        limit = how.to_bytes(ids)
        assert len(limit) == size
        assert (table.lengths[limit] == 1).all()
        for epoch in range(12):
            ids = how.expand(ids, epoch=epoch)
        assert ids == limit


def test_the_limit_keeps_the_kind_and_the_alignment() -> None:
    how = StochasTok(TABLE)
    out, sources = how.to_bytes(np.array([3, 5, 4]), alignment=True)
    assert out.tolist() == [0, 1, 1, 5, 1, 1]
    assert sources.tolist() == [0, 0, 0, 1, 2, 2]
    assert how.to_bytes([]) == []


@pytest.mark.prop("stochastok", 9)
def test_the_given_p_counts() -> None:
    ids = [3] * 1000
    grown = [len(StochasTok(TABLE, p=p).expand(ids)) for p in (0.01, 0.1, 0.5)]
    assert 1005 < grown[0] <= 1010
    assert 1080 < grown[1] <= 1100
    assert 1400 < grown[2] <= 1500
    batch = StochasTok(TABLE, p=0.01).expand_batch([ids])
    assert len(batch.input_ids[0]) == grown[0]
    assert len(StochasTok(TABLE, p=0.01).columns({"input_ids": [ids]})["input_ids"][0]) == grown[0]
    assert len(StochasTok(TABLE, p=0.2).scaled(0.5).expand(ids)) == grown[1]


def test_a_limit_of_successes() -> None:
    for most in (0, 1, 7, 10**6):
        how = StochasTok(TABLE, p=2.0, max_num_to_expand=most)
        lengths = [len(ids) for ids in how.expand_batch([[3] * 40] * 30).input_ids]
        assert max(lengths) <= 40 + most
        if most <= 7:
            assert set(lengths) == {40 + most}


def test_p_for_a_class_of_tokens() -> None:
    table = ExpansionTable.from_list([b"1", b"2", b"a", b"b", b"12", b"ab", b" ", b" a"])
    ids = [4, 5, 7] * 100
    how = StochasTok(table, p=0.0, p_per_class={"digits": 10.0})
    out, sources = how.expand(ids, alignment=True)
    assert set(np.array(ids)[[i for i, n in enumerate(np.bincount(sources)) if n > 1]].tolist()) == {4}
    assert len(out) > 390
    assert (np.diff(sources) >= 0).all()
    both = StochasTok(table, p=0.5, p_per_class={"digits": 0.0}).expand(ids)
    assert both.count(4) == 100
    assert len(both) > 350
    capped = StochasTok(table, p=5.0, p_per_class={"digits": 5.0}, max_num_to_expand=3)
    assert len(capped.expand(ids)) == 303


@pytest.mark.prop("stochastok", 10)
def test_columns_follow_their_tokens() -> None:
    how = StochasTok(TABLE, p=1.0, seed=1)
    batch = {
        "input_ids": [[5, 3, 3, 2, 3, 0], [3, 2]],
        "attention_mask": [[1, 1, 1, 1, 1, 0], [1, 1]],
        "labels": [[-100, -100, 3, 2, 3, -100], [3, 2]],
        "word_ids": [[None, 0, 1, 1, 2, None], [0, 1]],
        "position_ids": [[0, 1, 2, 3, 4, 5], [0, 1]],
        "name": ["x", "y"],
    }
    before = {k: [list(v) if isinstance(v, list) else v for v in vs] for k, vs in batch.items()}
    out = how.columns(batch, [10, 11])
    assert batch == before
    assert out["name"] == ["x", "y"]
    made = how.expand_batch(
        batch["input_ids"], indices=[10, 11], attention_mask=batch["attention_mask"], labels=batch["labels"]
    )
    for row in range(2):
        ids, sources = out["input_ids"][row], made.sources[row].tolist()
        assert ids == made.input_ids[row].tolist()
        assert out["attention_mask"][row] == [1] * len(ids)
        assert out["position_ids"][row] == list(range(len(ids)))
        assert out["word_ids"][row] == [batch["word_ids"][row][i] for i in sources]
        wanted = [-100 if batch["labels"][row][i] == -100 else token for i, token in zip(sources, ids, strict=True)]
        assert out["labels"][row] == wanted
    assert len(out["input_ids"][0]) > 5
    assert 5 not in made.sources[0], "padding is left out"
    cut = how.columns(batch, [10, 11], max_length=3)
    assert all(len(cut[name][0]) == 3 for name in ("input_ids", "labels", "word_ids", "attention_mask", "position_ids"))
    assert cut["input_ids"][0] == out["input_ids"][0][:3]
    classes = how.columns({"input_ids": [[3, 3, 2]], "labels": [[7, -100, 8]]})
    assert set(classes["labels"][0]) == {7, -100, 8}


def test_kinds_stay() -> None:
    how = StochasTok(TABLE, p=1.0)
    as_list = how.expand([3, 3, 2])
    assert isinstance(as_list, list)
    array = how.expand(np.array([3, 3, 2], dtype=np.int32))
    tensor, sources = how.expand(torch.tensor([3, 3, 2]), alignment=True)
    assert array.tolist() == as_list == tensor.tolist()
    assert tensor.dtype == sources.dtype == torch.int64
    assert how.expand([]) == []
    assert how.expand(torch.tensor([], dtype=torch.long)).shape == (0,)
    assert how.expand_batch([]).input_ids == []
    assert [ids.tolist() for ids in how.expand_batch([[], [3], []]).input_ids][::2] == [[], []]
    with pytest.raises(AttributeError):
        how.p = 1.0  # type: ignore[misc]


def test_bad_input() -> None:
    how = StochasTok(TABLE)
    with pytest.raises(LimitError, match="token id 60000 not in table of size 6"):
        how.expand([0, 60000])
    with pytest.raises(LimitError, match="token id -1 not in table of size 6"):
        how.expand_batch([[0], [-1]])
    with pytest.raises(LimitError, match="token id 6 not in table"):
        how.to_bytes([6])
    for p in (-0.1, math.nan, 10.5, True, "0.1"):
        with pytest.raises(LimitError, match="p = "):
            StochasTok(TABLE, p=p)  # type: ignore[arg-type]
    for rows in (torch.zeros(2, 3, dtype=torch.long), np.zeros((1, 3), dtype=int)):
        for call in (how.expand, how.expand_batch):
            with pytest.raises(LimitError, match="padded batch needs attention_mask so that padding is not split"):
                call(rows)
    for bad, words in (
        ({"rows": [[0.5]]}, "whole numbers"),
        ({"rows": [[0]], "labels": [[0, 1]]}, r"len\(labels\[0\]\)"),
        ({"rows": [[0]], "attention_mask": [[1], [1]]}, "attention_mask"),
        ({"rows": [[0]], "indices": [1, 2]}, "indices"),
        ({"rows": [[0]], "epoch": -1}, "epoch"),
    ):
        with pytest.raises(LimitError, match=words):
            how.expand_batch(**bad)
    with pytest.raises(LimitError, match="max_length"):
        how.columns({"input_ids": [[0]]}, max_length=0)
    with pytest.raises(LimitError, match="input_ids"):
        how.columns({"labels": [[0]]})
    with pytest.raises(LimitError, match="digit"):
        StochasTok(TABLE, p_per_class={"digit": 1.0})
    with pytest.raises(LimitError, match="p_per_class"):
        StochasTok(TABLE, p_per_class={"digits": -1.0})
    for seed in (-1, 2**63, 0.5):
        with pytest.raises(LimitError, match="seed"):
            StochasTok(TABLE, seed=seed)  # type: ignore[arg-type]


def test_bpe_dropout() -> None:
    tokenizer = python_target()
    text = "def quicksort(values):\n    return sorted(values)\n" * 5
    plain = tokenizer(text, add_special_tokens=False)["input_ids"]
    view = TokenBytes.of(tokenizer)
    drop = bpe_dropout(tokenizer, 0.3)
    made = drop.encode(text, add_special_tokens=False).ids
    assert len(made) > len(plain)
    assert view.join(made) == view.join(plain)
    assert bpe_dropout(tokenizer, 0.0).encode(text, add_special_tokens=False).ids == plain
    assert (view_lengths := TokenBytes.of(tokenizer).lengths)[
        bpe_dropout(tokenizer, 1.0).encode("values").ids
    ].max() == 1
    assert view_lengths is view.lengths
    with pytest.raises(UnsupportedError, match="WordPiece"):
        bpe_dropout(minilm())
    with pytest.raises(UnsupportedError, match="backend"):
        bpe_dropout(cl100k())
    with pytest.raises(LimitError, match="dropout"):
        bpe_dropout(tokenizer, 1.5)


def test_a_data_set_is_mapped_and_does_not_depend_on_the_batches() -> None:
    rows = {"input_ids": [[3, 3, 2, 1] * 5, [2, 3], [3] * 9], "kind": ["a", "b", "c"]}
    how = StochasTok(TABLE, p=1.0, seed=3)
    made: list[Any] = [
        datasets.Dataset.from_dict(rows).map(how.columns, batched=True, with_indices=True, batch_size=size).to_dict()
        for size in (1, 2, 3)
    ]
    assert made[0] == made[1] == made[2]
    assert made[0]["kind"] == ["a", "b", "c"]
    assert sum(map(len, made[0]["input_ids"])) > 31
    assert made[0]["input_ids"] == [ids.tolist() for ids in how.expand_batch(rows["input_ids"]).input_ids]
