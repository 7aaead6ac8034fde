"""BPE over bytes with mergeable ranks, as tiktoken does it: the pair whose union has the lowest rank goes first."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from functools import lru_cache

import regex

from tokenmill.errors import LimitError, UnsupportedError


class RankEncoder:
    """Encode bytes by ranks: cut by a pattern, take a piece that is a token whole, else merge from single bytes."""

    def __init__(self, ranks: Mapping[bytes, int], pattern: str | None) -> None:
        self.ranks, self.pattern = dict(ranks), pattern
        self._cut = _compiled(pattern)
        self.piece = lru_cache(maxsize=1 << 16)(self._piece)

    def __call__(self, text: str) -> list[int]:
        return [i for piece in self.pieces(text) for i in self.piece(piece.encode())]

    def pieces(self, text: str) -> Iterable[str]:
        """The text in the pieces that no token crosses."""
        if self._cut is None:
            return [text] if text else []
        return (m.group() for m in self._cut.finditer(text) if m.group())

    def _piece(self, data: bytes) -> tuple[int, ...]:
        whole = self.ranks.get(data)
        if whole is not None:
            return (whole,)
        return merge_bytes(self.ranks, data)


def _compiled(pattern: str | None) -> regex.Pattern[str] | None:
    return None if pattern is None else regex.compile(pattern)


def merge_bytes(ranks: Mapping[bytes, int], data: bytes) -> tuple[int, ...]:
    """BPE from single bytes, lowest rank first, the leftmost on a tie. O(n log n).

    Raises:
        LimitError: a byte that is no token.
    """
    n = len(data)
    ends = list(range(1, n + 1))  # of the part that starts here; 0 where none starts any more
    before = list(range(-1, n))
    heap = [(r, i, i + 2) for i in range(n - 1) if (r := ranks.get(data[i : i + 2])) is not None]
    heapq.heapify(heap)
    while heap:
        _, i, stop = heapq.heappop(heap)
        middle = ends[i]
        if middle == 0 or middle >= n or ends[middle] != stop:
            continue  # one of the two parts has changed since
        ends[i], ends[middle] = stop, 0
        if stop < n:
            before[stop] = i
            after = ends[stop]
            if (r := ranks.get(data[i:after])) is not None:
                heapq.heappush(heap, (r, i, after))
        left = before[i]
        if left >= 0 and (r := ranks.get(data[left:stop])) is not None:
            heapq.heappush(heap, (r, left, stop))
    out, i = [], 0
    while i < n:
        part = data[i : ends[i]]
        if part not in ranks:
            raise LimitError("TokenBytes.encode", "byte", f"0x{part[0]:02X}", "a token of the vocabulary")
        out.append(ranks[part])
        i = ends[i]
    return tuple(out)


def check_ranks(ranks: Mapping[bytes, int]) -> None:
    """Refuse ranks that cannot be ids."""
    if not ranks or len(set(ranks.values())) != len(ranks) or min(ranks.values()) < 0:
        raise UnsupportedError("TokenBytes.from_ranks", "ranks must be distinct and at least 0, one a token")
