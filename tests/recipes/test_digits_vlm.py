"""The recipe of the two vision-language models: a few steps of each, interrupted and gone on with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tokenmill as tm
from recipes import digits_vlm
from tokenmill import corpora


@pytest.mark.parametrize("arch", digits_vlm.ARCHS)
def test_a_few_steps_give_a_model_that_loads_and_answers(arch: str, tmp_path: Path) -> None:
    arguments = ["--arch", arch, "--pictures", "4", "--threads", "1", "--out", str(tmp_path)]
    digits_vlm.main([*arguments, "--steps", "2"])
    folder = tmp_path / digits_vlm.ARCHS[arch].name
    first = json.loads((folder / "card.json").read_text())
    digits_vlm.main([*arguments, "--steps", "3"])
    card = json.loads((folder / "card.json").read_text())
    assert (first["steps"], card["steps"]) == (2, 3)
    assert card["seconds"] >= first["seconds"]
    assert set(card["held_out_accuracy"]) == set(digits_vlm.ARCHS[arch].data.kinds)
    loaded: Any = tm.models.load(str(folder))
    model, processor = loaded
    (picture,) = digits_vlm.ARCHS[arch].data.scenes("test", 1)
    question = picture.questions[0].text
    inputs = processor(processor.prompt(question), [picture.pixels])
    asked = corpora.Picture(picture.id, picture.pixels, picture.questions[:1])
    trained = digits_vlm.dialogue(processor.tokenizer, arch, [asked], 1)
    # What the chat template writes is what training reads, up to the answer.
    assert inputs["input_ids"].tolist() == trained["input_ids"][:, :-2].tolist()
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert out.shape == (1, inputs["input_ids"].shape[1] + 2)


def test_what_a_picture_lacks_leaves_something_of_each_thing() -> None:
    pictures = corpora.digit_scenes("train", 8)
    shares, counts = [], set()
    for seed in range(40):
        kept = digits_vlm.some_tokens(pictures, torch.Generator().manual_seed(seed))
        counts.add(kept.shape[1])
        assert (kept.diff(dim=1) > 0).all()
        for row, picture in zip(kept, pictures, strict=True):
            (digits, _) = digits_vlm.patch_labels("llava", [picture])
            left = digits[0, row]
            assert {thing.digit for thing in picture.things} == set(left[left < 10].tolist())
            shares.append(float((left < 10).float().mean()))
    assert min(counts) < 16 < 48 < max(counts) <= 64
    assert min(shares) < 0.1
    assert max(shares) > 0.9


def test_the_last_stage_starts_from_a_trained_model_and_leaves_its_tower(tmp_path: Path) -> None:
    arguments = ["--arch", "llava", "--last", "digits-llava", "--pictures", "2", "--threads", "1", "--steps", "2"]
    digits_vlm.main([*arguments, "--out", str(tmp_path)])
    before: Any = tm.models.load("digits-llava")[0]
    after: Any = tm.models.load(str(tmp_path / "digits-llava"))[0]
    changed = {
        name for name, weight in after.state_dict().items() if not torch.equal(weight, before.state_dict()[name])
    }
    assert changed
    assert not any("vision_tower" in name or "projector" in name for name in changed)


def test_the_stages_bring_in_questions_one_after_another() -> None:
    for data in (digits_vlm.SCENES, digits_vlm.PAGES):
        assert digits_vlm.kinds_at(data, 0.0) == ()
        assert digits_vlm.kinds_at(data, 0.2) == data.first
        assert digits_vlm.kinds_at(data, 0.9) == data.kinds
        few, some, many = data.most
        assert [digits_vlm.most_at(data, x) for x in (0.05, 0.15, 0.25, 0.5)] == [many, few, some, many]


def test_labels_stand_on_answers_and_hints_on_the_named_word() -> None:
    tokenizer: Any = digits_vlm.build_tokenizer("llava")
    pictures = corpora.digit_scenes("train", 3)
    rows = digits_vlm.dialogue(tokenizer, "llava", pictures, 20)
    for row, picture in enumerate(pictures):
        marked = rows["labels"][row]
        said = tokenizer.decode(marked[marked != -100])
        assert said == " ".join(f"{q.answer} </s>" for q in picture.questions)
        hints = (rows["early"][row] != -100).nonzero()[:, 0]
        named = [q for q in picture.questions if q.kind != "count"]
        assert len(hints) == len(named)
        for at, question in zip(hints.tolist(), named, strict=True):
            assert tokenizer.decode(rows["input_ids"][row, at]) in question.text
            assert tokenizer.decode(rows["early"][row, at]) == question.answer


def test_patches_are_named_after_what_covers_them() -> None:
    (picture,) = corpora.digit_scenes("train", 1)
    digits, colours = digits_vlm.patch_labels("llava", [picture])
    assert int((digits < 10).sum()) == 4 * len(picture.things)
    grid = digits.view(8, 8)
    for thing in picture.things:
        assert (grid[2 * thing.row : 2 * thing.row + 2, 2 * thing.column : 2 * thing.column + 2] == thing.digit).all()
    assert ((digits == 10) == (colours == 6)).all()
