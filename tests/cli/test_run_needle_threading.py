"""`tokenmill run needle-threading` on models, endpoints and tokenizers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.probe.loopback import serving
from tests.probe.solvers import solving
from tokenmill.cli import main
from tokenmill.probe import NeedleThreading, from_jsonl

GIVEN = ["run", "needle-threading", "--tasks", "single,threading,branched", "--contexts", "480,960", "--lengths", "3"]


def test_an_endpoint_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    suite = NeedleThreading(
        tasks=("single", "threading", "branched"), contexts=(480, 960), repeats=1, depths=(0, 50, 100),
        thread_lengths=(3,), directions=("forward", "backward"), branching_factors=(2,),
    )  # fmt: skip
    made = list(suite.suite())
    with serving(solving(made)) as server:
        given = [*GIVEN, "--endpoint", server.url, "--out", str(tmp_path / "out")]
        assert main([*given, "--plots", "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert len(server.bodies) == len(made)
        assert {cell["accuracy"] for cell in told["cells"]} == {1.0}
        assert sum(cell["n"] for cell in told["cells"]) == len(made)
        longest = {task: max(len(e.haystack) for e in made if e.task == task) for task in suite.tasks}
        assert told["effective_context"] == longest
        assert all(880 < n <= 960 for n in longest.values())
        assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
            "accuracy.svg", "answers.jsonl", "contour-branched.svg", "contour-single.svg", "contour-threading.svg",
        ]  # fmt: skip
        assert main(given) == 0
        shown = capsys.readouterr().out
        assert len(server.bodies) == len(made), "answers that are there are not asked again"
        assert server.bodies[0]["model"] == "served"
    assert "effective context" in shown
    assert "0.44-1.00" in shown
    assert "answers.jsonl" in shown


def test_an_endpoint_that_dies_is_a_failure_of_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(lambda prompt: "x", always="500") as server:
        given = [*GIVEN, "--endpoint", server.url, "--out", str(tmp_path), "--retries", "0"]
        assert main(given) == 1
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert "HTTP 500" in said
        server.always = "400"
        assert main(given) == 1
        assert "not one of" in capsys.readouterr().err
    assert main([*GIVEN, "--endpoint", server.url, "--retries", "0"]) == 1, "nobody there"


def test_an_endpoint_with_several_models_wants_a_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(lambda prompt: "x", models=("a", "b")) as server:
        given = [*GIVEN, "--endpoint", server.url, "--out", str(tmp_path)]
        assert main(given) == 2
        assert "--served" in capsys.readouterr().err
        assert main([*given, "--served", "b", "--json"]) == 0
        assert server.bodies[0]["model"] == "b"
    told = json.loads(capsys.readouterr().out)
    assert {cell["accuracy"] for cell in told["cells"]} == {0.0}
    assert set(told["effective_context"].values()) == {0.0}


def test_a_model_with_lengths_in_its_own_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["run", "needle-threading", "--model", "python-target", "--tasks", "single", "--unit", "tokens"]
    given += ["--contexts", "150,230", "--depths", "0", "--max-new-tokens", "8", "--out", str(tmp_path)]
    assert main([*given, "--batch-size", "2", "--tokenizers", "python-target", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [cell["context"] for cell in told["cells"]] == [160, 240]
    assert told["tokens"][0]["tokenizer"] == "python-target"


def test_questions_and_tokenizers_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "suite.jsonl"
    assert main([*GIVEN, "--examples", str(file), "--fresh", "--repeats", "2"]) == 0
    made = list(from_jsonl(file))
    assert len(made) == len({e.haystack for e in made}) == 28
    capsys.readouterr()
    with serving(solving(made)) as server:
        given = ["run", "needle-threading", "--data", str(file), "--endpoint", server.url, "--out", str(tmp_path)]
        assert main([*given, "--json"]) == 0
    assert sum(cell["n"] for cell in json.loads(capsys.readouterr().out)["cells"]) == 28
    assert main(["run", "needle-threading", "--tokenizers", "python-target"]) == 0
    assert "tokens a pair" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ([], "--endpoint"),
        (["--model", "a", "--endpoint", "http://b/v1"], "either"),
        (["--endpoint", "b/v1"], "url"),
        (["--endpoint", "http://b/v1", "--served", "m", "--mode", "talk"], "mode"),
        (["--endpoint", "http://b/v1", "--served", "m", "--timeout", "0"], "timeout"),
        (["--model", "python-target", "--tasks", "sinle"], "single"),
        (["--model", "python-target", "--contexts", "a"], "contexts"),
        (["--model", "python-target", "--contexts", "10"], "contexts"),
        (["--model", "python-target", "--unit", "words"], "unit"),
        (["--model", "python-target", "--depths", "200"], "depth"),
        (["--model", "python-target", "--dtype", "int8"], "dtype"),
        (["--model", "python-target", "--threshold", "2"], "threshold"),
        (["--model", "python-target", "--tasks", "threading", "--lengths", "25"], "contexts"),
        (["--model", "python-target", "--batch-size", "0"], "batch_size"),
        (["--model", "python-targt"], "python-target"),
        (["--model", "python-target", "--data", "nowhere.jsonl"], "nowhere"),
        (["--tokenizers", "nowhere.json"], "nowhere"),
    ],
)
def test_bad_usage(wrong: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "needle-threading", *wrong, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "needle-threading", "--help"]) == 0
    assert "Example: tokenmill run needle-threading" in " ".join(capsys.readouterr().out.split())
