"""Tokenizers that cut text into pieces first (GPT-2, Qwen, DeepSeek, tiktoken): validity by encoding again.

Where a piece ends can depend on what follows, so candidates are tried behind the end of the text, from the last place
on that later text cannot move. BPE behind a pattern that can be read is tried by classes (`CutMasks`); anything else
costs one encoding of a few words for each candidate. Equal ends of text share a mask.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from tokenmill.text._byte_trie import ByteTrie
from tokenmill.text._cut_masks import AHEAD, BLANKS, CutMasks
from tokenmill.text._kept_masks import KeptMasks
from tokenmill.text._utf8 import Continuations, likely_character, no_fallback, split, state_after

Bools = NDArray[np.bool_]
KEPT = 1024
"""Masks that are remembered."""
BACK = 48
"""Tokens that are looked at for the beginning of a word."""
FAR = 160
"""Tokens that are looked at where there are no words."""
WHERE = "ByteTokenizerView"
_PROBES = (
    "It's the 1st of 12345 words; don't\tstop --  here, they'll say.\n\n  Next line (x_1 = 2.50)  \n",
    "Ещё одно предложение, и 'слово'.  مرحبا بالعالم 123 שלום עולם",
    "नमस्ते दुनिया  ไทย คำ 漢字 と かな 한국어 문장 é ñ Ünïcode's end",
)


class Cutter(Protocol):
    """An encoder whose pieces can be seen."""

    def batch(self, texts: Sequence[str]) -> list[list[int]]: ...

    def cut(self, text: str) -> list[tuple[bytes, tuple[int, ...]]]:
        """The pieces of a text and their tokens."""
        ...

    def piece(self, data: bytes) -> tuple[int, ...]:
        """The tokens of bytes as one piece; only asked where single bytes are symbols."""
        ...


class Pieces:
    """The engine."""

    def __init__(
        self,
        tokens: Sequence[bytes | None],
        trie: ByteTrie,
        cutter: Cutter,
        byte_ids: Mapping[int, int] | None,
        candidates: Bools,
        fast: CutMasks | None = None,
    ) -> None:
        """An engine.

        Args:
            tokens, trie: of the vocabulary.
            cutter: its encoder.
            byte_ids: the byte tokens of a byte fallback; {} where single bytes are symbols; None without either.
            candidates: (V,) the tokens that are not special.
            fast: gives masks behind whole characters; None encodes each candidate again.
        """
        self.fast = fast
        self._tokens, self._cutter, self._byte_ids = tokens, cutter, byte_ids
        self._candidates = candidates
        self._continuations = Continuations(trie)
        self._masks = KeptMasks(len(tokens), kept=KEPT)
        self._words = all(self._cuts_at_words(probe) for probe in _PROBES)

    def encode(self, text: str, rest: bytes) -> list[int]:
        """The canonical tokens of a text that may end inside a character."""
        return self._encode([(text, rest)])[0]

    def _encode(self, parts: Sequence[tuple[str, bytes]]) -> list[list[int]]:
        if self._byte_ids is None and any(rest for _, rest in parts):
            raise no_fallback(next(rest for _, rest in parts if rest))
        if self._byte_ids:
            found = self._cutter.batch([text for text, _ in parts])
            for ids, (_, rest) in zip(found, parts, strict=True):
                ids.extend(self._byte_ids[b] for b in rest)
            return found
        whole = self._cutter.batch([text for text, rest in parts if not rest])
        whole.reverse()
        return [self._partial(text, rest) if rest else whole.pop() for text, rest in parts]

    def _partial(self, text: str, rest: bytes) -> list[int]:
        """BPE on the raw bytes of the last piece, which is where a likely character would be."""
        stand_in = likely_character(rest)
        pieces = self._cutter.cut(text + stand_in)
        last = pieces[-1][0]
        size = len(stand_in.encode())
        if not last.endswith(stand_in.encode()):
            return [*self._cutter.batch([text])[0], *self._cutter.piece(rest)]
        return [i for _, ids in pieces[:-1] for i in ids] + list(self._cutter.piece(last[:-size] + rest))

    def valid_next(self, ids: Sequence[int]) -> Bools:
        """(V,) bool: the tokens that may follow `ids`, so that both begin the encoding of some text."""
        tail = tuple(ids[self._safe(ids) :])
        return self._masks.get(tail, lambda: self._mask(tail))

    def may_end(self, ids: Sequence[int]) -> bool:
        """See `ByteTokenizerView.may_end`."""
        tail = list(ids[self._safe(ids) :])
        data = b"".join(self._tokens[i] or b"" for i in tail)
        if state_after(data[_last_lead(data) :]):
            return False
        return data[-1] not in BLANKS or self.encode(data.decode(), b"") == tail

    def _mask(self, tail: Sequence[int]) -> Bools:
        before = b"".join(self._tokens[i] or b"" for i in tail)
        state = state_after(before[_last_lead(before) :])
        if self.fast is not None and not state:
            return self.fast.mask(tail, self._again)
        out = np.zeros(len(self._tokens), dtype=bool)
        out[self._again(tail, np.flatnonzero(self._candidates & self._continuations.after(state)).tolist())] = True
        return out

    def _again(self, tail: Sequence[int], candidates: Sequence[int]) -> list[int]:
        """The candidates that stand behind `tail` when everything is encoded again."""
        before = b"".join(self._tokens[i] or b"" for i in tail)
        data = {i: before + (self._tokens[i] or b"") for i in candidates}
        if self._byte_ids is None:
            data = {i: d for i, d in data.items() if not state_after(d[_last_lead(d) :])}
        expected = list(tail)
        found = self._encode([_split(d) for d in data.values()])
        good = {i for i, ids in zip(data, found, strict=True) if ids[-1:] == [i] and ids[:-1] == expected}
        # Blanks are cut otherwise when something follows: "a\n\n" is one token less than the same before "b".
        later = ((i, d) for i, d in data.items() if i not in good and d[-1] in BLANKS)
        return [*good, *(i for i, d in later if any(self._before(d, ahead) == [*expected, i] for ahead in AHEAD))]

    def _before(self, data: bytes, ahead: str) -> list[int]:
        """The tokens of `data` where `ahead` follows and does not merge with it."""
        if self._byte_ids is None or self._byte_ids:
            ids, size = self.encode(data.decode() + ahead, b""), 0
            for count, i in enumerate(ids, start=1):
                size += len(self._tokens[i] or b"")
                if size == len(data):
                    return ids[:count]
            return []
        *pieces, (last, _) = self._cutter.cut(data.decode() + ahead)
        rest = last[: len(last) - len(ahead)]
        return [i for _, ids in pieces for i in ids] + list(self._cutter.piece(rest) if rest else ())

    def openings(self, data: bytes, whole: Sequence[int]) -> list[list[int]]:
        """See `ByteTokenizerView.openings`; `whole` is the encoding of `data`."""
        found = {tuple(whole)}
        if data[-1] in BLANKS:
            found |= {tuple(self._before(data, ahead)) for ahead in AHEAD}
        return sorted(list(ids) for ids in found if ids)

    def extend(self, ids: Sequence[int], data: bytes) -> list[int] | None:
        """Canonical tokens of the text of `ids` and of `data` behind it, or None where the whole must be encoded."""
        safe = self._safe(ids)
        if not safe:
            return None
        again = b"".join(self._tokens[i] or b"" for i in ids[safe:]) + data
        new = self.encode(*split(WHERE, again))
        return [*ids[:safe], *new] if b"".join(self._tokens[i] or b"" for i in new) == again else None

    def _safe(self, ids: Sequence[int]) -> int:
        """The last index at which a word begins behind another: whatever follows, the text is cut there.

        0 where no such place is near the end, or where this tokenizer does not cut there.
        """
        if not self._words:
            return 0
        after = b""
        for k in range(len(ids) - 1, max(len(ids) - BACK, 0), -1):
            after = ((self._tokens[ids[k]] or b"") + after)[:6]
            if _word_begins(self._tokens[ids[k - 1]] or b"", after):
                return k
        return self._third_last_piece(ids) if len(ids) > FAR else 0

    def _third_last_piece(self, ids: Sequence[int]) -> int:
        """Where no words are in sight: a piece with two more behind it, not inside a run of digits or blanks."""
        start = len(ids) - FAR
        while start and not _is_boundary(self._tokens[ids[start]]):
            start -= 1
        data = b"".join(self._tokens[i] or b"" for i in ids[start:])
        text, _ = split(WHERE, data)
        pieces = self._cutter.cut(text)[:-2]
        ends = np.cumsum([len(t) for _, t in pieces]).tolist()
        tokens = [i for _, piece in pieces for i in piece]
        if not pieces or tokens != list(ids[start : start + len(tokens)]):
            return 0
        for end, (before, _), (after, _) in zip(ends[-2::-1], pieces[-2::-1], pieces[:0:-1], strict=True):
            left, right = before.decode(errors="replace")[-1:], after.decode(errors="replace")[:1]
            if not (left.isspace() or (left.isnumeric() and right.isnumeric())):
                return start + end
        return 0

    def _cuts_at_words(self, probe: str) -> bool:
        data = probe.encode()
        whole = [i for _, ids in self._cutter.cut(probe) for i in ids]
        for place in range(1, len(data)):
            if _word_begins(data[:place], data[place : place + 6]):
                parts = self._cutter.batch([data[:place].decode(), data[place:].decode()])
                if parts[0] + parts[1] != whole:
                    return False
        return True


def _split(data: bytes) -> tuple[str, bytes]:
    try:
        return data.decode(), b""
    except UnicodeDecodeError:
        return split(WHERE, data)


def _is_boundary(token: bytes | None) -> bool:
    return not token or not 0x80 <= token[0] < 0xC0


def _word_begins(before: bytes, after: bytes) -> bool:
    """A letter, then one space, then a letter."""
    if after[:1] != b" " or len(after) < 2:
        return False
    try:
        first = after[1 : 1 + _width(after[1])].decode()
        last = before[_last_lead(before) :].decode()
    except UnicodeDecodeError:
        return False
    return first.isalpha() and last.isalpha()


def _width(lead: int) -> int:
    return 1 if lead < 0x80 else 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4


def _last_lead(data: bytes) -> int:
    """Where the last character of `data` begins."""
    place = len(data) - 1
    while place > 0 and place > len(data) - 4 and 0x80 <= data[place] < 0xC0:
        place -= 1
    return max(place, 0)
