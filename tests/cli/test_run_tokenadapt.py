"""``tokenmill run tokenadapt``, and how a method's own command is found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.text.test_tokenadapt import bpe
from tokenmill import catalog
from tokenmill.cli import main
from tokenmill.cli._run_command import own_commands


@pytest.fixture
def new(tmp_path: Path) -> Path:
    bpe(700).save_pretrained(tmp_path / "new")
    return tmp_path / "new"


def run(*arguments: object) -> int:
    given = ["run", "tokenadapt", "--model", "python-target", "--dtype", "float32", "--embedder", "hash"]
    return main([*given, *map(str, arguments)])


def test_a_model_folder_is_written_whole(new: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sample = tmp_path / "sample.py"
    sample.write_text("import os\n\n\ndef walk(top):\n    return os.listdir(top)\n")
    out = tmp_path / "out"
    assert run("--tokenizer", new, "--out", out, "--text", sample, "--json") == 0
    data = json.loads(capsys.readouterr().out)
    assert data["vocabulary"] == [2048, 700]
    assert data["rows"]["shared"] > 300
    assert data["rows"]["hybrid"] > 10
    assert data["before"]["bits_per_byte"] < data["after"]["bits_per_byte"] < 8
    assert {f.name for f in tmp_path.iterdir()} == {"new", "sample.py", "out"}
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    ids = torch.tensor([tokenizer("def f(x):")["input_ids"]])
    assert model(ids).logits.shape[-1] == 768
    assert run("--tokenizer", new, "--out", out) == 2
    assert "--force" in capsys.readouterr().err
    assert run("--tokenizer", new / "tokenizer.json", "--out", out, "--force") == 1  # a bare file names no end token
    assert "no end token" in capsys.readouterr().err
    assert AutoTokenizer.from_pretrained(out).vocab_size == 700
    assert run("--tokenizer", new, "--out", out, "--force", "--set", "global_weight=0") == 0
    said = capsys.readouterr().out
    assert "local" in said
    assert f"wrote {out}" in said


def test_a_folder_that_is_no_model_is_never_replaced(new: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    assert run("--tokenizer", new, "--out", tmp_path / "mine", "--force") == 2
    assert (tmp_path / "mine" / "thesis.tex").is_file()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tokenizer", "nowhere"], "tokenizer = 'nowhere'"),
        (["--tokenizer", ".", "--text", "nowhere.txt"], "text = 'nowhere.txt'"),
        (["--tokenizer", ".", "--set", "top_k=0"], "top_k = 0"),
        (["--tokenizer", ".", "--set", "topk=3"], "topk"),
        ([], "--tokenizer"),
    ],
)
def test_bad_arguments_are_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.strip().splitlines()) == 1


def test_a_methods_own_command_has_its_own_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "tokenadapt", "--help"]) == 0
    own = capsys.readouterr().out
    assert "--embedder" in own
    assert "--regex" not in own
    assert main(["run", "--help"]) == 0
    shared = capsys.readouterr().out
    assert "--regex" in shared
    assert "tokenadapt" in shared


def test_own_commands_belong_to_methods_of_the_catalog() -> None:
    assert "tokenadapt" in own_commands()
    assert set(own_commands()) <= set(catalog.entries())
