from __future__ import annotations

import ast
import gzip
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tokenmill import corpora
from tokenmill.corpora import Corpus, Record, _manual, _stdlib
from tokenmill.errors import LimitError, UnsupportedError

KINDS = {"python-stdlib": "code", "python-reference": "prose", "stdlib-json": "json"}


def test_names_are_those_of_python_and_the_lines() -> None:
    assert corpora.names() == sorted([*KINDS, "manual-pages", "multilingual-lines"])


def test_lines_in_ten_languages() -> None:
    corpus = corpora.load("multilingual-lines")
    counts = Counter(record.kind for record in corpus.records)
    assert len(counts) == 10
    assert set(counts.values()) == {64}
    assert len({record.text for record in corpus.records}) == 640
    assert corpus.licence == "Apache-2.0"
    assert "written for this repository" in corpus.source
    for part in ("train", "test"):
        assert {record.kind for record in corpus.split(part)} == set(counts)


@pytest.mark.parametrize("name", sorted(KINDS))
def test_every_corpus_has_distinct_records_of_its_kind_and_says_where_they_are_from(name: str) -> None:
    corpus = corpora.load(name)
    ids = [record.id for record in corpus.records]
    assert ids == sorted(set(ids))
    assert {record.kind for record in corpus.records} == {KINDS[name]}
    assert corpus.licence == "PSF-2.0"
    assert "Python" in corpus.source
    assert len(corpus.sha256) == 64


@pytest.mark.parametrize("name", sorted(KINDS))
def test_splits_cover_the_corpus_and_share_no_document(name: str) -> None:
    corpus = corpora.load(name)
    train, test = corpus.split("train"), corpus.split("test")
    assert sorted(r.id for r in train + test) == [r.id for r in corpus.records]
    documents = [{r.id.partition("#")[0] for r in part} for part in (train, test)]
    assert documents[0].isdisjoint(documents[1])
    assert len(test) >= 12
    assert 0.1 < len(test) / len(corpus.records) < 0.35


def test_json_records_are_indented_json_about_real_modules() -> None:
    records = {record.id: record.text for record in corpora.load("stdlib-json").records}
    document = json.loads(records["bisect.json"])
    functions = {member["name"]: member for member in document["members"]}
    assert [a["name"] for a in functions["bisect_left"]["arguments"]] == ["a", "x", "lo", "hi", "key"]
    assert [a["default"] for a in functions["bisect_left"]["arguments"]] == [None, None, "0", "None", "None"]
    assert '\n  "members": [' in records["bisect.json"]


def test_code_is_python_and_leaves_tests_and_tables_out() -> None:
    records = corpora.load("python-stdlib").records
    assert not [r.id for r in records if {"test", "tests", "site-packages", "encodings"} & set(r.id.split("/"))]
    ast.parse(next(r.text for r in records if r.id == "json/decoder.py"))


def test_sections_join_to_their_topic() -> None:
    from pydoc_data.topics import topics

    records = corpora.load("python-reference").records
    parts = [r.text for r in records if r.id.startswith("specialnames#")]
    assert len(parts) > 3
    assert "\n\n".join(parts) == topics["specialnames"]


def test_the_checksum_knows_every_letter_and_every_border() -> None:
    def checksum(*pairs: tuple[str, str]) -> str:
        records = tuple(Record(name, text, "code") for name, text in pairs)
        return Corpus("toy", records, licence="CC0-1.0", source="here").sha256

    assert checksum(("a", "bc")) == checksum(("a", "bc"))
    assert (
        len({checksum(("a", "bc")), checksum(("a", "bd")), checksum(("ab", "c")), checksum(("a", "b"), ("c", ""))}) == 4
    )


def test_unknown_names_answer_with_the_nearest() -> None:
    with pytest.raises(LimitError, match="Did you mean python-stdlib"):
        corpora.load("python-stlib")
    with pytest.raises(LimitError, match="'valid'"):
        corpora.load("python-stdlib").split("valid")


def test_a_python_without_sources_is_told_so(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    corpora.load.cache_clear()
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    with pytest.raises(UnsupportedError, match="python-stdlib"):
        corpora.load("python-stdlib")
    corpora.load.cache_clear()


def test_importing_corpora_loads_no_torch() -> None:
    code = (
        "import sys, tokenmill.corpora as c; c.names(); c.load('python-reference'); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


PAGE = r"""'\" t
.\" a comment
.de XX
.B not shown
..
.TH X 1
.if n \{\
.B not shown
.\}
.SH "NAME"
x \- zeigt \fBalles\fR f\(:ur jeden\(aqs \(bu \[u00E9]
.IP "\-\-all" 4
Alles.\" not shown
.SH SEE ALSO
.BR y (1),
.I z
"""


def test_manual_pages_become_paragraphs() -> None:
    wanted = "NAME\n\nx - zeigt alles für jeden's • é\n\n--all Alles.\n\nSEE ALSO\n\ny(1), z"
    assert _manual.plain_text(PAGE) == wanted
    assert _manual.plain_text(".Dd May 1\n.Sh NAME\n") == ""


def test_english_manual_pages_are_those_with_a_translation(tmp_path: Path) -> None:
    body = ".SH NAME\n" + "a b c d e f g\n" * 60
    for name in ("de/man1/x.1.gz", "pt_BR/man1/z.1.gz", "man1/x.1.gz", "man1/y.1.gz", "xx/man1/y.1.gz"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(body.encode()))
    (tmp_path / "de/man1/broken.1.gz").write_bytes(b"no gzip")
    (tmp_path / "de/man1/w.1.gz").symlink_to("x.1.gz")
    found = {(record.id, record.kind) for record in _manual.pages(tmp_path)}
    assert found == {("de/man1/x.1#01", "german"), ("pt_BR/man1/z.1#01", "portuguese"), ("en/man1/x.1#01", "english")}


def test_a_machine_without_manual_pages_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_stdlib._BUILDERS, "manual-pages", lambda: _manual.pages(tmp_path))
    corpora.load.cache_clear()
    with pytest.raises(UnsupportedError, match="apt install manpages-de"):
        corpora.load("manual-pages")
