"""Byte-pair merging of a batch at run time: the most frequent pair of neighbours becomes one token, again and again.

A token is the tuple of the base tokens that it stands for. Merging never crosses a unit (a pre-token, a word, a
sequence), so equal units are merged once and counted as often as they occur.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

Token = tuple[int, ...]
Pair = tuple[Token, Token]
Ties = Literal["bytes", "first"]


@dataclass(slots=True)
class Merging:
    """Units that are being merged.

    Attributes:
        units: each different unit once, in the order of first appearance, as its tokens now.
        counts: how often each occurs.
        merges: the pairs that were merged, in order.
        saved: tokens that were saved so far, over all occurrences.
    """

    units: list[list[Token]]
    counts: list[int]
    ties: Ties
    key: Callable[[Token], Any]
    merges: list[Pair] = field(default_factory=list)
    saved: int = 0
    _where: dict[Pair, set[int]] = field(default_factory=lambda: defaultdict(set))
    _total: dict[Pair, int] = field(default_factory=lambda: defaultdict(int))
    _heap: list[tuple[int, Any, Pair]] = field(default_factory=list)

    def __post_init__(self) -> None:
        for number in range(len(self.units)):
            self._count(number, +1)
        self._heap = [self._entry(pair) for pair in self._total]
        heapq.heapify(self._heap)

    def run(self, max_merges: int | None, target: int | None) -> None:
        """Merge until so many merges are done, so many tokens saved, or no pair is left."""
        while (max_merges is None or len(self.merges) < max_merges) and (target is None or self.saved < target):
            pair = self._best()
            if pair is None:
                return
            self._merge(pair)

    def _entry(self, pair: Pair) -> tuple[int, Any, Pair]:
        # The tokens themselves come last: two that have the same bytes are still told apart, the same way every time.
        key = (self.key(pair[0]), self.key(pair[1])) if self.ties == "bytes" else ()
        return -self._total[pair], key, pair

    def _count(self, number: int, sign: int) -> None:
        """Add or take away the pairs of one unit; neighbours are counted even where they overlap ("a a a" has two)."""
        for pair in pairwise(self.units[number]):
            self._total[pair] += sign * self.counts[number]
            if sign > 0:
                self._where[pair].add(number)
            else:
                self._where[pair].discard(number)

    def _best(self) -> Pair | None:
        while self._heap:
            if self._current():
                return heapq.heappop(self._heap)[2] if self.ties == "bytes" else self._first_met()
            heapq.heappop(self._heap)
        return None

    def _current(self) -> bool:
        """Whether the entry at the top still tells the truth; every change of a count pushed a new one."""
        count, _, pair = self._heap[0]
        return -count == self._total.get(pair, 0) and count < 0

    def _first_met(self) -> Pair:
        """Of all pairs with the highest count, the one that a reader of the batch meets first."""
        top = self._heap[0][0]
        tied: dict[Pair, tuple[int, Any, Pair]] = {}
        while self._heap and self._heap[0][0] == top:
            current = self._current()
            entry = heapq.heappop(self._heap)
            if current:
                tied[entry[2]] = entry

        def met(pair: Pair) -> tuple[int, int]:
            number = min(self._where[pair])
            return number, next(i for i, two in enumerate(pairwise(self.units[number])) if two == pair)

        chosen = min(tied, key=met)
        for pair, entry in tied.items():
            if pair != chosen:
                heapq.heappush(self._heap, entry)
        return chosen

    def _merge(self, pair: Pair) -> None:
        changed: set[Pair] = set()
        for number in tuple(self._where[pair]):
            before = self.units[number]
            changed.update(pairwise(before))
            self._count(number, -1)
            self.units[number] = after = merged(before, pair)
            self._count(number, +1)
            changed.update(pairwise(after))
            self.saved += (len(before) - len(after)) * self.counts[number]
        for one in changed:
            if self._total[one]:
                heapq.heappush(self._heap, self._entry(one))
            else:
                del self._total[one], self._where[one]
        self.merges.append(pair)


def merged(tokens: Sequence[Token], pair: Pair) -> list[Token]:
    """The tokens with every occurrence of the pair joined, from left to right and without overlap."""
    found: list[Token] = []
    at = 0
    while at < len(tokens):
        if at + 1 < len(tokens) and tokens[at] == pair[0] and tokens[at + 1] == pair[1]:
            found.append(pair[0] + pair[1])
            at += 2
        else:
            found.append(tokens[at])
            at += 1
    return found
