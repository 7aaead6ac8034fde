"""Which script a text is written in, for many texts or windows at once.

Letters and marks count for the script that Unicode gives them; blanks and invisible format characters count for
nothing. A text of which fewer than half of the other characters are letters is "structured".
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import regex
from numpy.typing import NDArray

SCRIPTS = (
    "latin",
    "cyrillic",
    "greek",
    "han",
    "japanese",
    "hangul",
    "arabic",
    "hebrew",
    "devanagari",
    "thai",
    "other",
    "structured",
)
"""Classes of texts; where kana are a tenth of kana and Han, the text is Japanese."""
STRUCTURED = len(SCRIPTS) - 1
_OTHER = STRUCTURED - 1
_HAN, _JAPANESE = SCRIPTS.index("han"), SCRIPTS.index("japanese")
_KANA_SHARE = 0.1
# Codes of characters: 0 .. _OTHER letters of that class, then non-letters, then what does not count.
_SIGN, _SKIP = STRUCTURED, STRUCTURED + 1
WIDTH = _SKIP + 1
"""How many codes there are."""
_TOGETHER = 256  # texts that are counted at once: the arrays of short texts stay in the cache
_PATTERNS = {name: rf"\p{{Script={name}}}+" for name in SCRIPTS[:_OTHER]} | {
    "japanese": r"[\p{Script=Hiragana}\p{Script=Katakana}\u30fc\uff70]+"
}


@cache
def table() -> NDArray[np.uint8]:
    """(0x110000,) uint8: code point -> code, from the Unicode data of the package `regex`."""
    points = "".join(map(chr, range(0x110000)))
    found = np.full(0x110000, _SIGN, dtype=np.uint8)
    letters = _mask(r"[\p{L}\p{M}]+", points)
    found[letters] = _OTHER
    for name in SCRIPTS[:_OTHER]:
        found[_mask(_PATTERNS[name], points) & letters] = SCRIPTS.index(name)
    found[_mask(r"[\s\p{Cf}]+", points)] = _SKIP
    return found


def _mask(pattern: str, points: str) -> NDArray[np.bool_]:
    found = np.zeros(len(points), dtype=bool)
    for match in regex.finditer(pattern, points):
        found[match.start() : match.end()] = True
    return found


def codes(text: str) -> NDArray[np.uint8]:
    """(n,) uint8: the code of every character."""
    if text.isascii():
        return table()[np.frombuffer(text.encode("ascii"), dtype=np.uint8)]
    return table()[np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)]


def classes(counts: NDArray[np.int64]) -> NDArray[np.uint8]:
    """(B,) uint8, indices into `SCRIPTS`, from how often each code occurs (B, `WIDTH`)."""
    letters = counts[:, :STRUCTURED].copy()
    east = letters[:, _HAN] + letters[:, _JAPANESE]
    kana = letters[:, _JAPANESE] > _KANA_SHARE * east
    letters[:, _JAPANESE] = np.where(kana, east, 0)
    letters[:, _HAN] = np.where(kana, 0, east)
    found = letters.argmax(axis=1)
    return np.where(letters.sum(axis=1) < counts[:, _SIGN], STRUCTURED, found).astype(np.uint8)


class ScriptCounts:
    """Classes of any spans of one text, from running counts of its codes."""

    def __init__(self, text: str) -> None:
        found = codes(text)
        present = (0, _SIGN) if text.isascii() else np.flatnonzero(np.bincount(found, minlength=WIDTH)).tolist()
        size = np.int32 if len(found) < np.iinfo(np.int32).max else np.int64
        self._below: dict[int, NDArray[np.integer]] = {}  # code -> (n + 1,) how many of it before each character
        for code in present:
            below = np.zeros(len(found) + 1, dtype=size)
            np.cumsum(found == code, out=below[1:])
            self._below[code] = below

    def classes(self, starts: NDArray[np.int64], stops: NDArray[np.int64]) -> NDArray[np.uint8]:
        """(S,) uint8: the class of each span."""
        counts = np.zeros((len(starts), WIDTH), dtype=np.int64)
        for code, below in self._below.items():
            counts[:, code] = below[stops] - below[starts]
        return classes(counts)


def text_classes(texts: Sequence[str]) -> NDArray[np.uint8]:
    """(B,) uint8: the class of each text. One without letters or signs is "latin", as "" is."""
    found = np.zeros((len(texts), WIDTH), dtype=np.int64)
    for first in range(0, len(texts), _TOGETHER):
        part = texts[first : first + _TOGETHER]
        sizes = np.fromiter(map(len, part), dtype=np.int64, count=len(part))
        keys = np.repeat(np.arange(len(part), dtype=np.int32) * WIDTH, sizes)
        keys += codes("".join(part))
        counts = np.bincount(keys, minlength=len(part) * WIDTH)
        found[first : first + _TOGETHER] = counts.reshape(len(part), WIDTH)
    return classes(found)


def script(text: str) -> str:
    """The class of one text, as a name."""
    return SCRIPTS[int(text_classes([text])[0])]
