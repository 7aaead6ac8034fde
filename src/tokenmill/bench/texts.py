"""Texts that tasks cut their items from: embedded corpora by kind and split, or a user's own file."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from tokenmill.errors import LimitError, UnsupportedError, unknown_name


@dataclass(frozen=True, slots=True)
class Source:
    """The texts of one kind.

    Attributes:
        name: of the corpus or file.
        sha256: of all of it.
        split: which part is measured.
        texts: split ("train", "test") -> id -> text.
    """

    name: str
    sha256: str
    split: str
    texts: dict[str, dict[str, str]]


def sources(where: str, data: str, limit: int) -> dict[str, Source]:
    """Kind -> texts.

    Args:
        where: the command, for messages.
        data: names of corpora with commas, each with kinds if wanted (``manual-pages:german+english``), or a file of
            JSON lines with "text" and, if wanted, "kind" and "id".
        limit: of a file, the first so many texts of each kind are measured, and the others may warm.

    Raises:
        LimitError: an unknown corpus or kind, no such file, a line that is not as it should be.
        UnsupportedError: two corpora of one kind.
    """
    path = Path(data)
    if path.suffix in (".jsonl", ".json", ".ndjson"):
        return _from_file(where, path, limit)
    from tokenmill import corpora

    found: dict[str, Source] = {}
    for written in data.split(","):
        name, _, chosen = written.strip().partition(":")
        corpus = corpora.load(name)
        known = list(dict.fromkeys(record.kind for record in corpus.records))
        kinds = chosen.split("+") if chosen else known
        for kind in kinds:
            if kind not in known:
                raise unknown_name(where, f"kind of {name}", kind, known)
            source = found.setdefault(kind, Source(corpus.name, corpus.sha256, "test", {}))
            if source.name != corpus.name:
                raise UnsupportedError(where, f"{corpus.name} and {source.name} both hold {kind}")
        for split in ("train", "test"):
            for record in corpus.split(split):
                if record.kind in kinds:
                    found[record.kind].texts.setdefault(split, {})[record.id] = record.text
    return found


def _from_file(where: str, path: Path, limit: int) -> dict[str, Source]:
    if not path.is_file():
        raise LimitError(where, "data", str(path), "a file of JSON lines, or names of corpora")
    raw = path.read_bytes()
    digest = hashlib.sha256(raw).hexdigest()
    found: dict[str, Source] = {}
    for number, line in enumerate(raw.decode("utf-8").splitlines(), start=1):
        try:
            record = json.loads(line)
            text = record["text"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise LimitError(f"{path}:{number}", "line", line[:60], 'a JSON object with "text"') from error
        kind = str(record.get("kind", "text"))
        source = found.setdefault(kind, Source(path.name, digest, "all", {"test": {}, "train": {}}))
        split = "test" if len(source.texts["test"]) < limit else "train"
        source.texts[split][str(record.get("id", number))] = str(text)
    return found
