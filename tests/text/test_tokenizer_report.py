"""The report of tokenizers: counts, reductions, and what errors in a text change."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import numpy as np
import pytest

from tests.text.vocabularies import cl100k
from tokenmill.errors import LimitError
from tokenmill.text import CustomTokens, TokenizerReport, train_char_bpe, train_domain_bpe
from tokenmill.text._tokenizer_report import boundary_stability, edit_distance, reduced, with_noise

LINES = [f"The quick brown fox number {n} jumps over the lazy dogs of the house.\n" * 3 for n in range(20)]


@cache
def bpe() -> Any:
    return train_domain_bpe(LINES, 400, custom_tokens=CustomTokens.only(), short="fill")


@cache
def raw() -> Any:
    return train_char_bpe(LINES, 269, 1, pad_to_power_of_two=False)


@pytest.mark.prop("kl3m-tokenizers", 8)
def test_bytes_change_one_by_one() -> None:
    found = boundary_stability(raw(), LINES, 0.1)
    assert (found["jaccard"], found["edits_per_error"]) == (1.0, 1.0)
    assert (found["equal_count"], found["length_ratio"]) == (1.0, 1.0)
    assert found["errors"] > 50
    worse = boundary_stability(bpe(), LINES, 0.1)
    assert worse["jaccard"] < 1 < worse["edits_per_error"]
    assert edit_distance([1, 2, 3], [1, 2, 3]) == 0


def test_edit_distance_against_the_table() -> None:
    rng = random.Random(0)
    for _ in range(200):
        a, b = ([rng.randrange(4) for _ in range(rng.randrange(9))] for _ in range(2))
        table = {(i, 0): i for i in range(10)} | {(0, j): j for j in range(10)}
        for i, x in enumerate(a, 1):
            for j, y in enumerate(b, 1):
                table[i, j] = min(table[i - 1, j] + 1, table[i, j - 1] + 1, table[i - 1, j - 1] + (x != y))
        assert edit_distance(a, b) == table[len(a), len(b)]


def test_noise_keeps_places() -> None:
    noisy, errors = with_noise(LINES[0], 0.5, np.random.default_rng(0))
    assert len(noisy.encode()) == len(LINES[0].encode())
    assert errors == sum(a != b for a, b in zip(noisy, LINES[0], strict=True)) > 10
    assert noisy == with_noise(LINES[0], 0.5, np.random.default_rng(0))[0]


@pytest.mark.prop("kl3m-tokenizers", 7)
def test_rows() -> None:
    report = TokenizerReport({"bytes": raw(), "bpe": bpe(), "cl100k": cl100k()}, {"a": LINES}, terms=("quick", "§"))
    made = report.to_dict()
    rows = {row["tokenizer"]: row for row in made["rows"]}
    for row in rows.values():
        assert row["tokens_per_char"] * row["characters"] == pytest.approx(row["tokens"])
        assert row["bytes_per_token"] * row["tokens"] == pytest.approx(row["bytes"])
        low, high = row["reduction_interval"]
        assert low - 1e-9 <= row["reduction"] <= high + 1e-9
    assert rows["bytes"]["tokens"] == rows["bytes"]["bytes"]
    assert rows["bytes"]["reduction"] == 0
    expected = (rows["bytes"]["tokens"] - rows["bpe"]["tokens"]) / rows["bytes"]["tokens"]
    assert rows["bpe"]["reduction"] == pytest.approx(expected)
    assert made["terms"]["bytes"] == {"quick": 5, "§": 2}
    assert made["lengths"]["bytes"][1] == 1.0
    text = report.to_markdown()
    assert "| a | bpe | 20 |" in text
    assert "rate 0.03, seed 0" in text


def test_the_interval_covers_what_it_should() -> None:
    value, (low, high) = reduced(np.full(30, 10), np.full(30, 8), 0)
    assert (value, low, high) == (pytest.approx(0.2), pytest.approx(0.2), pytest.approx(0.2))
    value, (low, high) = reduced(np.full(40, 10), np.array([5, 11] * 20), 0)
    assert low < value < high


def test_an_object_with_encode_is_enough() -> None:
    class Words:
        def encode(self, text: str) -> list[str]:
            return text.split()

    made = TokenizerReport({"words": Words()}, {"a": ["one two"]}).to_dict()
    assert made["rows"][0]["tokens"] == 2
    assert (made["stability"], made["lengths"]) == ([], {})


def test_bad_reports() -> None:
    for bad in (
        lambda: TokenizerReport({}, {"a": LINES}),
        lambda: TokenizerReport({"a": raw()}, {"a": [""]}),
        lambda: TokenizerReport({"a": raw()}, {"a": LINES}, baseline="b"),
        lambda: TokenizerReport({"a": raw()}, {"a": LINES}, noise_rate=2),
        lambda: boundary_stability(raw(), ["..."]),
    ):
        with pytest.raises(LimitError):
            bad()


def test_plots_show_every_tokenizer_and_every_kind_of_text() -> None:
    made = TokenizerReport({"short": raw(), "long": bpe()}, {"foxes": LINES, "hens": ["hens lay eggs " * 40]})
    drawn = made.plots()
    assert set(drawn) == {"tokens-per-character", "token-lengths", "boundary-stability"}
    for svg in drawn.values():
        assert svg.startswith("<svg")
        assert ">short</text>" in svg
        assert ">long</text>" in svg
    assert ">hens</text>" in drawn["tokens-per-character"]
    bars = [drawn["tokens-per-character"].count('aria-roledescription="bar"')]
    assert bars == [4]
    calm = TokenizerReport({"long": bpe()}, {"foxes": LINES}, noise_rate=0.0)
    assert "boundary-stability" not in calm.plots()
