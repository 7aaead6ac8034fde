"""The recipe of a scorer and of a search, for a step each, on a model that was trained for one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import tokenmill as tm
from recipes import digits_vlm, prune_parts
from tokenmill.prune.vflowopt import SearchResult


@pytest.mark.parametrize("arch", digits_vlm.ARCHS)
def test_parts_are_written_as_the_bench_reads_them(arch: str, tmp_path: Path) -> None:
    small = ["--threads", "1", "--out", str(tmp_path)]
    digits_vlm.main(["--arch", arch, "--pictures", "2", "--steps", "1", *small])
    name = digits_vlm.ARCHS[arch].name
    parts = ["--steps", "2", "--calls", "2", "--keeps", "0.25"]
    prune_parts.main(["--model", str(tmp_path / name), *parts, *small])
    scorer = tm.prune.VisionSelectorScorer.load(tmp_path / f"{name}-scorer")
    assert scorer.in_features == 128
    assert json.loads((tmp_path / f"{name}-scorer" / "card.json").read_text())["steps"] == 2
    found = SearchResult.load(tmp_path / f"{name}-vflowopt" / "keep-0.25.json")
    assert found.keep == 0.25
    assert len(found.trials) <= 2
    assert -1 <= found.value <= 1


def test_labels_stand_on_the_answers() -> None:
    tokenizer: Any = digits_vlm.build_tokenizer("llava")
    config = digits_vlm.build_model("llava", len(tokenizer)).config
    from tokenmill.models._vision import PictureProcessor

    processor = PictureProcessor(digits_vlm.build_image_processor("llava"), tokenizer, config)
    batch = next(prune_parts.batches(processor, 0))
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        marked = labels != -100
        assert (ids[marked] == labels[marked]).all()
        words = tokenizer.decode(labels[marked]).split()
        assert words[-1] == "</s>"
        assert len(words) == 2
