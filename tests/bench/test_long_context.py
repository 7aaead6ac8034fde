"""The task `long-context`: its prompts, and every method on a small model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tokenmill import bench, catalog, laws
from tokenmill.bench.task import MethodSpec
from tokenmill.bench.tasks.long_context import Options, Task
from tokenmill.errors import LimitError, UnsupportedError

SMALL: dict[str, Any] = {
    "model": "python-target", "data": "python-stdlib", "length": 160, "follow": 4, "limit": 2, "dtype": "float32",
}  # fmt: skip
METHODS = ["oracle:keep=24", "streaming:keep=24", "snapkv:keep=48", "quest:keep=32"]


@pytest.fixture(autouse=True)
def _laws_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """The laws have tests of their own."""
    monkeypatch.setattr(laws, "each", lambda slug: iter(()))


def test_prompts_have_their_length_and_hold_what_is_asked_for() -> None:
    task = Task(Options(**SMALL))
    _, tokenizer = task._loaded
    assert task.kinds() == ["passkey", "pairs", "code"]
    for kind in ("passkey", "pairs"):
        items = task.items(kind)
        assert len(items) == 2
        for item in items:
            ids, answer = item.content
            assert SMALL["length"] - 32 <= len(ids) <= SMALL["length"]
            assert answer in tokenizer.decode(ids)
    assert [i.id for i in task.items("passkey")] == [i.id for i in Task(Options(**SMALL)).items("passkey")]
    assert all(len(item.content) == 164 for item in task.items("code"))
    depths = [tokenizer.decode(i.content[0]).index("pass key is") for i in task.items("passkey")]
    assert depths[0] < depths[1]


def test_every_method_is_measured_beside_the_untouched_model(tmp_path: Path) -> None:
    task = Task(Options(**SMALL))
    others = {"tokenselect": ":keep=8:n_init=4:n_local=8:chunk=8"}
    named = [f"{c.slug}{others.get(c.slug, '')}" for c in catalog.cards("attend") if "llama" in c.works_with]
    found = bench.run(task, [*METHODS, *named], tmp_path)
    assert {(r.status, r.message) for r in found} == {("ok", "")}
    by_kind = {(r.method, r.data["kind"]): r for r in found}
    plain = by_kind["plain", "code"]
    assert 0 < plain.quality["bits"] < 10
    for method in ("oracle", "streaming", "snapkv", "quest", "tokenselect"):
        one = by_kind[method, "code"]
        assert one.cost["density"] < 0.95, method
        assert one.cost["bytes_read"] > 0
        assert abs(one.quality["bits"] - plain.quality["bits"]) < 5
    assert by_kind["plain", "passkey"].quality["same"] == 1.0
    mass = {method: line.quality["mass"] for (method, kind), line in by_kind.items() if kind == "code"}
    assert mass["plain"] == pytest.approx(1.0)
    assert mass["token-sparse-attention"] == pytest.approx(1.0)
    assert mass["oracle"] == max(mass[m] for m in ("oracle", "streaming", "tokenselect"))
    assert all(0.2 < mass[m] < 1.0 for m in ("oracle", "streaming", "snapkv", "quest", "tokenselect", "fasa")), mass


def test_a_model_of_names_has_pairs_of_names_alone(tmp_path: Path) -> None:
    task = Task(Options(model="recall", dtype="float32", length=160, limit=12))
    assert task.kinds() == ["pairs"]
    _, tokenizer = task._loaded
    for item in task.items("pairs"):
        ids, answer = item.content
        assert len(ids) <= 160
        assert tokenizer.convert_tokens_to_ids(answer) == ids[ids.index(ids[-1]) + 1]
    assert task.data("pairs")["split"] == "generated"
    plain, oracle, streaming = bench.run(task, ["plain", "oracle:keep=24", "streaming:keep=24"], tmp_path)
    assert plain.quality["recall"] >= 0.9
    assert oracle.quality["recall"] >= 0.8
    assert streaming.quality["recall"] <= 0.5
    with pytest.raises(LimitError, match="passkey"):
        Task(Options(model="recall", kinds="passkey")).kinds()


def test_kinds_can_be_chosen() -> None:
    assert Task(Options(**SMALL, kinds="code, pairs")).kinds() == ["code", "pairs"]
    with pytest.raises(LimitError, match="poems"):
        Task(Options(**SMALL, kinds="poems")).kinds()


def test_bits_are_those_of_one_forward() -> None:
    task = Task(Options(**SMALL))
    (item, _) = task.items("code")
    model, _ = task._loaded
    bos = model.config.bos_token_id
    ids = torch.tensor([[*([] if bos is None else [bos]), *item.content]])
    with torch.no_grad():
        scores = model(input_ids=ids).logits[0, -5:-1].log_softmax(-1)
    want = -scores.gather(-1, ids[0, -4:, None]).mean() / torch.tensor(2.0).log()
    assert task.subject(MethodSpec("plain"), "code").run(item).output[0] == pytest.approx(float(want), abs=1e-4)


def test_what_cannot_work_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    task = Task(Options(model="nowhere"))
    assert task.check(MethodSpec.parse("quest:keep=0.5")).params == {"keep": 0.5}
    for bad in ("quest:keep=0.0", "streaming:keep=2.0", "nothing"):
        with pytest.raises(LimitError):
            task.check(MethodSpec.parse(bad))
    with pytest.raises(UnsupportedError, match="bench generate"):
        task.check(MethodSpec.parse("token-recycling"))
    with pytest.raises(LimitError, match="length = 3"):
        Options(length=3)
    short = tmp_path / "short.jsonl"
    short.write_text(json.dumps({"text": "too short"}))
    with pytest.raises(LimitError, match="limit = 2"):
        Task(Options(**{**SMALL, "data": str(short)})).items("text")
