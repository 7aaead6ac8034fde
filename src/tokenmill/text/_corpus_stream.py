"""A training corpus as a stream: strings or files in, pieces of bounded size out, bad records counted."""

from __future__ import annotations

import gzip
import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenmill.errors import LimitError

PIECE = 1 << 16  # characters of a piece; large enough that handing it over costs nothing
_SAMPLED = 1 << 12  # of a text file of which a share is read, so that small files are sampled too
_LOOK_BACK = 4096  # characters in which a place to cut is sought
_BAD_SHARE = 0.01
_CUT = re.compile(r"(?<=\S)\s")


@dataclass(slots=True)
class CorpusCounts:
    """What went through a stream: documents and characters that were handed on, and bad records by reason."""

    documents: int = 0
    characters: int = 0
    bad: Counter[str] = field(default_factory=Counter)


class CorpusStream:
    """Texts and files as one stream of strings; iterate it once for each pass.

    Args:
        texts: strings; a record that is None, no string, or holds lone surrogates is bad.
        files: paths of UTF-8 text, or of JSON lines with "text" (``.jsonl``, ``.jsonl.gz``); ``"path:0.1"`` reads
            a tenth of it, chosen by the seed.
        seed: of the choice.
        where: the caller, for messages.

    Raises:
        LimitError: neither texts nor files, no such file, a rate outside (0, 1]; at the end of a pass: no text, or
            more than one bad record in a hundred.
    """

    def __init__(
        self,
        texts: Iterable[Any] | None = None,
        files: Sequence[str | Path] = (),
        *,
        seed: int = 0,
        where: str = "CorpusStream",
    ) -> None:
        if isinstance(texts, str | bytes):
            raise LimitError(where, "texts", texts[:40], "an iterable of strings", "Put the text into a list.")
        if isinstance(files, str | Path):
            files = [files]
        if texts is None and not files:
            raise LimitError(where, "texts", texts, "given, or files")
        self.texts, self.seed, self.where = texts, seed, where
        self.files = [read_source(where, file) for file in files]
        self.counts = CorpusCounts()

    def __iter__(self) -> Iterator[str]:
        self.counts = counts = CorpusCounts()
        for text in self.texts if self.texts is not None else ():
            yield from self._checked(text)
        for number, (path, rate) in enumerate(self.files):
            rng = random.Random(f"{self.seed} {number}")
            for text in _records(path, _SAMPLED if rate < 1 else PIECE):
                if rate == 1 or rng.random() < rate:
                    yield from self._checked(text)
        bad = sum(counts.bad.values())
        reasons = ", ".join(f"{n} {reason}" for reason, n in counts.bad.most_common())
        if not counts.characters:
            mend = f"Bad records: {reasons}." if bad else ""
            raise LimitError(self.where, "characters", 0, "at least 1: the corpus is empty", mend)
        if bad > _BAD_SHARE * (bad + counts.documents):
            limit = f"at most 1% of {bad + counts.documents} records"
            raise LimitError(self.where, "bad records", bad, limit, f"Found: {reasons}.")

    def _checked(self, text: Any) -> Iterator[str]:
        reason = text.why if isinstance(text, _Bad) else _fault(text)
        if reason or not isinstance(text, str):
            self.counts.bad[reason] += 1
            return
        self.counts.documents += 1
        self.counts.characters += len(text)
        yield from pieces(text)


@dataclass(frozen=True, slots=True)
class _Bad:
    why: str


def _fault(text: Any) -> str:
    if not isinstance(text, str):
        return "without text" if text is None else f"of type {type(text).__name__}"
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            return "with lone surrogates or bytes that are no UTF-8"
    return ""


def read_source(where: str, source: str | Path) -> tuple[Path, float]:
    """A path and the share of it that is read: ``"file:0.1"`` is a tenth, a path alone is everything."""
    text = str(source)
    head, colon, rate = text.rpartition(":")
    if colon and not Path(text).exists() and re.fullmatch(r"[0-9.eE+-]+", rate):
        try:
            share = float(rate)
        except ValueError:
            share = 0.0
        if not 0 < share <= 1:
            raise LimitError(where, "sampling rate", rate, "a number in (0, 1]", f"It stands in {text!r}.")
        path = Path(head)
    else:
        path, share = Path(text), 1.0
    if not path.is_file():
        raise LimitError(where, "file", str(path), "a file that exists")
    return path, share


def pieces(text: str, size: int = PIECE) -> Iterator[str]:
    """Cut a long text where white space begins, where no pre-tokenizer's piece goes on; joined they are the text."""
    start = 0
    while len(text) - start > size:
        stop = _place(text, start, start + size)
        yield text[start:stop]
        start = stop
    if start < len(text):
        yield text[start:] if start else text


def _place(text: str, start: int, stop: int) -> int:
    """The last place in ``(start, stop]`` where white space begins; `stop` when there is none near."""
    low = max(start + 1, stop - _LOOK_BACK)
    last = None
    for last in _CUT.finditer(text, low, stop):  # noqa: B007
        pass
    return last.start() if last else stop


def _records(path: Path, size: int) -> Iterator[Any]:
    name = path.name.removesuffix(".gz")
    opener = gzip.open if path.suffix == ".gz" else open
    if name.endswith((".jsonl", ".ndjson")):
        with opener(path, "rb") as file:
            for line in file:
                if line.strip():
                    yield _text_of(line)
        return
    # Bytes that are no UTF-8 become lone surrogates here, which are counted as bad.
    with opener(path, "rt", encoding="utf-8", errors="surrogateescape", newline="") as file:
        held = ""
        while block := file.read(size):
            held += block
            if len(held) > size:
                stop = _place(held, 0, len(held))
                yield held[:stop]
                held = held[stop:]
        if held:
            yield held


def _text_of(line: bytes) -> Any:
    try:
        record = json.loads(line)
    except ValueError:
        return _Bad("of invalid JSON")
    if not isinstance(record, dict) or "text" not in record:
        return _Bad('without "text"')
    return record["text"]
