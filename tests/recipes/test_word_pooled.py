"""The recipe of a word-pooled model, for seconds."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tokenmill.text import LearnYourTokens, WordPooledLM


def test_it_learns_saves_and_tells(
    load_recipe: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe: Any = load_recipe("word_pooled")
    monkeypatch.setattr(recipe, "pieces", lambda split, most: ["def name(self):\n    return self\n"] * 8)
    monkeypatch.setattr(recipe, "METHOD", LearnYourTokens(num_prefix=1, enc_layers=1, dec_layers=1, dropout=0.0))
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    monkeypatch.setattr(recipe, "BACKBONE", small)
    monkeypatch.setattr(sys, "argv", ["x", "--minutes", "0.05", "--out", str(tmp_path)])
    recipe.main()
    card = json.loads((tmp_path / "card.json").read_text())
    assert card["steps"] > 10
    assert card["held_out_bits_per_byte"] < 6
    assert "--minutes 0.05" in card["command"]
    made = WordPooledLM.from_pretrained(tmp_path).eval()
    assert made.score(["def name"])[0].bits_per_byte < 9
    assert not (tmp_path / recipe.STATE).exists()


def test_pieces_are_whole_lines_of_both_splits(load_recipe: Callable[[str], ModuleType]) -> None:
    recipe: Any = load_recipe("word_pooled")
    train, test = recipe.pieces("train", 50_000), recipe.pieces("test", 50_000)
    for found in (train, test):
        assert 40 < len(found) < 400
        assert all(len(part.encode()) <= recipe.CONTEXT for part in found)
        assert all(part.endswith("\n") for part in found)
    assert set(train).isdisjoint(test)
