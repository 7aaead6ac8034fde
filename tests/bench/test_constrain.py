"""The task `constrain`: prompts, methods and their counts, on the small Python model that ships."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tokenmill import bench, laws, models
from tokenmill.bench.task import Item, MethodSpec
from tokenmill.bench.tasks import _constraining as at_work
from tokenmill.bench.tasks import _tasks_under_constraints as asked
from tokenmill.bench.tasks.constrain import Options, Task, _line_ends
from tokenmill.errors import LimitError, UnsupportedError

SMALL = {"model": "python-target", "dtype": "float32", "packed": False, "limit": 1, "new_tokens": 6, "mask_tokens": 1}


@pytest.fixture(autouse=True)
def _laws_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """The laws have tests of their own."""
    monkeypatch.setattr(laws, "each", lambda slug: iter(()))


def task(**options: Any) -> Task:
    return Task(Options(**{**SMALL, **options}))


@pytest.mark.parametrize("kind", asked.KINDS)
def test_the_right_answer_satisfies_the_constraint(kind: str) -> None:
    items = asked.made(kind, 8, 3)
    assert len({item.id for item in items}) == 8
    assert [i.id for i in asked.made(kind, 8, 3)] == [i.id for i in items] != [i.id for i in asked.made(kind, 8, 4)]
    for item in items:
        constraint = asked.build(*item.content.constraint)
        if item.content.answer is None:
            assert item.content.open
            continue
        assert constraint.complete(item.content.answer.encode()) == 0
        assert item.content.right(item.content.answer)
        assert not item.content.right("nothing")
        assert constraint.prefix(b"\n") != 0, "a line break ends the line and is no part of it"


def test_every_method_runs(tmp_path: Path) -> None:
    made = task(data="numbers,lipogram")
    lines = bench.run(made, ["mask", "llguidance", "lcd", "rerank:samples=2", "awrs:n_particles=3"], tmp_path)
    for line in lines:
        if line.method == "llguidance" and line.data["kind"] != "numbers":
            assert line.status == "failed"
            assert "no masks" in line.message
            continue
        assert line.status == "ok", line.message
        if line.method in ("lcd", "awrs") and line.data["kind"] == "lipogram":
            assert line.quality["valid"] == 1.0
        if line.method == "mask":
            assert not line.quality, "the beginning of a line says nothing"
    found = {line.method: line for line in lines if line.data["kind"] == "numbers"}
    assert found["mask"].cost["checks_per_token"] == 2048
    assert found["awrs"].cost["checks_per_token"] < 200
    for line in found.values():
        assert 0 <= line.cost["constraint_ms"] <= line.cost["own_ms"]
        assert (line.cost["constraint_ms"] == 0) == (line.method == "plain")
        assert line.cost["constraint_ms_per_step"] * line.cost["tokens"] == pytest.approx(line.cost["constraint_ms"])
    assert found["llguidance"].cost["checks"] == 0


def test_masks_and_particles_have_one_law() -> None:
    """The first token under the naive mask, under llguidance and under one particle: the same distribution."""
    model, tokenizer = models.load("python-target", dtype="float32")
    asks = asked.Asked("x = ", ("regex", "[0-9]{1,3}"))
    setting = at_work.Setting(model, tokenizer, _line_ends(tokenizer), 1, 0)
    naive, guided = (at_work.Masked(setting, engine) for engine in ("naive", "llguidance"))
    constraint = asked.build(*asks.constraint)
    ids = torch.tensor([tokenizer(asks.prompt)["input_ids"]])
    scores = torch.randn(1, 2048, generator=torch.Generator().manual_seed(0))
    one = at_work._Naive(naive, constraint)(ids, scores)
    other = guided._guided(Item("x", "x", asks))(ids, scores)
    torch.testing.assert_close(one, other)
    assert 10 < int((one > -torch.inf).sum()) < 2000


def test_a_users_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    lines = [
        {"prompt": "x = ", "regex": "[0-9]+", "answer": 5, "kind": "number", "id": "a"},
        {"prompt": "y = ", "json_schema": {"type": "integer"}},
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    made = task(data=str(path))
    assert made.kinds() == ["number", "json-schema"]
    assert made.items("number")[0].content.right(" 5")
    assert made.data("number")["name"] == "mine.jsonl"
    path.write_text('{"prompt": "x", "regex": "a", "grammar": "b"}')
    with pytest.raises(LimitError, match=r"mine\.jsonl:1"):
        task(data=str(path)).kinds()
    path.write_text('{"regex": "a"}')
    with pytest.raises(LimitError, match="prompt"):
        task(data=str(path)).kinds()
    with pytest.raises(LimitError, match=r"no\.jsonl"):
        task(data="no.jsonl").kinds()


def test_bad_requests() -> None:
    made = task()
    for text, words in (
        ("token-recycling", "task generate"),
        ("awrs:n_particles=0", "n_particles"),
        ("awrs:method=best", "method"),
        ("rerank:samples=0", "samples"),
        ("nothing", "nothing"),
    ):
        with pytest.raises((LimitError, UnsupportedError), match=words):
            made.check(MethodSpec.parse(text))
    with pytest.raises(LimitError, match="mask_tokens"):
        Options(mask_tokens=0)
    for source in ("no_such_module:f", "json:no_such_name", "json", "json:__name__"):
        with pytest.raises(LimitError, match="predicate"):
            asked.build("predicate", source)
    with pytest.raises(LimitError, match="dates"):
        task(data="dates").kinds()
    with pytest.raises(LimitError, match="at most"):
        asked.made("lipogram", 50, 0)
