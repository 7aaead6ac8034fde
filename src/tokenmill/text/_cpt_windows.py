"""Windows of tokens over a batch of texts: how many characters they hold, which are too few, and where they lie."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from tokenmill.text import _scripts as scripts
from tokenmill.text._char_lengths import CharCounter, CharLengths

_WORD = re.compile(r"\S+")


@dataclass(frozen=True, slots=True)
class Window:
    """Part of a text.

    Attributes:
        start: first character, in the raw text.
        stop: behind its last character.
        cpt: characters per token in it.
        tokens: the size of the window, or the number of tokens of a whole text.
    """

    start: int
    stop: int
    cpt: float
    tokens: int


def collapse(text: str) -> str:
    """Every run of blanks as one space, none at the ends: blanks cannot raise the score."""
    return " ".join(text.split())


def to_raw(text: str, spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans of the collapsed text as spans of the text itself."""
    words = [match.span() for match in _WORD.finditer(text)]
    if not words:
        return [(0, len(text)) for _ in spans]
    raw = np.array(words, dtype=np.int64)  # (words, 2)
    sizes = raw[:, 1] - raw[:, 0]
    at = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(sizes + 1)[:-1]])  # in the collapsed text

    def place(position: int) -> int:
        word = int(np.searchsorted(at, position, side="right")) - 1
        return int(raw[word, 0] + position - at[word])

    # The end is where the last character ends, so that no blanks behind it are taken along.
    return [(place(start), place(stop - 1) + 1 if stop > start else place(start)) for start, stop in spans]


def pieces(text: str, size: int) -> list[str]:
    """A very long text in parts of about `size` characters, each cut before a space where there is one."""
    found, start = [], 0
    while len(text) - start > size:
        stop = text.rfind(" ", start + size // 2, start + size)
        stop = start + size if stop < 0 else stop
        found.append(text[start:stop])
        start = stop
    return [*found, text[start:]]


class TokenBatch:
    """Texts cut into tokens, one behind the other.

    Attributes:
        texts: B texts.
        chars: (B,) int64, their characters.
        starts: (B + 1,) int64, where they begin when they are joined.
        offsets: (B + 1,) int64, where each one's tokens begin.
        lengths: (M,) int64, characters that each token completes.
    """

    def __init__(self, texts: Sequence[str], counter: CharCounter, chunk: int) -> None:
        self.texts = texts
        self.chars = np.fromiter(map(len, texts), dtype=np.int64, count=len(texts))
        self.starts = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(self.chars)])
        cut, parts = _cut(texts, self.chars, chunk)
        found: CharLengths = counter.lengths(cut)
        self.lengths = found.lengths
        self.offsets = found.offsets if parts is None else found.offsets[parts]

    @property
    def tokens(self) -> NDArray[np.int64]:
        """(B,) int64: tokens of each text."""
        return np.diff(self.offsets)

    @cached_property
    def ends(self) -> NDArray[np.int64]:
        """(M + 1,) int64: characters of the joined texts before each token."""
        found = np.zeros(len(self.lengths) + 1, dtype=np.int64)
        np.cumsum(self.lengths, out=found[1:])
        return found

    @cached_property
    def script(self) -> NDArray[np.uint8]:
        """(B,) uint8: the script class of each text."""
        return scripts.text_classes(self.texts)

    @cached_property
    def _last(self) -> NDArray[np.int64]:
        """(M,) int64: where the tokens of the text that a token belongs to end."""
        return np.repeat(self.offsets[1:], self.tokens)

    def sums(self, window: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Characters of the `window` tokens from each token on, and whether they are all of one text."""
        places = max(len(self.lengths) - window + 1, 0)
        found = self.ends[window : window + places] - self.ends[:places]
        return found, np.arange(window, window + places) <= self._last[:places]

    def classes(self, starts: NDArray[np.int64], window: int) -> NDArray[np.uint8]:
        """The script classes of windows that begin at these tokens."""
        owners = self.owners(starts)
        which, place = np.unique(owners, return_inverse=True)
        counts = scripts.ScriptCounts("".join([self.texts[i] for i in map(int, which)]))
        # Few texts have such windows: theirs alone are joined, and each window is found from its text's beginning.
        begin = np.cumsum(self.chars[which]) - self.chars[which]
        shift = begin[place] - self.ends[self.offsets[owners]]
        return counts.classes(self.ends[starts] + shift, self.ends[starts + window] + shift)

    def owners(self, starts: NDArray[np.int64]) -> NDArray[np.int64]:
        """The texts that these tokens belong to."""
        return np.searchsorted(self.offsets, starts, side="right") - 1

    def below(self, window: int, limits: NDArray[np.float64]) -> NDArray[np.int64]:
        """First tokens of the windows whose score is below the limit of their script; (S,) limits, -inf for none."""
        top = float(limits.max(initial=-np.inf))
        if not np.isfinite(top) or len(self.lengths) < window:
            return np.zeros(0, dtype=np.int64)
        sums = self.ends[window:] - self.ends[:-window]
        starts = np.flatnonzero(sums < math.ceil(top * window))  # few: only these are looked at any further
        starts = starts[starts + window <= self.offsets[self.owners(starts) + 1]]
        if not starts.size:
            return starts
        return starts[sums[starts] / window < limits[self.classes(starts, window)]]

    def lowest(self, text: int, windows: Sequence[int]) -> tuple[int, int, int] | None:
        """(start, stop, window) in characters of the text: its window with the lowest score; None for no tokens."""
        a, b = self.offsets[text : text + 2].tolist()
        if a == b:
            return None
        best, score = (a, b), (self.ends[b] - self.ends[a]) / (b - a)
        for window in windows:
            if b - a > window:
                sums = self.ends[a + window : b + 1] - self.ends[a : b + 1 - window]
                at = int(sums.argmin())
                if sums[at] / window < score:
                    best, score = (a + at, a + at + window), sums[at] / window
        return *self.span(text, *best), best[1] - best[0]

    def span(self, text: int, start: int, stop: int) -> tuple[int, int]:
        """Characters of a text that its tokens from `start` to `stop` (of the batch) complete."""
        base = self.ends[self.offsets[text]]
        return int(self.ends[start] - base), int(self.ends[stop] - base)


def _cut(texts: Sequence[str], chars: NDArray[np.int64], chunk: int) -> tuple[Sequence[str], NDArray[np.int64] | None]:
    """The texts with long ones in parts, and where each text's parts begin; None when nothing was cut."""
    if not (chars > chunk).any():
        return texts, None
    lists = [pieces(text, chunk) for text in texts]
    starts = np.cumsum([0, *map(len, lists)])
    return [part for parts in lists for part in parts], starts


def counted(texts: Sequence[str], counter: CharCounter, chunk: int) -> NDArray[np.int64]:
    """(B,) int64: tokens of each text, without their lengths."""
    cut, parts = _cut(texts, np.fromiter(map(len, texts), dtype=np.int64, count=len(texts)), chunk)
    found = counter.counts(cut)
    return found if parts is None else np.add.reduceat(found, parts[:-1])


def merged(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans in order, those that touch or overlap as one."""
    found: list[tuple[int, int]] = []
    for start, stop in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(stop, found[-1][1])
        else:
            found.append((start, stop))
    return found
