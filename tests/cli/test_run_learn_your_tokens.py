"""``tokenmill run learn-your-tokens``: words, scores, and text behind a prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from transformers import LlamaConfig
from typer.testing import CliRunner

from tokenmill.cli.methods import learn_your_tokens
from tokenmill.errors import LimitError
from tokenmill.text import LearnYourTokens

app = typer.Typer()
app.command()(learn_your_tokens.command)
TEXT = "def name(x):\n    return extraordinary_number_of_things_here_and_there + é\n"


def run(*args: str, **more: Any) -> Any:
    return CliRunner().invoke(app, list(args), catch_exceptions=False, **more)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("model")
    method = LearnYourTokens(num_prefix=1, c_max=8, enc_heads=2, dec_heads=2)
    backbone = LlamaConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    method.model(method.segmenter(), backbone).save_pretrained(place)
    return place


def test_a_text_is_cut_into_words(tmp_path: Path, folder: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text(TEXT, encoding="utf-8")
    told = json.loads(run(str(file), "--segment", "--json").output)
    assert "".join(told["first"]) == TEXT
    assert told["units"] == len(TEXT.encode())
    chars = json.loads(run("-", "--segment", "--base", "char", "--json", input=TEXT).output)
    assert chars["units"] == len(TEXT)
    short = json.loads(run(str(file), "--segment", "--model", str(folder), "--json").output)
    assert short["rows"] > told["rows"]  # the model's words have 8 bytes at most
    assert "|def" not in run(str(file), "--segment").output
    assert "def| name|(" in run(str(file), "--segment").output


def test_a_text_is_scored_and_a_prompt_goes_on(tmp_path: Path, folder: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text(TEXT, encoding="utf-8")
    told = json.loads(run(str(file), "--model", str(folder), "--json").output)
    assert 5 < told["bits_per_byte"] < 15
    costs = [cost for _, cost in told["surprising"]]
    assert costs == sorted(costs)
    assert "bits per byte" in run(str(file), "--model", str(folder)).output
    args = ("--prompt", "def ", "--words", "3", "--model", str(folder))
    once, twice = (json.loads(run(*args, "--json").output)["text"] for _ in range(2))
    assert once == twice
    drawn = {json.loads(run(*args, "--json", "--temperature", "1.5", "--seed", s).output)["text"] for s in ("1", "2")}
    assert len(drawn) == 2
    assert run(*args).output.startswith("def ")


def test_bad_input_is_refused(tmp_path: Path) -> None:
    assert run("--json").exit_code == 2
    with pytest.raises(LimitError, match="a file, or -"):
        run(str(tmp_path / "none"), "--segment")
    (tmp_path / "empty").write_text("")
    with pytest.raises(LimitError, match="not empty"):
        run(str(tmp_path / "empty"), "--segment")
    with pytest.raises(LimitError, match=r"recipes/word_pooled\.py"):
        run("--prompt", "a")
    (tmp_path / "bad").write_bytes(b"\xff")
    with pytest.raises(LimitError, match="UTF-8"):
        run(str(tmp_path / "bad"), "--segment")
