"""What a corpus is: records that never change, and a split that depends on a record's id alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

from tokenmill.errors import unknown_name

SPLITS = ("train", "test")
TEST_SHARE = 0.2
MIN_CHARS = 400  # shorter documents cannot give a prompt and something to continue it with
_SECTION_CHARS = 4_000


@dataclass(frozen=True, slots=True)
class Record:
    """One document, or one part of it: a unique id, its text, and its kind (``code``, ``prose``, ``json``).

    The id of a part is ``<document>#<number>``.
    """

    id: str
    text: str
    kind: str


@dataclass(frozen=True)
class Corpus:
    """Named records with their licence and source.

    >>> corpus = Corpus("toy", (Record("a.py", "x = 1", "code"),), licence="CC0-1.0", source="this docstring")
    >>> [len(corpus.split(name)) for name in ("train", "test")]
    [1, 0]
    """

    name: str
    records: tuple[Record, ...]
    licence: str
    source: str

    @cached_property
    def sha256(self) -> str:
        """Checksum of every id and text, in order: two machines with one checksum hold the same corpus."""
        digest = hashlib.sha256()
        for record in self.records:
            for part in (record.id, record.text):
                data = part.encode()
                digest.update(len(data).to_bytes(8, "little") + data)
        return digest.hexdigest()

    def split(self, name: str) -> list[Record]:
        """Records of ``"train"`` (about four in five) or ``"test"``, in the corpus's order.

        The side is a hash of the document's id: a document keeps its side when its text or its neighbours change,
        and its parts stay together.

        Raises:
            LimitError: any other name.
        """
        if name not in SPLITS:
            raise unknown_name("Corpus.split", "name", name, SPLITS)
        return [record for record in self.records if is_test(record.id) == (name == "test")]


def is_test(record_id: str) -> bool:
    """Whether a record belongs to the test split; all parts of a document do, or none."""
    document = record_id.partition("#")[0]
    return int.from_bytes(hashlib.sha256(document.encode()).digest()[:8], "little") < TEST_SHARE * 2**64


def by_id(records: Iterable[Record]) -> tuple[Record, ...]:
    """Records in the order of their ids, so that the file system's order does not matter."""
    return tuple(sorted(records, key=lambda record: record.id))


def sections(text: str) -> Iterator[str]:
    """Cut a long text between paragraphs into parts of about `_SECTION_CHARS`; a short tail joins the last part."""
    parts: list[str] = []
    for paragraph in text.split("\n\n"):
        if parts and (len(parts[-1]) < _SECTION_CHARS):
            parts[-1] += f"\n\n{paragraph}"
        else:
            parts.append(paragraph)
    if len(parts) > 1 and len(parts[-1]) < _SECTION_CHARS // 2:
        tail = parts.pop()
        parts[-1] += f"\n\n{tail}"
    return (part for part in parts if len(part) >= MIN_CHARS)
