"""A text as words, each a short row of base units; joined again they are the text, whatever it holds."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import regex
from numpy.typing import NDArray

from tokenmill.errors import LimitError, unknown_name
from tokenmill.text._char_lengths import check_text

Base = Literal["byte", "char", "sub"]
_WHERE = "WordSegmenter"
_FILE = "words.json"
# A word with the blank before it, a number, a run of signs, or a run of blanks that leaves one to the next word.
_WORD = regex.compile(r" ?\p{L}[\p{L}\p{M}]*+| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++(?!\S)|\s+(?=\s)|\s")
Ints = NDArray[np.int64]


class WordSegmenter:
    """Cuts a text into words and a word into base units; a word of more than `c_max` units goes on in another one.

    Args:
        base: byte: the 256 bytes of UTF-8. char: characters, with the bytes behind them for all others. sub: the
            tokens of a tokenizer, which cuts each word by itself.
        c_max: units of a word at most (the paper has no limit; one long line would then cost as much as a page).
        characters: for char, those that are units of their own.
        tokenizer: for sub, a byte-level `tokenizers.Tokenizer`.

    Attributes:
        size: V, base units.

    Raises:
        LimitError: a value outside its limit, or a part that the base does not take.
    """

    def __init__(
        self, base: Base = "byte", *, c_max: int = 24, characters: Iterable[str] = (), tokenizer: Any = None
    ) -> None:
        if base not in ("byte", "char", "sub"):
            raise unknown_name(_WHERE, "base", str(base), ("byte", "char", "sub"))
        if c_max < 1:
            raise LimitError(_WHERE, "c_max", c_max, "at least 1")
        if (tokenizer is None) == (base == "sub"):
            raise LimitError(_WHERE, "tokenizer", type(tokenizer).__name__, "a tokenizer with base='sub', else None")
        self.base, self.c_max, self.tokenizer = base, c_max, tokenizer
        self.characters = tuple(sorted(set(characters)))
        if self.characters and base != "char":
            raise LimitError(_WHERE, "characters", len(self.characters), "none without base='char'")
        if any(len(one) != 1 for one in self.characters):
            raise LimitError(_WHERE, "characters", "a string", "single characters")
        self.size = tokenizer.get_vocab_size() if base == "sub" else 256 + len(self.characters)

    @classmethod
    def of_characters(cls, texts: Iterable[str], *, c_max: int = 24, least: int = 1) -> WordSegmenter:
        """Base char with the characters that occur at least `least` times in some texts."""
        counts: dict[str, int] = {}
        for text in texts:
            for one in text:
                counts[one] = counts.get(one, 0) + 1
        return cls("char", c_max=c_max, characters=(one for one, n in counts.items() if n >= least))

    def words(self, text: str) -> list[str]:
        """The words of a text, before long ones are cut; joined they are the text."""
        return _WORD.findall(check_text(_WHERE, text))

    def encode(self, text: str) -> tuple[Ints, Ints]:
        """Units (T, c_max) with 0 behind the end, and lengths (T,); no row is empty.

        Raises:
            LimitError: no text, or half of a surrogate pair in it.
        """
        units, ends = self._units(text)
        sizes = np.diff(ends, prepend=0)
        # A long word becomes rows of c_max and a rest: `parts` of them, never an empty one.
        parts = np.maximum(-(-sizes // self.c_max), 1)
        total = int(parts.sum())
        owner = np.repeat(np.arange(len(sizes)), parts)
        within = np.arange(total) - np.repeat(np.cumsum(parts) - parts, parts)
        lengths = np.minimum(sizes[owner] - within * self.c_max, self.c_max)
        rows = np.zeros((total, self.c_max), dtype=np.int64)
        rows[np.arange(self.c_max) < lengths[:, None]] = units
        return rows, lengths

    def flat(self, text: str) -> Ints:
        """All units of a text in a row, without words."""
        return self._units(text)[0]

    def bytes(self, unit: int) -> bytes:
        """What one unit stands for."""
        return self._table[unit]

    def decode(self, units: Sequence[Any] | Ints, lengths: Sequence[int] | Ints) -> str:
        """The text of rows of units; bytes that are no UTF-8, as a model may write, become U+FFFD.

        Raises:
            LimitError: a unit outside the vocabulary.
        """
        flat = [int(u) for row, n in zip(units, lengths, strict=True) for u in row[: int(n)]]
        for unit in flat:
            if not 0 <= unit < self.size:
                what = f"unit id {unit} outside base vocabulary of size {self.size}"
                raise LimitError(f"{_WHERE}.decode", "units", unit, f"in [0, {self.size})", what)
        return b"".join(self._table[unit] for unit in flat).decode("utf-8", "replace")

    def bytes_of(self, units: Ints) -> Ints:
        """Bytes of the text that each unit stands for."""
        return self._sizes[units]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``words.json``, whole or not at all."""
        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        data = {"base": self.base, "c_max": self.c_max, "characters": "".join(self.characters)}
        if self.base == "sub":
            data["tokenizer"] = self.tokenizer.to_str()
        half = place / f"{_FILE}.{os.getpid()}.tmp"
        half.write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
        half.replace(place / _FILE)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> WordSegmenter:
        """Read what `save` wrote.

        Raises:
            LimitError: nothing there.
        """
        path = Path(folder) / _FILE
        if not path.is_file():
            raise LimitError(f"{_WHERE}.load", "folder", str(folder), f"a folder with {_FILE}")
        data = json.loads(path.read_text(encoding="utf-8"))
        tokenizer = None
        if data["base"] == "sub":
            from tokenizers import Tokenizer

            tokenizer = Tokenizer.from_str(data["tokenizer"])
        return cls(data["base"], c_max=data["c_max"], characters=data["characters"], tokenizer=tokenizer)

    def _units(self, text: str) -> tuple[Ints, Ints]:
        """All units of a text in a row, and where each word's end."""
        check_text(_WHERE, text)
        ends = np.array([found.end() for found in _WORD.finditer(text)], dtype=np.int64)  # in characters
        if self.base == "sub":
            return self._tokens(text, ends)
        data = np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64)
        if text.isascii() and not self.characters:
            return data, ends
        points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32).astype(np.int64)  # (characters,)
        sizes = 1 + (points >= 0x80) + (points >= 0x800) + (points >= 0x10000)
        if not self.characters:
            return data, np.cumsum(sizes)[ends - 1]
        known = self._points
        at = np.minimum(np.searchsorted(known, points), len(known) - 1)
        is_unit = known[at] == points
        made = np.where(is_unit, 1, sizes)  # units of each character
        starts = np.cumsum(made) - made
        units = np.zeros(int(made.sum()), dtype=np.int64)
        units[np.repeat(~is_unit, made)] = data[np.repeat(~is_unit, sizes)]
        units[starts[is_unit]] = 256 + at[is_unit]
        return units, np.cumsum(made)[ends - 1]

    def _tokens(self, text: str, ends: Ints) -> tuple[Ints, Ints]:
        starts = np.concatenate([[0], ends[:-1]]) if len(ends) else ends
        words = [text[a:b] for a, b in zip(starts.tolist(), ends.tolist(), strict=True)]
        different = list(dict.fromkeys(words))
        made = self.tokenizer.encode_batch_fast(different, add_special_tokens=False)
        ids = dict(zip(different, (one.ids for one in made), strict=True))
        rows = [ids[word] for word in words]
        sizes = np.array([len(row) for row in rows], dtype=np.int64)
        return np.array([i for row in rows for i in row], dtype=np.int64), np.cumsum(sizes)

    @cached_property
    def _points(self) -> Ints:
        return np.array([ord(one) for one in self.characters], dtype=np.int64)

    @cached_property
    def _table(self) -> list[bytes]:
        if self.base == "sub":
            from tokenmill.text._token_bytes import TokenBytes

            return [data or b"" for data in TokenBytes.of(self.tokenizer).tokens]
        return [bytes([i]) for i in range(256)] + [one.encode() for one in self.characters]

    @cached_property
    def _sizes(self) -> Ints:
        return np.array([len(data) for data in self._table], dtype=np.int64)
