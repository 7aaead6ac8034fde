"""The task `threads` on a small model that ships: floor and ceiling, an attention method, one's own examples."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from tokenmill import bench, laws
from tokenmill.bench.task import MethodSpec
from tokenmill.bench.tasks.threads import Options, Task
from tokenmill.cli import main
from tokenmill.errors import LimitError, UnsupportedError
from tokenmill.probe import to_jsonl
from tokenmill.probe.needle_threading import TASKS, generate


@pytest.fixture(autouse=True)
def _laws_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """The laws have tests of their own."""
    monkeypatch.setattr(laws, "each", lambda slug: iter(()))


def options(**more: Any) -> Options:
    small: dict[str, Any] = {"model": "python-target", "tasks": "single,threading", "contexts": "160", "packed": False}
    return Options(**{**small, "limit": 2, **more})


def test_floor_model_and_ceiling_stand_beside_each_other(tmp_path: Path) -> None:
    task = Task(options())
    found = bench.run(task, ["random", "oracle"], tmp_path)
    assert [r.data["kind"] for r in found[::3]] == ["single 160", "threading 160"]
    for line in found:
        assert line.status == "ok"
        assert line.n == 2
        if line.method == "oracle":
            assert line.quality["accuracy"] == line.quality["whole"] == 1.0
        if line.method == "plain":
            assert line.quality["same"] == 1.0
            assert line.cost["positions"] > 100
            assert 1 <= line.cost["chars_per_token"] < 8
    assert bench.run(Task(options()), ["random", "oracle"], tmp_path) == found, "nothing is measured twice"


def test_haystacks_of_every_task_keep_to_their_length_and_have_needles_at_all_depths() -> None:
    made = Task(Options(model="gemma-3-270m", tasks=",".join(TASKS[:5])))
    kinds = made.kinds()
    assert kinds == [f"{task} 480" for task in TASKS[:5]]
    depths = [item.content.meta["needle_depth"] for item in made.items("single 480")]
    assert depths == ["0", "50", "100"]
    assert len({made.data(kind)["sha256"] for kind in kinds}) == len(kinds)
    assert Task(Options(model="gemma-3-270m", seed=1)).data("single 480") != made.data("single 480")
    every = Task(Options(model="gemma-3-270m", tasks=",".join(TASKS), contexts="800"))
    assert [kind.partition(" ")[0] for kind in every.kinds()] == list(TASKS)
    for kind in every.kinds():
        assert all(item.content.meta["context_length"] <= 800 for item in every.items(kind))


def test_the_default_model_is_asked_with_names_and_is_near_the_ceiling(tmp_path: Path) -> None:
    task = Task(Options(limit=20))
    assert task.kinds() == ["single 480", "threading 480"]
    assert all(len(key) == 4 for item in task.items("single 480") for key in item.content.keys)
    assert Task(Options(keys="uuid")).items("single 480")[0].content.haystack[1:38].count("-") == 4
    found = {(r.method, r.data["kind"]): r for r in bench.run(task, ["plain", "random"], tmp_path)}
    assert found["plain", "single 480"].quality["accuracy"] >= 0.9
    assert found["plain", "threading 480"].quality["accuracy"] >= 0.75
    assert found["random", "single 480"].quality["accuracy"] <= 0.2


def test_guesses_are_near_chance() -> None:
    """Of 10 values, one in ten is right; 200 guesses lie within four standard errors."""
    made = Task(options(tasks="single,multiple", contexts="800", limit=200, num_needles=3))
    for kind in made.kinds():
        guess = made.subject(made.check(MethodSpec.parse("random")), kind)
        scores = [made.quality(i, out, out)["accuracy"] for i in made.items(kind) for out in [guess.run(i)]]
        assert abs(sum(scores) / len(scores) - 0.1) < 4 * (0.09 / 200) ** 0.5


def test_ones_own_examples(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    to_jsonl([generate("single", n_pairs=2, seed=seed) for seed in range(3)], file)
    task = Task(options(data=str(file), limit=2))
    (line,) = bench.run(task, ["plain"], tmp_path / "out")
    assert (line.n, line.data["name"], line.data["split"]) == (2, "mine.jsonl", "all")
    file.write_text("")
    with pytest.raises(LimitError, match="data"):
        Task(options(data=str(file))).kinds()


def test_specs_and_options_are_checked_before_anything_is_loaded() -> None:
    task = Task(options(model="nowhere"))
    assert task.check(MethodSpec.parse("oracle")).params == {}
    for bad in ("nothing", "oracle:seed=1"):
        with pytest.raises(LimitError):
            task.check(MethodSpec.parse(bad))
    with pytest.raises(UnsupportedError, match="bench generate"):
        task.check(MethodSpec.parse("token-recycling"))
    with pytest.raises(UnsupportedError, match="benchmark"):
        task.check(MethodSpec.parse("needle-threading"))
    for more in ({"limit": 0}, {"thread_length": 0}):
        with pytest.raises(LimitError, match=next(iter(more))):
            options(**more)
    for more, words in (
        ({"tasks": "sinlge"}, "single"),
        ({"contexts": "many"}, "contexts"),
        ({"contexts": "40"}, "contexts = 40"),
        ({"contexts": "80"}, "pairs"),
        ({"direction": "up"}, "direction"),
        ({"data": "nowhere.jsonl"}, "nowhere"),
    ):
        with pytest.raises(LimitError, match=words):
            Task(options(**more)).check(MethodSpec.parse("plain"))


def test_a_prompt_that_does_not_fit_says_what_to_do() -> None:
    task = Task(options(contexts="1600", tasks="single"))
    with pytest.raises(UnsupportedError, match=r"512 positions.*shorter contexts"):
        task.subject(MethodSpec("plain"), "single 1600")


def test_an_attention_method_of_a_plugin_is_measured_on_the_model(tmp_path: Path) -> None:
    """An installed package with an attention method: `attach` is around the call, its trace is in the line."""
    (tmp_path / "seeing.py").write_text(
        textwrap.dedent('''
        """An attention method that changes nothing."""
        from contextlib import contextmanager
        from dataclasses import dataclass
        from tokenmill.catalog import Card, Paper
        from tokenmill.trace import Trace

        CARD = Card(name="Seeing", kind="attention", paper=Paper(title="A toy", date="2026-01"),
                    summary="It sees. All.", claim="Nothing changes.", api=("Seeing",), exact=True,
                    trains=False, task="generate", works_with=("llama",))

        @dataclass(frozen=True, kw_only=True)
        class Seeing:
            """Counts forward passes."""
            keep: int = 4

            @contextmanager
            def attach(self, model):
                trace = Trace()
                def count(*_): trace.model_calls += 1
                handle = model.register_forward_pre_hook(count)
                try:
                    yield trace
                finally:
                    handle.remove()

        def small():
            return Seeing()
        ''')
    )
    info = tmp_path / "seeing-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: seeing\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[tokenmill.methods]\nattend.seeing = seeing\n")
    code = f"""
        from tokenmill import bench, laws
        from tokenmill.bench.tasks.threads import Options, Task
        laws.each = lambda slug: iter(())
        o = Options(model="python-target", tasks="single", contexts="160", packed=False, limit=1)
        found = bench.run(Task(o), ["seeing:keep=3"], {str(tmp_path / "out")!r})
        ours = [r for r in found if r.method == "seeing"][0]
        called = ours.cost["model_calls"] >= ours.cost["tokens"]
        print(ours.status, ours.quality["same"], called, ours.params, ours.message)
    """
    paths = {"PYTHONPATH": ":".join([str(tmp_path), *filter(None, sys.path)]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=paths)
    assert done.stdout.split() == ["ok", "1.0", "True", "{'keep':", "3}"], done.stdout + done.stderr


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["bench", "threads", "--model", "python-target", "--contexts", "160", "--tasks", "single", "--limit", "1"]
    assert main([*given, "--no-packed", "--methods", "oracle", "--out", str(tmp_path)]) == 0
    assert "oracle" in capsys.readouterr().out
    assert main(["bench", "threads", "--contexts", "x", "--out", str(tmp_path)]) == 2
    assert "contexts" in capsys.readouterr().err
