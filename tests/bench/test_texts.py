"""Texts that tasks cut their items from."""

from __future__ import annotations

import pytest

from tokenmill import corpora
from tokenmill.bench.texts import sources
from tokenmill.errors import LimitError


def test_kinds_of_a_corpus_can_be_chosen() -> None:
    found = sources("here", "python-reference,multilingual-lines:polish+german", 5)
    assert list(found) == ["prose", "polish", "german"]
    split = corpora.load("multilingual-lines").split("test")
    assert found["german"].texts["test"] == {r.id: r.text for r in split if r.kind == "german"}
    assert found["german"].texts["train"]
    with pytest.raises(LimitError, match=r"here: kind of multilingual-lines.*klingon"):
        sources("here", "multilingual-lines:klingon", 5)
