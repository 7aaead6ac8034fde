"""The command: what it prints, its exit codes, and that help and lists load no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.bench.test_result import LINE
from tokenmill import bench, catalog, laws, models
from tokenmill.bench.result import FILE, append
from tokenmill.cli import check as check_command
from tokenmill.cli import main

Call = Callable[..., tuple[int, str, str]]
COMMANDS = sorted(file.stem for file in Path(check_command.__file__).parent.glob("[a-z]*.py"))


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    """Call the command: exit code, standard output, standard error."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: str) -> tuple[int, str, str]:
        try:
            code = main(list(arguments))
        except SystemExit as leave:
            code = leave.code if isinstance(leave.code, int) else 1
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model that is loaded is a tiny random one."""

    class Letters:
        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [ord(c) % 64 for c in text]}

        def decode(self, ids: Any, **_: Any) -> str:
            return "".join(chr(48 + int(i)) for i in ids)

    def load(name: str, **_: Any) -> tuple[Any, Any]:
        return models.tiny("llama", seed=len(name)), Letters()

    monkeypatch.setattr(models, "load", load, raising=False)
    monkeypatch.setattr(laws, "each", lambda slug: iter(()))


@pytest.mark.parametrize("command", [*([name] for name in COMMANDS), *(["bench", task] for task in bench.task_names())])
def test_every_help_has_an_example(call: Call, command: list[str]) -> None:
    code, out, _ = call(*command, "--help")
    assert code == 0
    assert f"Example: tokenmill {' '.join(command)}" in " ".join(out.split())


def test_list(call: Call) -> None:
    code, out, _ = call("list", "--family", "decode")
    assert code == 0
    assert all(card.slug in out for card in catalog.cards("decode"))
    code, out, _ = call("list", "--json")
    assert [row["slug"] for row in json.loads(out)] == list(catalog.paths())


def test_show(call: Call) -> None:
    code, out, _ = call("show", "token-recycling")
    card = catalog.card("token-recycling")
    assert code == 0
    assert card.paper.arxiv in out
    assert all(text in " ".join(out.split()) for text in (card.claim, *card.differs))
    assert "warm_up_from_prompt" in out
    data = json.loads(call("show", "spectr", "--json")[1])
    assert data["needs"] == ["draft_model"]
    assert data["settings"]["num_drafts"]["default"] == 8


def test_models(call: Call) -> None:
    assert all(name in call("models")[1] for name in models.names())
    assert [fact["name"] for fact in json.loads(call("models", "--json")[1])] == models.names()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lst"], "Did you mean list"),
        (["list", "--family", "decod"], "Did you mean decode"),
        (["show", "token-recyclin"], "Did you mean token-recycling"),
        (["check", "spectre"], "Did you mean spectr"),
        (["run", "token-recyclin", "--prompt", "x"], "Did you mean token-recycling"),
        (["run", "token-recycling"], "either --prompt or --file"),
        (["run", "token-recycling", "--prompt", "x", "--file", "y"], "either --prompt or --file"),
        (["run", "token-recycling", "--prompt", "x", "--set", "k"], "KEY=VALUE"),
        (["run", "token-recycling", "--prompt", "x", "--set", "kk=2"], "Did you mean k"),
        (["run", "token-recycling", "--prompt", "x", "--dtype", "int8"], "dtype = 'int8'"),
        (["run", "token-recycling", "--file", "no-such-file"], "no-such-file"),
        (["run", "spectr", "--prompt", "x"], "--draft"),
        (["run", "token-recycling", "--prompt", "x", "--model", "gemma-3-270"], "gemma-3-270m"),
        (["bench", "generat"], "Did you mean generate"),
        (["bench", "generate", "--methods", "spectrr"], "Did you mean spectr"),
        (["bench", "generate", "--limit", "0"], "limit = 0"),
        (["bench", "generate", "--limit", "x"], "integer"),
        (["bench", "generate", "--sweep", "generat"], "Did you mean generate"),
        (["report", "no-such-folder"], "no-such-folder"),
    ],
)
def test_bad_usage_is_one_line_and_code_2(call: Call, arguments: list[str], message: str) -> None:
    code, _, err = call(*arguments)
    assert code == 2
    assert message in err
    assert len(err.splitlines()) == 1
    assert "Traceback" not in err


def test_a_failure_is_one_line_and_code_1_and_debug_shows_more(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(models, "names", fail, raising=False)
    code, _, err = call("models")
    assert (code, err) == (1, "tokenmill: RuntimeError: two lines\n")
    code, _, err = call("models", "--debug")
    assert code == 1
    assert "Traceback" in err
    assert err.endswith("tokenmill: RuntimeError: two lines\n")


def test_an_interruption_is_one_line(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "names", stop, raising=False)
    code, _, err = call("models")
    assert code == 130
    assert "Traceback" not in err


@pytest.mark.usefixtures("tiny")
def test_run_shows_both_sides(call: Call, tmp_path: Path) -> None:
    code, out, _ = call("run", "token-recycling", "--prompt", "hello", "--max-new-tokens", "9", "--set", "tree=5")
    assert code == 0
    assert "the same text" in out
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line.startswith(("plain", "token-recycling"))}
    assert rows["plain"][1:3] == ["9", "9"]
    assert rows["token-recycling"][1] == "9"
    (tmp_path / "prompt.txt").write_text("hello")
    arguments = ["--file", str(tmp_path / "prompt.txt"), "--max-new-tokens", "9", "--json"]
    data = json.loads(call("run", "token-recycling", *arguments)[1])
    assert data["method"]["tokens"] == data["plain"]["tokens"]
    assert data["method"]["text"] in out.replace("\n", "")
    assert data["plain"]["counts"]["model_calls"] == 9


@pytest.mark.usefixtures("tiny")
def test_run_with_a_draft_model_and_sampling(call: Call) -> None:
    arguments = ["--prompt", "hello", "--draft", "small", "--sample", "--seed", "3", "--max-new-tokens", "7", "--json"]
    first, again = (json.loads(call("run", "spectr", *arguments)[1]) for _ in range(2))
    assert len(first["method"]["tokens"]) == 7
    assert first["method"]["tokens"] == again["method"]["tokens"]


@pytest.mark.usefixtures("tiny")
def test_bench_then_report(call: Call, tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text("\n".join(json.dumps({"text": f"text {i} " * 20}) for i in range(4)))
    out = tmp_path / "runs"
    arguments = ["--data", str(tmp_path / "mine.jsonl"), "--limit", "2", "--prompt-tokens", "8", "--new-tokens", "5"]
    methods = ["--methods", "plain,token-recycling:tree=5", "--out", str(out), "--no-packed"]
    code, shown, _ = call("bench", "generate", *arguments, *methods)
    assert code == 0
    assert "token-recycling tree=5" in shown
    lines = json.loads(call("bench", "generate", *arguments, *methods, "--json")[1])
    assert [line["method"] for line in lines] == ["plain", "token-recycling"]
    assert lines[0]["cmd"].startswith("tokenmill bench generate ")
    assert "--no-packed" in lines[0]["cmd"]
    assert "--limit 2" in lines[0]["cmd"]
    assert "--methods plain,token-recycling:tree=5" in lines[0]["cmd"]
    code, _, _ = call("report", str(out), "-o", str(out / "report.html"))
    assert code == 0
    assert "token-recycling tree=5" in (out / "report.html").read_text()


@pytest.mark.usefixtures("tiny")
def test_a_sweep_runs_all_its_methods_with_all_its_seeds(call: Call, tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text("\n".join(json.dumps({"text": f"text {i} " * 20}) for i in range(4)))
    (tmp_path / "mine.toml").write_text(
        f'task = "generate"\ndata = "{tmp_path / "mine.jsonl"}"\npacked = false\nlimit = 1\nprompt_tokens = 8\n'
        'new_tokens = 4\nseeds = [0, 1]\n[[method]]\nid = "plain"\n[[method]]\nid = "token_recycling"\nk = [2, 4]\n'
        'tree = "0"\n'
    )
    arguments = ["--sweep", str(tmp_path / "mine.toml"), "--out", str(tmp_path / "runs"), "--json"]
    lines = json.loads(call("bench", "generate", *arguments)[1])
    assert [(line["seed"], line["params"].get("k")) for line in lines] == [
        (0, None), (0, 2), (0, 4), (1, None), (1, 2), (1, 4)
    ]  # fmt: skip
    assert {line["settings"]["new_tokens"] for line in lines} == {4}


@pytest.mark.usefixtures("tiny")
def test_a_failed_method_makes_the_exit_code_1(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.jsonl").write_text("\n".join(json.dumps({"text": f"text {i} " * 20}) for i in range(4)))
    broken = laws.Result("token-recycling", "counts add up", "broken", "they do not")
    monkeypatch.setattr(laws, "each", lambda slug: iter([broken]))
    arguments = ["--data", str(tmp_path / "mine.jsonl"), "--limit", "1", "--prompt-tokens", "8", "--no-packed"]
    code, out, _ = call(
        "bench", "generate", *arguments, "--methods", "token-recycling", "--out", str(tmp_path / "runs")
    )
    assert code == 1
    assert "counts add up" in out


def test_check(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    results = [laws.Result("spectr", "one", "ok"), laws.Result("spectr", "two", "does not apply", "a reason")]
    monkeypatch.setattr(laws, "each", lambda slug: iter(results))
    code, out, _ = call("check", "spectr")
    assert "does not apply  two  a reason" in out
    assert "docs page exists" in out
    assert code == 0
    results.append(laws.Result("spectr", "three", "broken", "seen 3"))
    code, out, _ = call("check", "spectr", "--json")
    assert code == 1
    assert {"slug": "spectr", "law": "three", "status": "broken", "message": "seen 3"} in json.loads(out)


def test_check_misses_a_page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = tmp_path / "src" / "tokenmill" / "cli" / "check.py"
    monkeypatch.setattr(check_command, "__file__", str(module))
    assert check_command.page("spectr").status == "does not apply"
    (tmp_path / "docs" / "methods").mkdir(parents=True)
    assert check_command.page("spectr").status == "broken"
    (tmp_path / "docs" / "methods" / "spectr.md").touch()
    assert check_command.page("spectr").status == "ok"


def test_report_of_lines(call: Call, tmp_path: Path) -> None:
    append(tmp_path / FILE, LINE)
    code, out, _ = call("report", str(tmp_path), "-o", str(tmp_path / "r.html"))
    assert code == 0
    assert "r.html" in out


@pytest.mark.parametrize(
    "arguments", [["--help"], ["list"], ["bench", "generate", "--help"], ["models"], ["--version"]]
)
def test_lists_and_help_load_no_torch(arguments: list[str]) -> None:
    code = f"import sys\nfrom tokenmill.cli import main\nmain({arguments!r})\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_the_installed_command_gives_its_exit_code() -> None:
    command = Path(sys.executable).parent / "tokenmill"
    done = subprocess.run([command, "show", "nothing"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
