"""The recipe of the hypernetworks, on few texts and for few steps."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.text.test_dynamic_tokenization_models import decoder, drawn, minilm
from tokenmill.text import DynamicBPE, DynamicInputs, HyperNetwork


@pytest.fixture
def recipe(load_recipe: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> Any:
    found: Any = load_recipe("hypernetwork")
    few = {"python-reference": ["Überraschungsgäste kommen übermorgen zu uns nach Hause", "tokenisers tokenise"] * 16}
    monkeypatch.setattr(found, "texts", lambda split, chars: few)
    monkeypatch.setattr(found, "SHAPES", {found.ENCODER: {"hidden": 32, "layers": 1, "heads": 2, "ff": 64}})
    monkeypatch.setattr(found, "BATCH", {True: 8, False: 2})
    return found


def test_it_learns_saves_and_tells(recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["x", "--steps", "30", "--rate", "3e-3", "--out", str(tmp_path)])
    recipe.main()
    card = json.loads((tmp_path / "card.json").read_text())
    assert card["steps"] == 30
    level = card["held_out"]["python-reference, pretoken, 1"]
    assert level["cut"] > 0.2
    assert level["network"] > level["mean"] + 0.005
    model, tokenizer = minilm()
    assert isinstance(HyperNetwork.from_pretrained(tmp_path, model, tokenizer), HyperNetwork)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "card.json",
        "hypernetwork.json",
        "hypernetwork.safetensors",
    ]


def test_teachers_states_are_means_over_pieces_and_decoders_have_a_loss(recipe: Any) -> None:
    model, tokenizer = decoder()
    bpe = DynamicBPE(tokenizer, target_reduction=0.7, per_example=True)
    batch = bpe.merge(["for name in os.listdir(path):\n    print(name)", "import os"])
    longest = max(map(len, batch.base_ids))
    hidden = torch.arange(2 * longest, dtype=torch.float32).reshape(2, longest, 1)
    for left in (False, True):
        found = recipe.by_token(hidden, batch, left)[:, 0].tolist()
        wanted = []
        for row, tokens in enumerate(batch.pieces):
            at = longest - len(batch.base_ids[row]) if left else 0
            for token in tokens:
                places = hidden[row, at : at + len(token), 0]
                wanted.append(float(places.mean()))
                at += len(token)
        assert found == pytest.approx(wanted)
    net = drawn(model, tokenizer)
    inputs = DynamicInputs(model, net)
    loss = recipe.decoder_loss(model, tokenizer, inputs, net, batch)
    loss.backward()
    assert loss > 0
    assert net.leave.weight.grad is not None
    none = DynamicBPE(tokenizer, max_merges=0).merge(["import os"])
    assert float(recipe.decoder_loss(model, tokenizer, inputs, net, none)) == pytest.approx(0.0, abs=1e-5)
