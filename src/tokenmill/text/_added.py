"""Added tokens: what is cut out of a text, leftmost and longest first, before the model sees it.

A tokenizer looks for them twice: in the raw text, then, between those it found, in the normalised text.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache

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


def _open_places(tokens: Sequence[bytes], added: Sequence[bool]) -> Iterator[int]:
    place = 0
    for token, is_added in zip(tokens, added, strict=True):
        yield from (place,) if is_added else range(place, place + len(token))
        place += len(token)
