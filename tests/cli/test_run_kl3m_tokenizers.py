"""`tokenmill run kl3m-tokenizers`: a vocabulary from files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from transformers import AutoTokenizer
from typer.testing import CliRunner

from tokenmill import corpora
from tokenmill.cli.methods.kl3m_tokenizers import command
from tokenmill.errors import LimitError


def test_a_folder_is_written_and_not_replaced(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(command)
    file, out = tmp_path / "a.jsonl", tmp_path / "made" / "tok"
    texts = [r.text[:3000] for r in corpora.load("python-stdlib").split("train")[:60]]
    file.write_text("\n".join(json.dumps({"text": t}) for t in texts), encoding="utf-8")
    asked = [str(file), "--out", str(out), "--vocab-size", "1024", "--no-defaults", "--report", "--json"]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["tokens"] == len(AutoTokenizer.from_pretrained(out)) == 1024
    assert told["report"]["rows"][0]["documents"] == 3
    assert [p.name for p in out.parent.iterdir()] == ["tok"]
    assert isinstance(CliRunner().invoke(app, asked).exception, LimitError)
    assert CliRunner().invoke(app, [*asked, "--force", "--family", "char"]).exit_code == 0
    with pytest.raises(LimitError, match="family"):
        CliRunner().invoke(app, [*asked, "--force", "--family", "x"], catch_exceptions=False)


def test_a_baseline_custom_tokens_and_plots(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(command)
    texts = [r.text[:3000] for r in corpora.load("python-stdlib").split("train")[:60]]
    file, custom, plots = tmp_path / "a.jsonl", tmp_path / "custom.txt", tmp_path / "plots"
    file.write_text("\n".join(json.dumps({"text": t}) for t in texts), encoding="utf-8")
    custom.write_text("self.\nU.S.C.\n")
    asked = [str(file), "--vocab-size", "1024", "--no-defaults", "--custom", str(custom)]
    assert CliRunner().invoke(app, [*asked, "--out", str(tmp_path / "one")]).exit_code == 0
    made = AutoTokenizer.from_pretrained(tmp_path / "one")
    assert len(made("see U.S.C. now")["input_ids"]) == len(made("see now")["input_ids"]) + 2  # it and the space
    more = ["--out", str(tmp_path / "two"), "--report", "--baseline", str(tmp_path / "one" / "tokenizer.json")]
    done = CliRunner().invoke(app, [*asked, *more, "--plots", str(plots)])
    assert done.exit_code == 0, done.output
    assert "tokenizer.json" in done.stdout
    assert "reduction against" in done.stdout
    assert {p.suffix for p in plots.iterdir()} == {".svg"}
    with pytest.raises(LimitError, match="plots"):
        CliRunner().invoke(app, [*asked, "--out", str(tmp_path / "x"), "--plots", "p"], catch_exceptions=False)
    with pytest.raises(LimitError, match="baseline"):
        CliRunner().invoke(app, [*asked, "--out", str(tmp_path / "x"), "--baseline", "b"], catch_exceptions=False)
