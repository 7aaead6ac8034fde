"""The task `diffuse`: its prompts, its specs, and every method on the small model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tokenmill import bench, catalog, laws
from tokenmill.bench.task import MethodSpec, Outcome
from tokenmill.bench.tasks._unmasking import cache_of
from tokenmill.bench.tasks.diffuse import CACHES, Options, Task
from tokenmill.errors import LimitError, UnsupportedError

SMALL: dict[str, Any] = {"limit": 8, "rows": 4}


@pytest.fixture(autouse=True)
def _laws_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """The laws have tests of their own."""
    monkeypatch.setattr(laws, "each", lambda slug: iter(()))


def test_prompts_come_in_batches_and_are_those_of_the_seed() -> None:
    task = Task(Options(limit=10, rows=4))
    assert task.kinds() == ["add", "permutation", "reverse"]
    items = task.items("reverse")
    assert [len(item.content) for item in items] == [4, 4, 2]
    assert {one.kind for item in items for one in item.content} == {"reverse"}
    assert task.data("add")["split"] == "test"
    again, other = (Task(Options(limit=10, rows=4, seed=s)) for s in (0, 1))
    assert task.data("add") == again.data("add") != other.data("add")
    validation = Task(Options(limit=10, split="validation"))
    assert validation.data("add")["sha256"] != task.data("add")["sha256"]
    assert Task(Options(kinds="add,reverse")).kinds() == ["add", "reverse"]


def test_every_method_is_measured_beside_one_token_a_pass(tmp_path: Path) -> None:
    task = Task(Options(kinds="permutation", **SMALL))
    methods = [
        "quota:n=2", "random:n=2", "entropy:n=2", "margin:n=2", "threshold:tau=0.9", "factor:f=0.5",
        "entropy-bound:gamma=0.05", "learn2pd:threshold=0.8", "unmasking-policies",
        "freecache-guided-diffusion:cache=free",
        "window-diffusion:external_window=12:internal_window=6:refresh_cycle=3",
    ]  # fmt: skip
    found = bench.run(task, methods, tmp_path)
    assert {(r.status, r.message) for r in found} == {("ok", "")}
    assert {c.slug for c in catalog.cards("diffuse")} <= {r.method for r in found}
    by_method = {r.method: r for r in found}
    plain = by_method["plain"]
    assert plain.cost["passes"] == 12
    assert plain.cost["tokens_per_pass"] == 1
    assert plain.quality["same"] == 1
    assert plain.quality["accuracy"] >= 0.75
    assert by_method["quota"].cost["passes"] == 6
    assert by_method["quota"].quality["accuracy"] < plain.quality["accuracy"]
    for name in ("threshold", "learn2pd", "unmasking-policies"):
        assert 1 < by_method[name].cost["passes"] < 12
    assert by_method["freecache-guided-diffusion"].cost["guide_positions"] > 0
    assert "guide_positions" not in by_method["threshold"].cost
    assert by_method["window-diffusion"].cost["positions"] < plain.cost["positions"]
    # A pass of a method that brings a network of its own costs more than one of the threshold's.
    per_pass = {name: r.cost["flops"] / r.cost["positions"] for name, r in by_method.items()}
    assert per_pass["learn2pd"] > per_pass["threshold"]
    assert per_pass["unmasking-policies"] > 1.2 * per_pass["threshold"]


@pytest.mark.parametrize("cache", CACHES)
def test_every_rule_goes_with_every_cache(tmp_path: Path, cache: str) -> None:
    task = Task(Options(kinds="add", limit=4, rows=4))
    methods = [f"threshold:tau=0.9:cache={cache}:block=4", f"learn2pd:cache={cache}", f"quota:n=2:cache={cache}"]
    found = [r for r in bench.run(task, methods, tmp_path) if r.method != "plain"]
    assert {(r.status, r.message) for r in found} == {("ok", "")}
    assert all(r.params["cache"] == cache for r in found)
    assert found[0].cost["passes"] >= 3
    assert (cache_of(cache) is None) == (cache == "none")


def test_gaps_in_python_are_filled_in_place(tmp_path: Path) -> None:
    task = Task(Options(model="diffusion-mixed", data="gaps", limit=2))
    (item,) = task.items("gaps")
    assert task.kinds() == ["gaps"]
    one = item.content[0]
    assert one.check(one.gap.gap)
    plain, ours = Outcome(["aa", "b"], {}), Outcome(["a", "b"], {})
    assert task.quality(item, plain, ours)["same"] == 0.5
    assert task.quality(item, plain, ours)["shorter"] == 0.5


def test_prompts_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    rows = [{"prompt": "12+34=", "answer": "046"}, {"prompt": "C123", "answer": "321", "kind": "back"}]
    file.write_text("\n".join(map(json.dumps, rows)))
    task = Task(Options(data=str(file), new_tokens=12, block=0))
    assert task.kinds() == ["text", "back"]
    found = bench.run(task, ["threshold:tau=0.9"], tmp_path / "runs")
    assert all(r.quality["accuracy"] == 1 for r in found)
    file.write_text('{"prompt": "a"}\n')
    with pytest.raises(LimitError, match="line 1"):
        Task(Options(data=str(file))).kinds()


def test_bad_specs_are_refused_before_anything_is_loaded() -> None:
    task = Task(Options())
    good = task.check(MethodSpec.parse("threshold:tau=0.5:cache=dual:block=4"))
    assert good.params == {"tau": 0.5, "cache": "dual", "block": 4}
    for text, match in {
        "threshold:tau=nan": "tau",
        "quota:n=0": "n = 0",
        "threshold:cache=big": "cache",
        "threshold:block=x": "block",
        "learn2pd:speed=1": "speed",
        "nothing": "nothing",
    }.items():
        with pytest.raises(LimitError, match=match):
            task.check(MethodSpec.parse(text))
    with pytest.raises(UnsupportedError, match="bench long-context"):
        task.check(MethodSpec.parse("fasa"))
    with pytest.raises(LimitError, match="filter"):
        Task(Options(model="diffusion-mixed-guide-weak", data="mixed")).check(MethodSpec.parse("learn2pd"))
    wrong: tuple[dict[str, Any], ...] = ({"limit": 0}, {"rows": 0}, {"block": -1}, {"new_tokens": 0})
    for settings in wrong:
        with pytest.raises(LimitError, match=next(iter(settings))):
            Options(**settings)
    with pytest.raises(LimitError, match="data"):
        Task(Options(data="easy"))
    with pytest.raises(LimitError, match="kinds"):
        Task(Options(kinds="spell")).kinds()
