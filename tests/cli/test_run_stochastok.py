"""`tokenmill run stochastok` on files."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from tests.text.vocabularies import python_target
from tokenmill.cli.methods import stochastok
from tokenmill.errors import LimitError, MissingExtraError
from tokenmill.text import ExpansionTable, StochasTok, TokenBytes

APP = typer.Typer()
APP.command()(stochastok.command)
TEXT = "def quicksort(values):\n    return sorted(values, key=len)\n\n# naïve façade, 12345 and more\n" * 10


def run(*arguments: Any) -> str:
    done = CliRunner().invoke(APP, [*map(str, arguments), "--tokenizer", "python-target"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "notes.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def test_a_text_comes_out_whole_and_longer(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "expanded.jsonl"
    said = run(text, "--p", "0.5", "--out", out, "--table", tmp_path / "t.safetensors")
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    view = TokenBytes.of(python_target())
    assert b"".join(view.join(line["input_ids"]) for line in lines).decode() == TEXT
    assert "".join(line["text"] for line in lines) == TEXT
    assert all(line["attention_mask"] == [1] * len(line["input_ids"]) for line in lines)
    how = StochasTok(ExpansionTable.from_tokenizer(python_target()), p=0.5)
    rows = [view.encode(line) for line in TEXT.splitlines(keepends=True)]
    assert [line["input_ids"] for line in lines] == [ids.tolist() for ids in how.expand_batch(rows).input_ids]
    before, after = sum(map(len, rows)), sum(len(line["input_ids"]) for line in lines)
    assert f"{after / before - 1:+.1%}" in said
    assert "before: " in said
    assert "expanded.jsonl" in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["expanded.jsonl", "notes.txt", "t.safetensors"]
    assert ExpansionTable.load(tmp_path / "t.safetensors", python_target()).splittable.any()
    assert run(text, "--p", "0.5", "--table", tmp_path / "t.safetensors").splitlines()[:2] == said.splitlines()[:2]


def test_counts_as_data(text: Path) -> None:
    facts, other, none = (json.loads(run(text, "--json", *o)) for o in ((), ("--seed", "1"), ("--p", "0")))
    assert facts["examples"] == 40
    assert facts["tokens_before"] < facts["tokens_after"] <= facts["tokens_before"] * 1.1
    assert 0 < facts["splittable"] < 1
    assert facts["sample"]["before"] != facts["sample"]["after"]
    assert other["tokens_before"] == facts["tokens_before"]
    assert none["growth"] == 0
    assert none["sample"]["after"] == []


def test_tokens_that_are_there_already(tmp_path: Path) -> None:
    view = TokenBytes.of(python_target())
    ids = view.encode("return sorted(values, key=len)")
    labels = [-100] * 4 + ids[4:]
    file, out = tmp_path / "data.jsonl", tmp_path / "out.jsonl"
    file.write_text(json.dumps({"input_ids": ids, "labels": labels, "id": "x"}) + "\n\n")
    run(file, "--p", "3", "--out", out, "--max-length", "12")
    made = json.loads(out.read_text())
    assert made["input_ids"][:4] == ids[:4]
    assert made["labels"][:4] == [-100] * 4
    assert made["labels"][4:] == made["input_ids"][4:]
    assert len(made["input_ids"]) == 12
    assert made["id"] == "x"


def test_what_is_refused(text: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    for content, words in (
        ("{}\n", "bad.jsonl:1"),
        ('{"text": "a"}\n[\n', "bad.jsonl:2"),
        ('{"text": "a"}\n{"text": "a", "b": 1}\n', "example 2"),
    ):
        bad.write_text(content)
        with pytest.raises(LimitError, match=words):
            run(bad, "--out", tmp_path / "o.jsonl")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.jsonl", "notes.txt"], "nothing half-written is left"
    for arguments, words in (
        ((tmp_path / "none.txt",), "file"),
        ((text, "--out", tmp_path / "o.csv"), "out"),
        ((text, "--p", "-1"), "p = -1"),
        ((text, "--tokenizer", tmp_path / "no.json"), "tokenizer"),
    ):
        with pytest.raises(LimitError, match=words):
            CliRunner().invoke(APP, ["--tokenizer", "python-target", *map(str, arguments)], catch_exceptions=False)
    table = ExpansionTable.from_list([b"a", b"aa"]).save(tmp_path / "other.safetensors")
    with pytest.raises(LimitError, match="fingerprint"):
        run(text, "--table", table)


def test_arrow(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.arrow"
    if importlib.util.find_spec("pyarrow") is None:
        with pytest.raises(MissingExtraError, match="pyarrow"):
            run(text, "--out", out)
        assert not out.exists()
        return
    import pyarrow as pa  # type: ignore[import-not-found]

    run(text, "--out", out)
    with pa.memory_map(str(out)) as source:
        assert pa.ipc.open_stream(source).read_all().num_rows == 40
