from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from tokenmill import corpora, models


@pytest.fixture(scope="module")
def recipe(load_recipe: Callable[[str], ModuleType]) -> ModuleType:
    return load_recipe("python_pair")


def test_two_steps_leave_two_models_that_load(
    recipe: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe.main(["--steps", "2", "--files", "2", "--threads", "1", "--out", str(tmp_path)])
    assert "python-draft: trained in" in capsys.readouterr().out
    sizes = []
    for name in ("python-target", "python-draft"):
        model, tokenizer = models.load(str(tmp_path / name))
        ids = tokenizer("import os\n")["input_ids"]
        assert ids[0] == model.config.eos_token_id == tokenizer.eos_token_id == 0
        assert tokenizer.decode(ids[1:]) == "import os\n"
        card = json.loads((tmp_path / name / "card.json").read_text())
        assert card["steps"] == 2
        assert card["data"]["sha256"] == corpora.load("python-stdlib").sha256
        assert 1 < card["held_out_bits_per_byte"] < 10
        sizes.append(model.num_parameters())
    assert sizes[0] >= 10 * sizes[1]
    tokenizers = [(tmp_path / name / "tokenizer.json").read_bytes() for name in ("python-target", "python-draft")]
    assert tokenizers[0] == tokenizers[1]


def test_batches_are_windows_of_the_files_and_follow_the_seed(recipe: ModuleType) -> None:
    files = [list(range(start, start + 3_000)) for start in (0, 10_000, 20_000)]
    first, again, other = (torch.cat(list(islice(recipe.batches(files, seed), 2))) for seed in (1, 1, 2))
    assert first.shape[1] == recipe.CONTEXT + 1
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    steps = first.diff(dim=1)
    assert bool(((steps == 1).sum(dim=1) >= recipe.CONTEXT - 1).all())


def test_bits_per_byte_of_a_model_that_knows_nothing_is_the_logarithm_of_the_vocabulary(recipe: ModuleType) -> None:
    seen = []

    def uniform(input_ids: torch.Tensor) -> SimpleNamespace:
        seen.append(input_ids.shape[1])
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 64))

    def by_byte(text: str, verbose: bool) -> dict[str, list[int]]:
        return {"input_ids": [0, *(byte % 64 for byte in text.encode())]}

    texts = ["x" * 1_300, "é" * 10]
    assert recipe.bits_per_byte(uniform, by_byte, texts) == pytest.approx(math.log2(64))
    assert sum(seen) == 1_320  # every byte once


def test_the_learning_rate_rises_then_falls(recipe: ModuleType) -> None:
    rates = [recipe.rate_at(done / 100, 1.0) for done in range(101)]
    assert max(rates) == rates[2] == 1.0
    assert rates[0] > 0
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[-1] == pytest.approx(0.02)
