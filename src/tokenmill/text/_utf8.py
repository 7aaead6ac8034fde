"""Bytes that are, or can still become, UTF-8."""

from __future__ import annotations

import codecs
import unicodedata
from collections import Counter
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from tokenmill.errors import LimitError
from tokenmill.text._byte_trie import ByteTrie

DEAD = 8
_LEADS = ((0xC2, 0xDF, 1), (0xE1, 0xEC, 2), (0xEE, 0xEF, 2), (0xF1, 0xF3, 3), (0xE0, 0xE0, 4), (0xED, 0xED, 5))
_LEADS_OF_FOUR = ((0xF0, 0xF0, 6), (0xF4, 0xF4, 7))
_CONTINUATIONS = (
    (1, 0x80, 0xBF, 0),
    (2, 0x80, 0xBF, 1),
    (3, 0x80, 0xBF, 2),
    (4, 0xA0, 0xBF, 1),  # no overlong three-byte characters
    (5, 0x80, 0x9F, 1),  # no surrogates
    (6, 0x90, 0xBF, 2),  # no overlong four-byte characters
    (7, 0x80, 0x8F, 2),  # nothing beyond U+10FFFF
)


def _automaton() -> NDArray[np.uint8]:
    table = np.full((DEAD + 1, 256), DEAD, dtype=np.uint8)
    table[0, :0x80] = 0
    for low, high, state in _LEADS + _LEADS_OF_FOUR:
        table[0, low : high + 1] = state
    for state, low, high, then in _CONTINUATIONS:
        table[state, low : high + 1] = then
    return table


AUTOMATON = _automaton()
"""(9, 256) uint8: state and byte -> state; 0 between characters, `DEAD` when no text starts like this."""


def split(where: str, data: bytes) -> tuple[str, bytes]:
    """The text, and the bytes of a character that is not complete at its end (at most 3).

    Raises:
        LimitError: bytes that no text starts with; names the first such byte and its place.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        text = decoder.decode(data)
        start = len(data) - len(decoder.getstate()[0])
    except UnicodeDecodeError as error:
        text, start = "", error.start
    state = 0
    for place in range(start, len(data)):  # the decoder lets some pass that only a third byte would end: ED A0
        state = int(AUTOMATON[state, data[place]])
        if state == DEAD:
            value = f"byte 0x{data[place]:02X} at position {place}"
            raise LimitError(where, "data", value, "UTF-8, possibly cut inside its last character")
    return text, data[start:]


def text_of(data: bytes) -> tuple[str, bytes] | None:
    """See `split`; ``None`` where no text starts with these bytes."""
    try:
        return split("UTF-8", data)
    except LimitError:
        return None


def no_fallback(rest: bytes) -> LimitError:
    """The error for a character that is cut off where no token holds single bytes."""
    mend = "This tokenizer has no byte fallback; the prompt must be valid UTF-8."
    return LimitError("ByteTokenizerView", "data", f"{rest!r} at the end", "whole characters", mend)


def state_after(data: bytes) -> int:
    """The automaton's state behind `data`."""
    state = 0
    for byte in data:
        state = int(AUTOMATON[state, byte])
    return state


class Continuations:
    """Which tokens may follow bytes that end inside a character, so that the whole can still become text."""

    def __init__(self, trie: ByteTrie) -> None:
        self._trie = trie
        self._after: dict[int, NDArray[np.bool_]] = {}

    def after(self, state: int) -> NDArray[np.bool_]:
        """(V,) bool: the tokens that do not kill the automaton from `state`."""
        if state not in self._after:
            self._after[state] = self._run(state)
        return self._after[state]

    def _run(self, state: int) -> NDArray[np.bool_]:
        trie = self._trie
        flat, offsets, order = trie.bytes.numpy(), trie.offsets.numpy(), trie.order.numpy()
        starts, stops = offsets[:-1], offsets[1:]
        alive, states, depth = np.arange(len(trie)), np.full(len(trie), state, dtype=np.uint8), 0
        good = np.zeros(trie.vocab_size, dtype=bool)
        while alive.size:
            states = AUTOMATON[states, flat[starts[alive] + depth]]
            depth += 1
            lives, ended = states != DEAD, stops[alive] - starts[alive] == depth
            good[order[alive[lives & ended]]] = True
            alive, states = alive[lives & ~ended], states[lives & ~ended]
        return good


class Spelled:
    """The characters that a vocabulary lacks and therefore spells with byte tokens."""

    def __init__(self, known: NDArray[np.bool_]) -> None:
        """`known` (0x110000,): code points with a piece of their own."""
        free = ~known
        free[0xD800:0xE000] = False  # surrogates are no characters
        self._below = np.concatenate([np.zeros(1, dtype=np.int64), free.cumsum()])

    def starts(self, prefix: bytes) -> bool:
        """Whether `prefix` is the whole or the beginning of such a character's UTF-8."""
        lead = prefix[0]
        length = 1 if lead < 0x80 else 2 if 0xC2 <= lead < 0xE0 else 3 if 0xE0 <= lead < 0xF0 else 4
        if len(prefix) > length or state_after(prefix) == DEAD:
            return False
        bits = lead if length == 1 else lead & (0x7F >> length)
        for byte in prefix[1:]:
            bits = bits << 6 | byte & 0x3F
        shift = 6 * (length - len(prefix))
        least = (0, 0x80, 0x800, 0x10000)[length - 1]
        low, high = max(bits << shift, least), min((bits + 1) << shift, 0x110000)
        return bool(low < high and self._below[high] > self._below[low])


@lru_cache(maxsize=4096)
def likely_character(prefix: bytes) -> str:
    """A character whose UTF-8 starts with `prefix`, of the kind (letter, symbol, ...) that most of them are.

    Where text is cut depends on the kind of character, so this stands in for one that is not complete yet.
    """
    lead = prefix[0]
    length = 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
    bits = lead & (0x7F >> length)
    for byte in prefix[1:]:
        bits = bits << 6 | byte & 0x3F
    shift = 6 * (length - len(prefix))
    least = (0, 0x80, 0x800, 0x10000)[length - 1]
    points = range(max(bits << shift, least), min((bits + 1) << shift, 0x110000))
    kinds = {p: unicodedata.category(chr(p))[0] for p in points}
    counts = Counter(kind for kind in kinds.values() if kind != "C")
    if not counts:
        return chr(next(p for p in points if not 0xD800 <= p < 0xE000))
    most = counts.most_common(1)[0][0]
    # A character that normalisation would change, or that joins the one before it, stands for nothing but itself.
    fit = (p for p, kind in kinds.items() if kind == most)
    first = next(fit)
    return next((chr(p) for p in (first, *fit) if unicodedata.is_normalized("NFC", "a" + chr(p))), chr(first))
