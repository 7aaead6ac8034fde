"""StochasTok in a data collator, alone, with workers, and under transformers' Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from tests.text.stochastok_toys import TOY
from tokenmill import models
from tokenmill.errors import LimitError
from tokenmill.text import Anneal, ExpansionTable, StochasTok, StochasTokCollator

TABLE = ExpansionTable.from_list(TOY)
Features = list[dict[str, Any]]


def pad(features: Features) -> dict[str, torch.Tensor]:
    """Pad on the right; labels of padding are ignored."""
    longest = max(len(f["input_ids"]) for f in features)
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {k: torch.tensor([f[k] + [v] * (longest - len(f[k])) for f in features]) for k, v in fill.items()}


def keep(features: Features) -> Features:
    return features


def examples(n: int, *, numbered: bool = True) -> Features:
    rows = [[(i + j) % 3 + 2 for j in range(5 + i)] for i in range(n)]
    return [{"input_ids": r, "labels": r} | ({"index": i} if numbered else {}) for i, r in enumerate(rows)]


def test_labels_follow_and_the_index_goes() -> None:
    collator = StochasTok(TABLE, p=0.5).collator(pad)
    batch = collator(examples(4))
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    seen = batch["attention_mask"] == 1
    assert torch.equal(batch["labels"][seen], batch["input_ids"][seen])
    assert bool((batch["labels"][~seen] == -100).all())
    assert batch["input_ids"].shape[1] > 8
    assert StochasTokCollator(StochasTok(TABLE, p=1.0), pad, max_length=6)(examples(4))["labels"].shape == (4, 6)


@pytest.mark.prop("stochastok", 6)
@pytest.mark.parametrize("numbered", [True, False])
def test_workers_and_order_make_no_difference_and_epochs_do(numbered: bool) -> None:
    data: Any = examples(12, numbered=numbered)
    collator = StochasTokCollator(StochasTok(TABLE, p=1.0), keep)
    one = [f["input_ids"] for f in collator(data)]
    turned = [f["input_ids"] for f in collator(data[::-1])]
    assert turned[::-1] == one
    found = {}
    for epoch in (0, 1):
        collator.set_epoch(epoch)
        for workers in (0, 2):
            loader = DataLoader(data, batch_size=3, num_workers=workers, collate_fn=collator)
            found[epoch, workers] = [f["input_ids"] for batch in loader for f in batch]
    assert found[0, 0] == found[0, 2] == one
    assert found[1, 0] == found[1, 2] != one


def test_workers_that_stay_hear_of_a_new_epoch() -> None:
    data: Any = examples(4)
    collator = StochasTokCollator(StochasTok(TABLE, p=1.0), keep)
    loader = DataLoader(data, batch_size=2, num_workers=1, collate_fn=collator, persistent_workers=True)
    first = [f["input_ids"] for batch in loader for f in batch]
    collator.set_epoch(1)
    assert [f["input_ids"] for batch in loader for f in batch] != first


def test_p_falls_at_the_end() -> None:
    schedule = Anneal(last=0.2)
    assert [round(schedule(x), 6) for x in (0.0, 0.8, 0.9, 1.0)] == [1.0, 1.0, 0.5, 0.0]
    collator = StochasTokCollator(StochasTok(TABLE, p=1.0), keep, schedule=schedule)
    data = examples(6)
    lengths = []
    for progress in (0.0, 0.9, 1.0):
        collator.set_progress(progress)
        lengths.append(sum(len(f["input_ids"]) for f in collator(data)))
    assert lengths[0] > lengths[1] > lengths[2] == sum(len(f["input_ids"]) for f in data)
    for last in (0.0, 1.5):
        with pytest.raises(LimitError, match="last"):
            Anneal(last)


def test_a_trainer_sees_other_segmentations_each_epoch(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    seen: list[tuple[int, float, list[list[int]]]] = []

    def watch(features: Features) -> dict[str, torch.Tensor]:
        seen.append((collator.epoch, collator.progress, [f["input_ids"] for f in features]))
        return pad(features)

    collator = StochasTokCollator(StochasTok(TABLE, p=1.0), watch, max_length=16)
    model = models.tiny("llama", vocab=8)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), num_train_epochs=3, per_device_train_batch_size=4, report_to=[], save_strategy="no",
        use_cpu=True, logging_strategy="no", disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    data: Any = examples(8)
    trainer = Trainer(model, arguments, data_collator=collator, train_dataset=data, callbacks=[collator.callback()])
    before = model.lm_head.weight.detach().clone()  # type: ignore[union-attr]
    loss = trainer.train().training_loss
    assert loss > 0
    assert not torch.equal(before, model.lm_head.weight)  # type: ignore[union-attr]
    epochs = [sorted(ids for epoch, _, rows in seen if epoch == e for ids in rows) for e in range(3)]
    assert [len(e) for e in epochs] == [8, 8, 8]
    assert epochs[0] != epochs[1] != epochs[2]
    texts = [sorted(b"".join(TOY[i] or b"" for i in ids)[:10] for ids in e) for e in epochs]
    assert texts[0] == texts[1] == texts[2]
    assert max(progress for _, progress, _ in seen) > 0.5


def test_bad_examples() -> None:
    collator = StochasTokCollator(StochasTok(TABLE), keep)
    with pytest.raises(LimitError, match="example 0"):
        collator([{"labels": [1]}])
    with pytest.raises(LimitError, match="example 1"):
        collator([{"input_ids": [1]}, {"input_ids": [1], "labels": [1]}])
    with pytest.raises(LimitError, match="max_length"):
        StochasTokCollator(StochasTok(TABLE), keep, max_length=0)
    assert collator([]) == []
