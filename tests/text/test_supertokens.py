"""Supertokens: chunks of random length, and BPE over them."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from tests.text.vocabularies import corpus
from tokenmill import corpora
from tokenmill.errors import LimitError
from tokenmill.text import _bpe_training as bpe
from tokenmill.text._supertokens import CHUNK_LENGTHS, random_chunks, train_supertokenizer

TEXTS = [r.text[:5000] for r in corpora.load("python-reference").split("train")][:30]


def model(tokenizer: Any) -> Any:
    return json.loads(tokenizer.backend_tokenizer.to_str())["model"]


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


def test_shares_are_checked() -> None:
    assert sum(CHUNK_LENGTHS.values()) == pytest.approx(1)
    for bad in ({(4, 5): 1.1}, {(4, 5): -1.0, (6, 7): 2.0}, {(0, 3): 1.0}, {(5, 4): 1.0}, {}):
        with pytest.raises(LimitError, match="chunk_lengths"):
            train_supertokenizer(TEXTS, 1000, chunk_lengths=bad)
    with pytest.raises(LimitError, match="vocab_size"):
        train_supertokenizer(TEXTS, 100)


def test_tokens_cross_spaces_and_texts_come_back() -> None:
    made = train_supertokenizer(TEXTS, 2000)
    assert any(" " in made.decode([i])[1:].strip() for i in range(257, len(made)))
    for text in corpus(4, 60):
        clean = normalizers.NFC().normalize_str(text)
        if "<|endoftext|>" not in text:
            assert made.decode(made.encode(text, add_special_tokens=False)) == clean
    assert max(len(token) for token in model(made)["vocab"] if token != "<|endoftext|>") <= 30
    assert model(made) == model(train_supertokenizer(TEXTS, 2000))
    assert model(made) != model(train_supertokenizer(TEXTS, 2000, seed=1))


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


def test_words_as_chunks_are_ordinary_bpe() -> None:
    cut = pre_tokenizers.Split(
        Regex(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"), "isolated"
    )
    words = [[word for word, _ in cut.pre_tokenize_str(text)] for text in TEXTS]
    assert bpe.train_bpe(words, 500) == bpe.train_bpe(TEXTS, 500) == bpe.train_bpe(words, 500, regex=False)
