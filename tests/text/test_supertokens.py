"""Supertokens: chunks of random length, and BPE over them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer

from tests.text.vocabularies import corpus
from tokenmill import corpora
from tokenmill.errors import LimitError
from tokenmill.text import _bpe_training as bpe
from tokenmill.text._supertokens import CHUNK_LENGTHS, random_chunks, train_supertokenizer

TEXTS = [r.text[:5000] for r in corpora.load("python-reference").split("train")][:30]


def model(tokenizer: Any) -> Any:
    return json.loads(tokenizer.backend_tokenizer.to_str())["model"]


@pytest.mark.prop("tokenadapt", 9)
def test_lengths_stay_in_range_and_follow_their_probabilities() -> None:
    rng = np.random.default_rng(0)
    text = "x" * 200_000
    chunks = random_chunks(text, CHUNK_LENGTHS, rng)
    assert "".join(chunks) == text
    sizes = np.array([len(c) for c in chunks[:-1]])
    assert sizes.min() >= 4
    assert sizes.max() <= 23
    expected = np.repeat([p / 2 for p in CHUNK_LENGTHS.values()], 2) * len(sizes)
    observed = np.bincount(sizes, minlength=24)[4:]
    assert ((observed - expected) ** 2 / expected).sum() < 45  # 19 degrees of freedom, p = 0.0007
    assert random_chunks("", CHUNK_LENGTHS, rng) == []
    assert random_chunks("ab", CHUNK_LENGTHS, rng) == ["ab"]
    assert random_chunks("abcdef", {(2, 2): 1.0}, rng) == ["ab", "cd", "ef"]


@pytest.mark.prop("tokenadapt", 9)
def test_shares_are_checked() -> None:
    assert sum(CHUNK_LENGTHS.values()) == pytest.approx(1)
    for bad in ({(4, 5): 1.1}, {(4, 5): -1.0, (6, 7): 2.0}, {(0, 3): 1.0}, {(5, 4): 1.0}, {}):
        with pytest.raises(LimitError, match="chunk_lengths"):
            train_supertokenizer(TEXTS, 1000, chunk_lengths=bad)
    with pytest.raises(LimitError, match="vocab_size"):
        train_supertokenizer(TEXTS, 100)


@pytest.mark.prop("tokenadapt", 9)
def test_tokens_cross_spaces_and_texts_come_back() -> None:
    made = train_supertokenizer(TEXTS, 2000)
    assert any(" " in str(made.decode([i]))[1:].strip() for i in range(257, len(made)))
    for text in corpus(4, 60):
        clean = normalizers.NFC().normalize_str(text)
        if "<|endoftext|>" not in text:
            assert made.decode(made.encode(text, add_special_tokens=False)) == clean
    assert max(len(token) for token in model(made)["vocab"] if token != "<|endoftext|>") <= 30
    assert model(made) == model(train_supertokenizer(TEXTS, 2000))
    assert model(made) != model(train_supertokenizer(TEXTS, 2000, seed=1))


@pytest.mark.prop("tokenadapt", 9)
def test_chunks_as_texts_are_what_a_separator_gives() -> None:
    """The published way: join chunks with a string that no text has, and split at it."""
    rng = np.random.default_rng(0)
    chunks = [random_chunks(text, CHUNK_LENGTHS, rng) for text in TEXTS]
    ours = bpe.train_bpe(iter(chunks), 500, regex=False, min_frequency=2)
    made = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex("\ue000"), "removed")
    made.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    trainer = trainers.BpeTrainer(
        vocab_size=756, min_frequency=2, show_progress=False, initial_alphabet=bpe.byte_alphabet()
    )
    made.train_from_iterator(["\ue000".join(c) for c in chunks], trainer)
    assert ours == bpe.read_learned(made)


@pytest.mark.prop("tokenadapt", 9)
def test_words_as_chunks_are_ordinary_bpe() -> None:
    cut = pre_tokenizers.Split(
        Regex(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"), "isolated"
    )
    words = [[word for word, _ in cut.pre_tokenize_str(text)] for text in TEXTS]
    assert bpe.train_bpe(words, 500) == bpe.train_bpe(TEXTS, 500) == bpe.train_bpe(words, 500, regex=False)


@pytest.mark.prop("tokenadapt", 9)
@settings(max_examples=60, deadline=None)
@given(st.text(max_size=200), st.integers(0, 2**32 - 1))
def test_chunks_joined_are_the_text(text: str, seed: int) -> None:
    chunks = random_chunks(text, CHUNK_LENGTHS, np.random.default_rng(seed))
    assert "".join(chunks) == text
    assert all(4 <= len(chunk) <= 23 for chunk in chunks[:-1])
    assert all(chunks)


@pytest.mark.prop("tokenadapt", 9)
def test_a_seed_gives_one_vocabulary() -> None:
    first, again, other = (train_supertokenizer(TEXTS, 900, seed=s).get_vocab() for s in (3, 3, 4))
    assert first == again != other


@pytest.mark.prop("tokenadapt", 9)
def test_marks_are_composed_before_a_cut_can_part_them_from_their_letters() -> None:
    made = train_supertokenizer(["e\u0301" * 400], 300, chunk_lengths={(1, 1): 1.0})
    ids = made("e\u0301")["input_ids"]
    assert made.decode(ids) == "é"
    assert len(ids) == 1


@pytest.mark.prop("tokenadapt", 9)
def test_nobody_reads_texts_before_the_lengths_are_checked() -> None:
    def untouched() -> Iterator[str]:
        pytest.fail("work was begun")
        yield ""

    with pytest.raises(LimitError, match=r"1\.1"):
        train_supertokenizer(untouched(), 900, chunk_lengths={(4, 5): 0.6, (6, 7): 0.5})


def test_saved_it_is_an_ordinary_tokenizer(tmp_path: Path) -> None:
    made = train_supertokenizer(TEXTS, 1500)
    made.save_pretrained(tmp_path)
    for loaded in (AutoTokenizer.from_pretrained(tmp_path), Tokenizer.from_file(str(tmp_path / "tokenizer.json"))):
        backend = getattr(loaded, "backend_tokenizer", loaded)
        assert backend.to_str() == made.backend_tokenizer.to_str()
