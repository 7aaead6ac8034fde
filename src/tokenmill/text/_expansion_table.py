"""Which tokens can be written as two others: every cut of every token's bytes into two tokens of the vocabulary."""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenmill.errors import LimitError, UnsupportedError
from tokenmill.text._structure import read_structure, vocabulary
from tokenmill.text._token_bytes import TokenBytes

CLASSES = ("other", "digits", "letters")
_ARRAYS = {"offsets": "int64", "left": "int32", "right": "int32", "lengths": "int32", "classes": "uint8"}
_DTYPES = {"I64": "int64", "I32": "int32", "U8": "uint8"}
_FORMAT = "tokenmill expansion table 1"
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>\Z")


@dataclass(frozen=True, eq=False)
class ExpansionTable:
    """The pairs of every token, as one list cut into pieces.

    The pairs of token i are ``left[offsets[i]:offsets[i + 1]]`` and the same slice of `right`, the shortest left part
    first. All cuts count, not only the merge that made a token.

    Attributes:
        offsets: (V + 1,) int64.
        left: (E,) int32.
        right: (E,) int32.
        lengths: (V,) int32, bytes of each token, 0 where an id stands for no text.
        classes: (V,) uint8, an index of `CLASSES`: what the token is made of behind its blanks.
        fingerprint: of the vocabulary that the table was built from.
        duplicates: id -> the id that is used in its place, for ids whose bytes another one has too.
        path: the file that the arrays are mapped from, if any.
    """

    offsets: NDArray[np.int64]
    left: NDArray[np.int32]
    right: NDArray[np.int32]
    lengths: NDArray[np.int32]
    classes: NDArray[np.uint8]
    fingerprint: str = ""
    duplicates: Mapping[int, int] = field(default_factory=dict)
    path: Path | None = None

    @classmethod
    def from_tokenizer(cls, tokenizer: Any) -> ExpansionTable:
        """All pairs of a tokenizer's vocabulary.

        Special tokens, the unknown token, unused ids and added tokens that swallow blanks are neither split nor parts.
        Where several ids have the same bytes the lowest is used, but a byte token of SentencePiece only where there is
        no piece: an encoder writes "A", never "<0x41>". In WordPiece the left part is what the token is (the beginning
        of a word or a continuation), and the right part is a continuation.

        Args:
            tokenizer: what `TokenBytes.of` reads.

        Raises:
            UnsupportedError: the structure does not say what the tokens' bytes are.
        """
        view = TokenBytes.of(tokenizer)
        marks = _marks(view)
        return cls._from_bytes(_usable(view, marks), marks, fingerprint(view))

    @classmethod
    def from_list(cls, tokens: Sequence[bytes | None]) -> ExpansionTable:
        """All pairs of a bare vocabulary: id -> bytes, None for special tokens."""
        return cls.from_tokenizer(TokenBytes.from_list(tokens))

    @classmethod
    def _from_bytes(cls, tokens: Sequence[bytes | None], marks: _Marks, print_: str) -> ExpansionTable:
        starts: dict[bytes, int] = {}
        inner: dict[bytes, int] = {} if marks.continuing is not None else starts
        continuing = marks.continuing or frozenset()
        duplicates: dict[int, int] = {}
        order: Iterable[int] = range(len(tokens))
        if marks.byte_tokens:
            order = sorted(order, key=lambda i: (i in marks.byte_tokens, i))
        for i in order:
            token = tokens[i]
            if token:
                used = (inner if i in continuing else starts).setdefault(token, i)
                if used != i:
                    duplicates[i] = used
        left: list[int] = []
        right: list[int] = []
        ends = np.zeros(len(tokens) + 1, dtype=np.int64)
        # A lookup a cut in a dictionary: as fast as sorted hashes in numpy, and exact without a second look.
        for i, token in enumerate(tokens):
            if token is not None and len(token) > 1:
                firsts = inner if i in continuing else starts
                for cut in range(1, len(token)):
                    a = firsts.get(token[:cut])
                    if a is not None:
                        b = inner.get(token[cut:])
                        if b is not None:
                            left.append(a)
                            right.append(b)
            ends[i + 1] = len(left)
        lengths = np.fromiter((len(t or b"") for t in tokens), dtype=np.int32, count=len(tokens))
        classes = np.fromiter((_class(t) for t in tokens), dtype=np.uint8, count=len(tokens))
        made = np.array(left, dtype=np.int32), np.array(right, dtype=np.int32)
        return cls(ends, *made, lengths, classes, print_, duplicates)

    def __len__(self) -> int:
        return len(self.lengths)

    def pairs(self, token: int) -> list[tuple[int, int]]:
        """The pairs of one token."""
        if not 0 <= token < len(self):
            raise LimitError("ExpansionTable.pairs", "token", token, f"in [0, {len(self)})")
        part = slice(int(self.offsets[token]), int(self.offsets[token + 1]))
        return list(zip(self.left[part].tolist(), self.right[part].tolist(), strict=True))

    @property
    def splittable(self) -> NDArray[np.bool_]:
        """(V,) bool: tokens that have a pair."""
        return np.diff(self.offsets) > 0

    def check(self, tokenizer: Any) -> None:
        """Refuse a tokenizer whose vocabulary is not the one that the table was built from.

        Raises:
            LimitError: the fingerprints differ.
        """
        found = fingerprint(TokenBytes.of(tokenizer))
        if found != self.fingerprint:
            mend = "It is the table of another tokenizer; build one with ExpansionTable.from_tokenizer(tokenizer)."
            limit = f"{found[:12]}, that of the tokenizer"
            raise LimitError("ExpansionTable", "fingerprint", self.fingerprint[:12], limit, mend)

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file under a temporary name and move it into its place."""
        from safetensors.numpy import save_file

        path = Path(path)
        about = {"format": _FORMAT, "fingerprint": self.fingerprint}
        about["duplicates"] = json.dumps({str(a): b for a, b in self.duplicates.items()})
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            save_file({name: np.ascontiguousarray(getattr(self, name)) for name in _ARRAYS}, temporary, about)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        return path

    @classmethod
    def load(cls, path: str | Path, tokenizer: Any = None) -> ExpansionTable:
        """Map a file that `save` wrote; nothing is read until it is needed.

        Args:
            path: the file.
            tokenizer: if given, its vocabulary must be the table's.

        Raises:
            LimitError: no such file, another kind of file, or the table of another tokenizer.
        """
        path = Path(path).resolve()
        if not path.is_file():
            raise LimitError("ExpansionTable.load", "path", str(path), "a file that ExpansionTable.save wrote")
        arrays, about = _mapped(path)
        duplicates = {int(a): b for a, b in json.loads(about["duplicates"]).items()}
        table = cls(**arrays, fingerprint=about["fingerprint"], duplicates=duplicates, path=path)
        if tokenizer is not None:
            table.check(tokenizer)
        return table

    def __reduce__(self) -> tuple[Any, ...]:
        """A table that is mapped from a file goes to a worker as the file's name, not as a copy."""
        if self.path is not None and self.path.is_file():
            return ExpansionTable.load, (self.path,)
        arrays = tuple(np.asarray(getattr(self, name)) for name in _ARRAYS)
        return ExpansionTable, (*arrays, self.fingerprint, dict(self.duplicates))


