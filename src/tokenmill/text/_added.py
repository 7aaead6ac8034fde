"""Added tokens: what is cut out of a text, leftmost and longest first, before the model sees it.

A tokenizer looks for them twice: in the raw text, then, between those it found, in the normalised text.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from tokenmill.text._byte_trie import ByteTrie


class AddedTokens:
    """One round of matching, as the tokens see it.

    Behind tokens T, a next token must not complete an occurrence of an added token that begins in T at an open place
    (one that is not strictly inside an added token already cut out): the occurrence would be cut out instead.
    """

    def __init__(self, contents: Mapping[bytes, int], trie: ByteTrie) -> None:
        self.ids = frozenset(contents.values())
        self.longest = max(map(len, contents), default=0)
        self._sorted = sorted(contents)
        self._trie = trie
        self.blocked = lru_cache(maxsize=1 << 14)(self._blocked)

    def pending(self, tokens: Sequence[bytes], added: Sequence[bool]) -> tuple[bytes, ...]:
        """Ends of the text that begin an added token without finishing it, the longest first.

        Args:
            tokens: the bytes of the last tokens, enough for `longest` - 1 bytes or all there are.
            added: which of them are added tokens of this round.
        """
        if not self.longest:
            return ()
        text = b"".join(tokens)
        reach = max(len(text) - self.longest + 1, 0)
        return tuple(text[s:] for s in _open_places(tokens, added) if s >= reach and self._begins(text[s:]))

    def _begins(self, end: bytes) -> bool:
        at = bisect_left(self._sorted, end)
        if at < len(self._sorted) and self._sorted[at] == end:
            at += 1  # a whole one is no beginning, a longer one is
        return at < len(self._sorted) and self._sorted[at].startswith(end)

    def _blocked(self, end: bytes) -> NDArray[np.int64]:
        """The tokens that would complete an added token that begins with `end`."""
        order, found = self._trie.order.numpy(), []
        for at in range(bisect_left(self._sorted, end), len(self._sorted)):
            content = self._sorted[at]
            if not content.startswith(end):
                break
            if len(content) > len(end):
                low, high = self._trie.range(content[len(end) :])
                found.append(order[low:high])
        return np.unique(np.concatenate(found)) if found else np.zeros(0, dtype=np.int64)

    def inside(self) -> NDArray[np.bool_]:
        """(V,) bool: the tokens that contain the content of an added token."""
        trie = self._trie
        flat, offsets = trie.bytes.numpy(), trie.offsets.numpy()
        found = np.zeros(trie.vocab_size, dtype=bool)
        if not self.longest or not flat.size:
            return found
        pairs = np.zeros(1 << 16, dtype=bool)
        for content in self._sorted:
            if len(content) == 1:
                pairs[content[0] << 8 : (content[0] + 1) << 8] = True
            else:
                pairs[content[0] << 8 | content[1]] = True
        two = flat.astype(np.int64) << 8 | np.append(flat[1:], 0)
        places = np.flatnonzero(pairs[two])  # where an added token may begin, in all tokens at once
        row = np.searchsorted(offsets, places, side="right") - 1
        contents = set(self._sorted)
        lengths: dict[int, list[int]] = {}
        for content in self._sorted:
            known = lengths.setdefault(content[0], [])
            if len(content) not in known:
                known.append(len(content))
        data, ends = flat.tobytes(), offsets[row + 1]
        for place, end, r in zip(places.tolist(), ends.tolist(), row.tolist(), strict=True):
            if any(place + n <= end and data[place : place + n] in contents for n in lengths[data[place]]):
                found[trie.order[r]] = True
        return found


Beginnings = tuple[tuple[bytes, ...], tuple[bytes, ...]]
"""Ends of a text that begin an added token, of the first and of the second round."""


class CutOut:
    """Both rounds: added tokens found in the raw text, then those found between them in the normalised text."""

    def __init__(self, raw: Mapping[bytes, int], normal: Mapping[bytes, int], trie: ByteTrie) -> None:
        self.raw, self.normal = AddedTokens(raw, trie), AddedTokens(normal, trie)
        self.ids = self.raw.ids | self.normal.ids
        self.reach = max(self.raw.longest, self.normal.longest)
        self._raw = np.zeros(trie.vocab_size, dtype=bool)
        self._raw[list(self.raw.ids)] = True

    @cached_property
    def found(self) -> NDArray[np.bool_]:
        """(V,) bool: the added tokens that can be found; one of the second round may hold one of the first."""
        mask = np.zeros(self._raw.size, dtype=bool)
        mask[list(self.normal.ids)] = True
        return mask & ~self.raw.inside() | self._raw

    def inside(self) -> NDArray[np.bool_]:
        """(V,) bool: the tokens that contain an added token's content."""
        return self.raw.inside() | self.normal.inside()

    def begun(self, ids: Sequence[int], tokens: Sequence[bytes | None]) -> Beginnings:
        """The added tokens that the end of canonical `ids` begins; looks no further back than the longest."""
        window: list[int] = []
        need = self.reach - 1
        for i in reversed(ids):
            if need <= 0:
                break
            window.append(i)
            need -= len(tokens[i] or b"")
        if not window:
            return (), ()
        window.reverse()
        raw = self.raw.pending([tokens[i] or b"" for i in window], [i in self.raw.ids for i in window])
        section = next((k for k in range(len(window), 0, -1) if window[k - 1] in self.raw.ids), 0)
        inside = window[section:]
        normal = self.normal.pending([tokens[i] or b"" for i in inside], [i in self.normal.ids for i in inside])
        return raw, normal

    def block(self, mask: NDArray[np.bool_], begun: Beginnings) -> None:
        """Take the tokens that would finish an added token begun before them out of `mask` (V,)."""
        raw, normal = begun
        for end in normal:
            blocked = self.normal.blocked(end)
            mask[blocked[~self._raw[blocked]]] = False
        for end in raw:
            mask[self.raw.blocked(end)] = False

    def finishes(self, token: int, begun: Beginnings) -> bool:
        """Whether `block` would take this token out."""
        raw, normal = begun
        if any(token in self.raw.blocked(end) for end in raw):
            return True
        return token not in self.raw.ids and any(token in self.normal.blocked(end) for end in normal)


def _open_places(tokens: Sequence[bytes], added: Sequence[bool]) -> Iterator[int]:
    place = 0
    for token, is_added in zip(tokens, added, strict=True):
        yield from (place,) if is_added else range(place, place + len(token))
        place += len(token)
