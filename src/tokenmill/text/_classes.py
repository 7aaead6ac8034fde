"""Classes of characters that the patterns of a pre-tokenizer cannot tell apart.

Two texts of the same classes are cut at the same places, so one of them stands for all. What a pattern looks at is
read from it: properties such as ``\\p{L}`` are asked of the engine that runs the pattern, letters and ranges split the
code points into intervals.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# English contractions, the only letters that many patterns name. They look no further than two behind an apostrophe.
_CONTRACTIONS = (
    r"'(?i:[sdmt]|ll|ve|re)",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
    r"'(?:[sdmt]|ll|ve|re)",
    r"'s|'t|'re|'ve|'m|'ll|'d",
)
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""The pattern that the pre-tokenizer ByteLevel runs."""
_PART = re.compile(
    r"(?P<atom>\\[pP]\{\^?\w+\}|\\[sSdDwW])|\\x\{(?P<hex>[0-9a-fA-F]+)\}|\\(?P<control>[rntfv])|(?P<word>\\[bB])"
    r"|(?P<group>\(\?(?:[:=!>]|<[=!]))|(?P<count>\{\d*,?\d*\})|\\(?P<escaped>[^\w])"
    r"|(?P<strange>\\.|\(\?|\[:)|(?P<letter>.)",
    re.DOTALL,
)
_CONTROLS = {"r": "\r", "n": "\n", "t": "\t", "f": "\f", "v": "\v"}
_APOSTROPHE = ord("'")
_LITERAL = 1 << 24  # marks a character that stands for itself alone

Probe = Callable[[str, str], Sequence[bool]]
"""A property and characters -> which of them have it, by the engine that runs the patterns."""


@dataclass(frozen=True)
class Looks:
    """What patterns look at.

    Attributes:
        atoms: properties.
        letters: characters and ends of ranges.
        contractions: English contractions as well.
    """

    atoms: frozenset[str]
    letters: frozenset[str]
    contractions: bool


def read_patterns(patterns: Sequence[str]) -> Looks | None:
    """What regular expressions look at, or None where one has something that is not understood here."""
    atoms: set[str] = set()
    letters = {"'", *" \t\n\r\v\f"}
    contractions = False
    for pattern in patterns:
        for known in _CONTRACTIONS:
            contractions |= known in pattern
            pattern = pattern.replace(known, "")
        for m in _PART.finditer(pattern):
            if m["strange"]:
                return None
            if m["atom"] or m["word"]:
                atoms.add(m["atom"] or r"\w")
            elif m["hex"]:
                letters.add(chr(int(m["hex"], 16)))
            else:
                letters.add(_CONTROLS[m["control"]] if m["control"] else m["escaped"] or m["letter"] or "")
    return Looks(frozenset(atoms), frozenset(letters) - {""}, contractions)


class CharacterClasses:
    """Texts by what patterns see of them."""

    def __init__(self, looks: Looks, probe: Probe, texts: Sequence[str]) -> None:
        """`texts` hold every character that will be asked for."""
        self._contractions = looks.contractions
        self._points, self._bounds = _points(texts)
        alphabet = np.unique(self._points)
        letters = "".join(map(chr, alphabet.tolist()))
        cuts = sorted({p for letter in looks.letters for p in (ord(letter), ord(letter) + 1)})
        rows = [np.searchsorted(np.array(cuts), alphabet, side="right")]
        rows += [np.array(probe(atom, letters), dtype=np.int64) for atom in sorted(looks.atoms)]
        _, classes = np.unique(np.stack(rows), axis=1, return_inverse=True)
        self._class = np.zeros(0x110000, dtype=np.int32)
        self._class[alphabet] = classes.reshape(-1)

    def groups(self, lead: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Texts that are cut alike behind the same text.

        Args:
            lead: how many first characters stand within two behind an apostrophe, and so count as themselves.

        Returns:
            group (N,) of each text, and the index (G,) of one text of each group.
        """
        points, bounds = self._points, self._bounds
        seen = self._class[points].astype(np.int64)
        if self._contractions:
            place = np.arange(points.size) - np.repeat(bounds[:-1], np.diff(bounds))
            own = place < lead
            for back in (1, 2):
                own[back:] |= (points[:-back] == _APOSTROPHE) & (place[back:] >= back)
            seen = np.where(own, points + _LITERAL, seen)
        data = seen.astype(np.int32).tobytes()
        known: dict[bytes, int] = {}
        group = np.zeros(len(bounds) - 1, dtype=np.int64)
        first: list[int] = []
        ends = (bounds * 4).tolist()
        for i, (low, high) in enumerate(itertools.pairwise(ends)):
            key = data[low:high]
            at = known.get(key)
            if at is None:
                at = known[key] = len(first)
                first.append(i)
            group[i] = at
        return group, np.array(first, dtype=np.int64)

    def lead(self, before: str) -> int:
        """How many characters behind `before` count as themselves."""
        if not self._contractions:
            return 0
        return 2 if before.endswith("'") else 1 if before[-2:-1] == "'" else 0


def _points(texts: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    points = np.frombuffer("".join(texts).encode("utf-32-le"), dtype=np.uint32).astype(np.int64)
    lengths = np.fromiter(map(len, texts), dtype=np.int64, count=len(texts))
    return points, np.concatenate([np.zeros(1, dtype=np.int64), lengths.cumsum()])
