"""The task `generate`: prompts, subjects and their counts, on a tiny random model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tokenmill import bench, laws, models
from tokenmill.bench.task import Item, MethodSpec, Outcome
from tokenmill.bench.tasks._generation import log_likelihood
from tokenmill.bench.tasks.generate import Options, Task
from tokenmill.errors import LimitError, UnsupportedError


class Letters:
    """A tokenizer: one token a character."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) % 64 for c in text]}


def _task(data: Path | str, **options: Any) -> Task:
    """A task on a tiny Llama instead of a model from disk."""
    settings: dict[str, Any] = {"dtype": "float32", "packed": False, "prompt_tokens": 16, "new_tokens": 8, "limit": 2}
    task = Task(Options(model="tiny", data=str(data), **{**settings, **options}))
    model = models.tiny("llama", seed=3)
    vars(task).update(_loaded=(model, Letters()), draft=models.tiny("llama", seed=4), stock=model)
    return task


@pytest.fixture(autouse=True)
def _laws_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """The laws have tests of their own."""
    monkeypatch.setattr(laws, "each", lambda slug: iter(()))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "mine.jsonl"
    lines = [
        {"text": f"line {i}\n" * 40, "kind": "code" if i % 2 else "prose", "id": f"t{i}"} for i in range(12)
    ]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_methods_run_side_by_side_and_agree(data: Path, tmp_path: Path) -> None:
    lines = bench.run(_task(data, draft="x"), ["prompt-lookup", "assisted", "token-recycling:k=4:tree=5"], tmp_path)
    assert [r.method for r in lines] == ["plain", "prompt-lookup", "assisted", "token-recycling"] * 2
    for line in lines:
        assert line.status == "ok", line.message
        assert (line.quality["identical"], line.quality["agree"]) == (1.0, 1.0)
        assert line.cost["tokens"] == 8
    plain, ours = lines[0], lines[3]
    assert (plain.cost["model_calls"], plain.cost["positions"]) == (8, 16 + 7)
    assert plain.cost["tokens_per_call"] == 1.0
    assert ours.cost["tokens_per_call"] >= 1.0
    assert ours.params == {"k": 4, "tree": "5"}
    assert ours.data["kind"] == "prose"
    assert ours.settings["new_tokens"] == 8


def test_prompts_are_the_same_for_one_seed_and_others_for_another(data: Path) -> None:
    first, again, other = (_task(data, seed=seed).items("code") for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert all(len(item.content) == 16 and item.kind == "code" for item in first)


def test_warming_uses_other_texts_than_measuring(data: Path) -> None:
    task = _task(data, warm=3)
    warm = {item.id.split(":")[0] for item in task._take("code", "train", 3)}
    assert not warm & {item.id.split(":")[0] for item in task.items("code")}
    subject = task.subject(MethodSpec("token-recycling", {"k": 4, "tree": "5"}), "code")
    assert subject.decoder.state is not None
    assert int(subject.decoder.state.filled.sum()) > 0


def test_a_method_is_cold_without_warming(data: Path) -> None:
    assert _task(data).subject(MethodSpec("token-recycling", {}), "code").decoder.state is None


def test_sampling_is_scored_by_its_likelihood_and_repeats(data: Path, tmp_path: Path) -> None:
    runs = [bench.run(_task(data, sample=True), ["token-recycling"], tmp_path / str(i)) for i in range(2)]
    for a, b in zip(*runs, strict=True):
        assert a.quality == b.quality
        assert set(a.quality) == {"log_likelihood"}
        assert a.quality["log_likelihood"] < 0


def test_log_likelihood_is_the_mean_over_the_new_tokens() -> None:
    model = models.tiny("qwen2", seed=1)
    prompt, output = [5, 9, 2], [7, 7, 1, 3]
    with torch.no_grad():
        law = model(input_ids=torch.tensor([prompt + output])).logits[0].float().log_softmax(-1)
    slow = sum(float(law[len(prompt) - 1 + i, token]) for i, token in enumerate(output)) / len(output)
    assert log_likelihood(model, prompt, output) == pytest.approx(slow, abs=1e-5)


def test_agreement_stops_at_the_first_difference(data: Path) -> None:
    task, item = _task(data), Item("a", "code", [1])
    found = task.quality(item, Outcome([1, 2, 3, 4], {}), Outcome([1, 2, 9, 4], {}))
    assert found == {"identical": 0.0, "agree": 0.5}
    assert task.quality(item, Outcome([1, 2], {}), Outcome([1, 2], {})) == {"identical": 1.0, "agree": 1.0}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("token-recyclin", "Did you mean token-recycling"),
        ("token-recycling:leaves=3", "setting = 'leaves'"),
        ("token-recycling:k=0", "k = 0"),
        ("prompt-lookup:num_tokens=x", "num_tokens = 'x'"),
        ("plain:x=1", "setting = 'x'"),
    ],
)
def test_bad_specs_are_refused(data: Path, spec: str, message: str) -> None:
    with pytest.raises(LimitError, match=message):
        _task(data).check(MethodSpec.parse(spec))


@pytest.mark.parametrize(("slug", "task"), [("awrs", "constrain"), ("byte-level-probabilities", "bytes")])
def test_methods_of_other_tasks_are_sent_there(data: Path, slug: str, task: str) -> None:
    with pytest.raises(UnsupportedError, match=f"belongs to the task {task}. Use bench {task}|not a decoder"):
        _task(data).check(MethodSpec(slug))


@pytest.mark.parametrize(
    ("slug", "message"), [("spectr", "--draft"), ("assisted", "--draft"), ("stock", "without packed layers")]
)
def test_what_a_method_needs_is_said(data: Path, slug: str, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        _task(data).check(MethodSpec(slug))


@pytest.mark.parametrize(
    "options", [{"limit": 0}, {"prompt_tokens": 0}, {"new_tokens": 0}, {"warm": -1}, {"repeats": 0}]
)
def test_bad_options_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(LimitError, match=next(iter(options))):
        Options(**options)  # pyright: ignore[reportArgumentType]


def test_too_few_texts_and_broken_files_are_said(data: Path, tmp_path: Path) -> None:
    with pytest.raises(LimitError, match="limit = 50"):
        _task(data, limit=50).items("code")
    with pytest.raises(LimitError, match="limit = 2"):
        _task(data, prompt_tokens=4000).items("code")
    with pytest.raises(LimitError, match="a file of JSON lines"):
        _task(tmp_path / "none.jsonl").kinds()
    (tmp_path / "bad.jsonl").write_text('{"text": "x"}\n{"txt": "x"}\n')
    with pytest.raises(LimitError, match=r"bad\.jsonl:2"):
        _task(tmp_path / "bad.jsonl").kinds()
    with pytest.raises(LimitError):
        _task("no-such-corpus").kinds()


def test_corpora_give_the_kinds() -> None:
    task = _task("python-stdlib,stdlib-json")
    assert task.kinds() == ["code", "json"]
    assert task.data("code")["name"] == "python-stdlib"
    assert len(task.items("json")) == 2


def test_the_end_token_does_not_stop_a_measurement(tmp_path: Path) -> None:
    task = Task(Options(model=str(tmp_path), dtype="float32", packed=False))
    model = models.tiny("llama", seed=3)
    loaded: list[str] = []

    def load(name: str, **_: Any) -> tuple[Any, Any]:
        loaded.append(name)
        model.generation_config.eos_token_id = 7
        return model, Letters()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "load", load, raising=False)
        assert task.target.generation_config.eos_token_id is None
        assert task.tokenizer("a") == {"input_ids": [33]}
    assert loaded == [str(tmp_path)]