def fingerprint(view: TokenBytes) -> str:
    """sha256 of every token's bytes in the order of the ids, and of which tokens continue a word."""
    digest = hashlib.sha256()
    for token in view.tokens:
        digest.update(b"\xff\xff\xff\xff" if token is None else len(token).to_bytes(4, "little") + token)
    for i in sorted(_marks(view).continuing or ()):
        digest.update(i.to_bytes(4, "little"))
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class _Marks:
    """What bytes do not say: WordPiece's continuations (None elsewhere), byte tokens, and tokens to leave alone."""

    continuing: frozenset[int] | None = None
    byte_tokens: frozenset[int] = frozenset()
    greedy: frozenset[int] = frozenset()


def _marks(view: TokenBytes) -> _Marks:
    if view.json is None:
        return _Marks()
    structure = read_structure(view.json)
    vocab = vocabulary(structure)
    greedy = frozenset(
        a["id"] for a in structure.data["added_tokens"] if a["lstrip"] or a["rstrip"] or a["single_word"]
    )
    if structure.kind == "wordpiece":
        mark = structure.data["model"]["continuing_subword_prefix"]
        continuing = frozenset(i for text, i in vocab.items() if text.startswith(mark) and text != mark)
        return _Marks(continuing, greedy=greedy)
    found = frozenset(i for text, i in vocab.items() if _BYTE_TOKEN.match(text)) if structure.byte_fallback else ()
    return _Marks(None, frozenset(found), greedy)


def _usable(view: TokenBytes, marks: _Marks) -> list[bytes | None]:
    tokens = list(view.tokens)
    for i in marks.greedy:
        tokens[i] = None
    return tokens


def _class(token: bytes | None) -> int:
    text = (token or b"").strip().decode("utf-8", errors="replace")
    return 1 if text.isdigit() else 2 if text.isalpha() else 0


def _mapped(path: Path) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """The arrays of a safetensors file as maps of it, and its metadata."""
    wrong = LimitError("ExpansionTable.load", "path", str(path), "a file that ExpansionTable.save wrote")
    with path.open("rb") as file:
        head = file.read(8)
        size = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 2 <= size <= path.stat().st_size - 8:
            raise wrong
        try:
            header = json.loads(file.read(size))
        except ValueError as error:
            raise wrong from error
    about = header.get("__metadata__", {}) if isinstance(header, dict) else {}
    if about.get("format") != _FORMAT:
        raise wrong
    arrays: dict[str, NDArray[Any]] = {}
    for name, dtype in _ARRAYS.items():
        entry = header[name]
        if _DTYPES.get(entry["dtype"]) != dtype:
            raise UnsupportedError("ExpansionTable.load", f"{name} of dtype {entry['dtype']} in {path}")
        shape, start = tuple(entry["shape"]), 8 + size + entry["data_offsets"][0]
        empty = 0 in shape  # an empty map is refused by the system
        arrays[name] = np.zeros(shape, dtype) if empty else np.memmap(path, dtype, "r", start, shape)
    return arrays, about
