"""The task `transplant` on the small Python model that ships, with a tokenizer trained here."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.text.test_tokenadapt import bpe
from tokenmill import bench, laws, models
from tokenmill.bench.task import MethodSpec
from tokenmill.bench.tasks._transplanted import bits_per_byte, train_rows
from tokenmill.bench.tasks.transplant import Options, Task
from tokenmill.errors import LimitError, UnsupportedError


@pytest.fixture(autouse=True)
def _laws_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """The laws have tests of their own."""
    monkeypatch.setattr(laws, "each", lambda slug: iter(()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    place = tmp_path_factory.mktemp("tokenizer")
    bpe(900).save_pretrained(place)
    return str(place)


def options(folder: str, **more: Any) -> Options:
    given = {"model": "python-target", "dtype": "float32", "embedder": "hash", "limit": 2, "chars": 300, **more}
    return Options(**{"targets": folder, "data": "python-stdlib", **given})


def test_bits_are_those_of_every_byte_behind_the_start_token() -> None:
    model, tokenizer = models.load("python-target")
    text = "for x in range(10):\n    print(x)"
    bits, tokens = bits_per_byte(model, tokenizer, text)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokens == len(ids)
    total, context = 0.0, [tokenizer.bos_token_id]
    for i in ids:
        with torch.inference_mode():
            total -= float(model(torch.tensor([context])).logits[0, -1].double().log_softmax(-1)[i]) / math.log(2)
        context.append(i)
    assert bits == pytest.approx(total / len(text.encode()), rel=1e-5)


def test_every_method_is_measured_beside_the_untouched_model(folder: str, tmp_path: Path) -> None:
    names = ["random", "mean", "piece-mean", "focus", "tokenadapt:global_weight=0", "tokenadapt"]
    found = bench.run(Task(options(folder)), names, tmp_path)
    assert [r.status for r in found] == ["ok"] * 7
    bits = {r.method + str(r.params.get("global_weight", "")): r.quality["bits_per_byte"] for r in found}
    assert bits["plain"] == min(bits.values())
    assert bits["random"] > bits["piece-mean"]
    assert bits["tokenadapt"] != bits["tokenadapt0.0"]
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert lines[-1]["data"]["kind"] == f"code, {folder}"
    assert lines[-1]["cost"]["rows_shared"] + lines[-1]["cost"]["rows_hybrid"] > 800


def test_tokenizers_are_trained_on_the_other_files(tmp_path: Path) -> None:
    small = {"targets": "domain,super", "vocab_size": 1024, "train_chars": 60_000, "limit": 1}
    found = bench.run(Task(options("", **small)), ["tokenadapt"], tmp_path)
    assert [(r.status, r.data["kind"]) for r in found if r.method == "tokenadapt"] == [
        ("ok", "code, domain"),
        ("ok", "code, super"),
    ]
    assert all(r.cost["rows_shared"] > 250 for r in found if r.method == "tokenadapt")


def test_items_are_the_same_for_every_target(folder: str) -> None:
    made = Task(options(folder, limit=4))
    (kind,) = made.kinds()
    first = [item.content for item in made.items(kind)]
    assert [item.content for item in Task(options(folder, limit=4)).items(kind)] == first
    assert all(len(text) == 300 for text in first)


def test_what_cannot_work_is_refused_before_anything_is_loaded(folder: str) -> None:
    with pytest.raises(LimitError, match="targets"):
        options("nowhere")
    with pytest.raises(LimitError, match="limit"):
        options(folder, limit=0)
    made = Task(options(folder, limit=10**6))
    with pytest.raises(LimitError, match="held-out"):
        made.items(made.kinds()[0])
    with pytest.raises(LimitError, match="top_k"):
        made.check(MethodSpec.parse("tokenadapt:top_k=0"))
    with pytest.raises(UnsupportedError, match="belongs to the task"):
        made.check(MethodSpec.parse("awrs"))


def test_a_few_steps_change_the_rows_alone_and_help(folder: str) -> None:
    plain, old = models.load("python-target")
    text = "def name(self, value):\n    return self.value\n\n" * 30
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    first = bits_per_byte(plain, old, text)[0]
    losses = train_rows(plain, old, [text, "short"], steps=8, tokens=32, rate=1e-2, seed=0)
    assert len(losses) == 8
    assert losses[-1] < losses[0]
    assert bits_per_byte(plain, old, text)[0] < first
    changed = {name for name, value in plain.state_dict().items() if not torch.equal(value, before[name])}
    assert "model.embed_tokens.weight" in changed
    assert changed <= {"model.embed_tokens.weight", "lm_head.weight"}
    assert all(p.requires_grad for p in plain.parameters())
    with pytest.raises(LimitError, match="at most the tokens of the longest training text"):
        train_rows(plain, old, ["short"], steps=1, tokens=32, rate=1e-2, seed=0)


def test_training_needs_float32_and_is_part_of_the_settings(folder: str, tmp_path: Path) -> None:
    with pytest.raises(LimitError, match="float32 with train_steps"):
        options(folder, dtype="bfloat16", train_steps=3)
    few = options(folder, train_steps=40, train_tokens=32, limit=1)
    found = bench.run(Task(few), ["piece-mean"], tmp_path)
    assert [r.status for r in found] == ["ok"] * 2
    assert found[1].settings["train_steps"] == 40
    none = bench.run(Task(options(folder, limit=1)), ["piece-mean"], tmp_path / "b")
    assert found[1].quality["bits_per_byte"] < none[1].quality["bits_per_byte"]
