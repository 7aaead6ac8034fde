"""The recipe of a word-pooled model, for few steps."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tokenmill.text import LearnYourTokens, WordPooledLM


@pytest.fixture
def recipe(load_recipe: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The recipe with a small model and one short text."""
    recipe: Any = load_recipe("word_pooled")
    monkeypatch.setattr(recipe, "pieces", lambda split, most: ["def name(self):\n    return self\n"] * 8)
    monkeypatch.setattr(recipe, "METHOD", LearnYourTokens(num_prefix=1, enc_layers=1, dec_layers=1, dropout=0.0))
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    monkeypatch.setattr(recipe, "BACKBONE", small)
    return recipe


def test_it_learns_saves_and_tells(recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["x", "--steps", "200", "--out", str(tmp_path)])
    recipe.main()
    card = json.loads((tmp_path / "card.json").read_text())
    assert card["steps"] == 200
    assert card["held_out_bits_per_byte"] < 3
    assert "--steps 200" in card["command"]
    made = WordPooledLM.from_pretrained(tmp_path).eval()
    assert made.score(["def name"])[0].bits_per_byte < 6
    assert not (tmp_path / recipe.STATE).exists()


def test_an_interrupted_training_goes_on(recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "SAVE_SECONDS", -1)  # behind every step
    pad, calls = recipe.padded_words, []

    def padded(words: Any) -> Any:
        calls.append(len(words))
        if len(calls) == 8:
            raise KeyboardInterrupt
        return pad(words)

    monkeypatch.setattr(recipe, "padded_words", padded)
    monkeypatch.setattr(sys, "argv", ["x", "--steps", "12", "--out", str(tmp_path)])
    with pytest.raises(KeyboardInterrupt):
        recipe.main()
    assert (tmp_path / recipe.STATE).exists()
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--resume"])
    recipe.main()
    assert len(calls) == 8 + 12 - 7
    assert json.loads((tmp_path / "card.json").read_text())["steps"] == 12


def test_pieces_are_whole_lines_of_both_splits(load_recipe: Callable[[str], ModuleType]) -> None:
    recipe: Any = load_recipe("word_pooled")
    train, test = recipe.pieces("train", 50_000), recipe.pieces("test", 50_000)
    for found in (train, test):
        assert 40 < len(found) < 400
        assert all(len(part.encode()) <= recipe.CONTEXT for part in found)
        assert all(part.endswith("\n") for part in found)
    assert set(train).isdisjoint(test)
