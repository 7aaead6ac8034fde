"""``tokenmill run dynamic-tokenization`` on a user's lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from tests.text.test_dynamic_tokenization_models import drawn, minilm
from tokenmill.cli.methods import dynamic_tokenization
from tokenmill.errors import LimitError
from tokenmill.text import HyperNetwork

app = typer.Typer()
app.command()(dynamic_tokenization.command)
TEXT = "Überraschungsgäste kommen übermorgen\n\nÜberraschungen kommen morgen\n"


def run(*args: str, **more: Any) -> Any:
    return CliRunner().invoke(app, list(args), catch_exceptions=False, **more)


def test_lines_are_merged_and_counted(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text(TEXT, encoding="utf-8")
    told = json.loads(run(str(file), "--reduction", "1", "--json").output)
    assert told["texts"] == 2
    assert told["tokens"] == told["limit"] < told["base_tokens"]
    assert told["cut"] == pytest.approx(1 - told["tokens"] / told["base_tokens"])
    assert len(told["first_merges"]) == told["merges"]
    few = json.loads(run(str(file), "--merges", "1", "--json").output)
    assert few["first_merges"] == told["first_merges"][:1]
    from_stdin = json.loads(run("-", "--merges", "1", "--json", input=TEXT).output)
    assert from_stdin == few
    shown = run(str(file)).output
    assert "first merges" in shown
    assert "saved" in shown


def test_embeddings_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HyperNetwork, "from_pretrained", lambda name, model, tokenizer: drawn(model, tokenizer))
    file = tmp_path / "a.txt"
    file.write_text(TEXT, encoding="utf-8")
    none = json.loads(run(str(file), "--merges", "0", "--cosine", "--json").output)
    some = json.loads(run(str(file), "--reduction", "1", "--cosine", "--json").output)
    assert none["cosine"] == pytest.approx(1.0, abs=1e-5)
    assert 0.2 < some["cosine"] < 0.999
    assert minilm() is not None


def test_bad_input_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LimitError, match="a file, or -"):
        run(str(tmp_path / "none.txt"))
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(LimitError, match="not empty"):
        run(str(tmp_path / "empty.txt"))
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(LimitError, match="UTF-8"):
        run(str(tmp_path / "bad.txt"))
    with pytest.raises(LimitError, match="with --cosine"):
        run("-", "--model", "python-target", "--cosine", input="a")
