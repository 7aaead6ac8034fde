"""Runs: paired, resumed, with failures as lines and laws before timings."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench.toy_task import Options, Task
from tokenmill import bench, laws
from tokenmill.bench.result import FILE, read_results
from tokenmill.errors import LimitError


def _run(out: Path, *methods: str, interrupt: tuple[str, str] = ("", ""), **options: int) -> tuple[Task, list]:
    task = Task(Options(**options), interrupt)
    return task, bench.run(task, methods, out, command="tokenmill bench toy")


def test_plain_is_always_there_and_every_kind_has_a_line(tmp_path: Path) -> None:
    _, lines = _run(tmp_path, "wrong")
    assert [(r.data["kind"], r.method) for r in lines] == [
        ("a", "plain"),
        ("a", "wrong"),
        ("b", "plain"),
        ("b", "wrong"),
    ]
    assert read_results(tmp_path) == lines
    plain, wrong = lines[:2]
    assert plain.ratio["ms_p50"] == [1.0, 1.0, 1.0]
    assert (plain.quality["identical"], wrong.quality["identical"]) == (1.0, 0.75)
    assert wrong.cost["tokens"] == 2.0
    assert wrong.cost["tokens_per_call"] == 2.0
    assert wrong.cost["ms_p20"] <= wrong.cost["ms_p50"] <= wrong.cost["ms_p80"]
    assert [item["id"] for item in wrong.items] == ["a0", "a1", "a2", "a3"]
    assert wrong.items[1]["ratio"] == pytest.approx(wrong.items[1]["ms"] / plain.items[1]["ms"])
    assert wrong.ratio["ms_p50"][0] == pytest.approx(wrong.cost["ms_p50"] / plain.cost["ms_p50"])
    assert (wrong.n, wrong.cmd, wrong.env["threads"]) == (4, "tokenmill bench toy", 1)


def test_methods_take_turns_in_coming_first(tmp_path: Path) -> None:
    task, _ = _run(tmp_path, "wrong", limit=2)
    assert [name for name, item in task.ran if item == "a0"] == ["plain", "wrong"]
    assert [name for name, item in task.ran if item == "a1"] == ["wrong", "plain"]


def test_each_repeat_has_a_subject_of_its_own(tmp_path: Path) -> None:
    task, lines = _run(tmp_path, "wrong", repeats=3, limit=2)
    assert task.made.count("wrong a") == 3
    assert sum(1 for name, item in task.ran if (name, item) == ("wrong", "a0")) == 3
    assert lines[1].cost["seen"] == 1.5


def test_what_is_there_is_not_measured_again(tmp_path: Path) -> None:
    _, first = _run(tmp_path, "wrong")
    task, again = _run(tmp_path, "wrong")
    assert task.ran == []
    assert again == first
    task, more = _run(tmp_path, "wrong", "wrong:x=1")
    assert [name for name, item in task.ran if item == "a0"] == ["plain", "wrong:x=1"]
    assert len(more) == 6
    assert len(read_results(tmp_path)) == 6
    task, _ = _run(tmp_path, "wrong", limit=3)
    assert len(task.ran) == 12


def test_an_interrupted_run_goes_on_after_the_last_finished_item(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path, "wrong", interrupt=("wrong", "b2"))
    assert {r.data["kind"] for r in read_results(tmp_path)} == {"a"}
    assert len(list(tmp_path.glob("partial-*.jsonl"))) == 1
    task, lines = _run(tmp_path, "wrong")
    assert {item for _, item in task.ran} == {"b2", "b3"}
    assert len(lines) == 4
    assert lines[-1].n == 4
    assert [item["id"] for item in lines[-1].items] == ["b0", "b1", "b2", "b3"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [FILE]


@pytest.mark.parametrize(("method", "message"), [("raises", "RuntimeError: the toy broke"), ("never", "toy: k = 0")])
def test_a_method_that_raises_is_a_failed_line(tmp_path: Path, method: str, message: str) -> None:
    _, lines = _run(tmp_path, method, "wrong")
    by_name = {r.method: r for r in lines if r.data["kind"] == "a"}
    assert by_name[method].status == "failed"
    assert message in by_name[method].message
    assert not by_name[method].cost
    assert by_name["wrong"].status == "ok"
    assert len(by_name["wrong"].items) == 4


def test_a_failed_measurement_is_tried_again(tmp_path: Path) -> None:
    _run(tmp_path, "raises")
    task, _ = _run(tmp_path, "raises")
    assert ("raises", "a0") in task.ran


def test_a_broken_law_means_a_failed_line_and_no_timing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = laws.Result("lawless", "greedy equals plain greedy", "broken", "it does not")
    monkeypatch.setattr(laws, "each", lambda slug: iter([laws.Result(slug, "api is there", "ok"), broken]))
    task, lines = _run(tmp_path, "lawless")
    assert not any(name == "lawless" for name, _ in task.ran)
    assert [r.message for r in lines if r.method == "lawless"] == [
        "a law is broken: greedy equals plain greedy: it does not"
    ] * 2


def test_bad_specs_are_refused_before_any_work(tmp_path: Path) -> None:
    for methods in (["nothing"], ["wrong:x"], ["wrong:x=1:x=2"], ["wrong:x=1", "wrong:x=1 "]):
        with pytest.raises(LimitError):
            _run(tmp_path / "out", *methods)
    assert not (tmp_path / "out").exists()


def test_plains_own_error_comes_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Task, spec: object, kind: str) -> None:
        raise RuntimeError("no model")

    monkeypatch.setattr(Task, "subject", fail)
    with pytest.raises(RuntimeError, match="no model"):
        _run(tmp_path, "wrong")


def test_progress_counts_to_the_end(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    bench.run(
        Task(Options(limit=2)), ["wrong"], tmp_path, progress=lambda what, done, total: seen.append((done, total))
    )
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
