"""Lengths in tokens: counted on the whole haystack, never above what was asked, and profiles of tokenizers."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.probe.solvers import characters
from tokenmill import models
from tokenmill.errors import LimitError
from tokenmill.probe import count_tokens, haystack, token_profile
from tokenmill.probe._haystack import pairs
from tokenmill.probe._lengths import pairs_within
from tokenmill.probe.needle_threading import TASKS, generate


@cache
def target() -> Any:
    return models.tokenizer("python-target")


class Slow:
    """A tokenizer without a fast backend: four characters a token."""

    is_fast = False

    def encode(self, text: str) -> list[int]:
        return [0] * -(-len(text) // 4)


@pytest.mark.prop("needle-threading", 8)
def test_tokens_are_counted_on_the_whole_haystack() -> None:
    """Cut at the boundaries of pairs, a haystack has at least as many tokens, since no merge crosses a cut."""
    for n in (2, 10, 60):
        pieces = [f'"{key}": "{value}", ' for key, value in pairs(n)]
        pieces[0], pieces[-1] = "{" + pieces[0], pieces[-1].removesuffix(", ") + "}"
        assert "".join(pieces) == haystack(n)
        apart = sum(count_tokens(target(), piece) for piece in pieces)
        assert apart >= count_tokens(target(), haystack(n)) - (n - 1)


@pytest.mark.prop("needle-threading", 8)
@given(target_tokens=st.integers(75, 3000), seed=st.integers(0, 50))
def test_a_length_in_tokens_gives_the_most_pairs_that_stay_within(target_tokens: int, seed: int) -> None:
    example = generate("single", n_tokens=target_tokens, tokenizer=target(), seed=seed)
    n = example.meta["num_kv_pairs"]
    assert count_tokens(target(), example.haystack) <= target_tokens
    assert count_tokens(target(), haystack(n + 1, seed)) > target_tokens


@pytest.mark.prop("needle-threading", 8)
@pytest.mark.parametrize("task", TASKS)
def test_no_task_goes_above_the_length_that_was_asked(task: str) -> None:
    for size in (1500, 1501, 1777):
        inside = generate(task, n_tokens=size, tokenizer=target(), seed=size)
        assert count_tokens(target(), inside.haystack) <= size
        assert len(generate(task, n_chars=size, seed=size).haystack) <= size


def test_a_tokenizer_of_characters_counts_characters() -> None:
    assert count_tokens(characters(), haystack(7)) == 560
    assert generate("single", n_tokens=560, tokenizer=characters()).meta["num_kv_pairs"] == 7
    assert generate("single", n_tokens=559, tokenizer=characters()).meta["num_kv_pairs"] == 6


@given(rate=st.integers(1, 90), limit=st.integers(0, 5000))
def test_the_search_finds_the_last_number_within(rate: int, limit: int) -> None:
    assert pairs_within(lambda n: rate * n, limit) == limit // rate


def test_a_slow_tokenizer_works_and_warns_on_a_long_text() -> None:
    assert count_tokens(Slow(), haystack(2)) == 40
    with pytest.warns(UserWarning, match="not fast"):
        count_tokens(Slow(), "a" * 1_000_001)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        count_tokens(characters(), "a" * 1_000_001)


def test_less_than_a_pair_is_refused_with_the_tokens_of_one() -> None:
    one = count_tokens(target(), haystack(1))
    with pytest.raises(LimitError, match=f"at least {one}"):
        generate("single", n_tokens=one - 1, tokenizer=target())
    assert generate("single", n_tokens=one, tokenizer=target()).meta["num_kv_pairs"] == 1


def test_profiles_say_how_far_tokenizers_are_apart() -> None:
    prose = "Two tokenizers may agree on prose, and be far apart on digits. " * 20
    found = token_profile({"characters": characters(), "target": target()}, {"prose": prose}, n_tokens=1000)
    assert [(p.text, p.tokenizer) for p in found] == [
        ("haystack", "characters"), ("haystack", "target"), ("prose", "characters"), ("prose", "target"),
    ]  # fmt: skip
    own, other = found[:2]
    assert (own.tokens_per_pair, own.chars_per_token, own.context_chars) == (80.0, 1.0, 960)
    assert other.tokens == count_tokens(target(), haystack(200))
    assert other.tokens_per_pair == other.tokens / 200
    assert count_tokens(target(), haystack(other.context_chars // 80)) <= 1000
    assert found[3].tokens_per_pair is None
    assert found[3].context_chars == int(1000 * len(prose) / found[3].tokens)
    for bad in ({}, {"texts": {"empty": ""}}, {"texts": {"haystack": "a"}}, {"n_tokens": 10}):
        with pytest.raises(LimitError):
            token_profile({"target": target()} if bad else {}, **bad)
