"""Which tree to draft next: the one with the most expected tokens per millisecond.

Two things are predicted. An adjacency node is right according to the share that its token had among its row's k
successors when the row was written, and to what was right just before (text that follows the matrix goes on doing
so). A node of an n-gram chain is right according to the length of the match behind it. Both are calibrated by what
really came, also for candidates that were not drafted: the text tells afterwards which one was right. This planning
is ours; the paper uses one fixed tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

SEEN = 2.0  # a share above 1 marks a successor that really stood there in the prompt
EDGES = np.array([0.01, 0.03, 0.06, 0.12, 0.2, 0.3, 0.45, 0.6, 0.75, 0.87, 0.95, 1.5])  # of shares; the last is SEEN
MISS, FIRST, OTHER = 0, 1, 2  # what was right just before: nothing in the row, rank 0, another rank
# Shares of a row are a model's own beliefs at another place of the text: right less often than they say.
_BY_SHARE = np.array([0.004, 0.012, 0.03, 0.05, 0.09, 0.14, 0.2, 0.28, 0.36, 0.46, 0.58, 0.75, 0.45])
_BY_STATE = np.array([0.8, 1.15, 0.9])
_BY_MATCH = np.array([0.22, 0.42, 0.56, 0.66, 0.74, 0.79, 0.82, 0.85, 0.87, 0.88, 0.89, 0.9, 0.91, 0.92, 0.93, 0.94])
LONGEST_MATCH = _BY_MATCH.size
_BY_RANK = np.array([[0.36, 0.08, 0.05, 0.035], [0.60, 0.11, 0.05, 0.03], [0.42, 0.10, 0.05, 0.03]])
CERTAIN = 0.995  # no prediction is surer, so that a child is always less likely than its parent
WIDEST = 32  # nodes of one level that are followed further
HOPELESS = 0.01  # nodes below this chance are not followed


class Statistics:
    """Decayed counts of how often a predicted token was right."""

    PRIOR_SHARE, PRIOR_MATCH, DECAY = 10.0, 6.0, 0.98

    def __init__(self) -> None:
        share = np.minimum(_BY_SHARE * _BY_STATE[:, None], 0.95)
        self._share_prior = self.PRIOR_SHARE * np.stack([share, np.ones_like(share)])
        self._match_prior = self.PRIOR_MATCH * np.stack([_BY_MATCH, np.ones_like(_BY_MATCH)])
        self.shares: Floats = np.zeros((2, 3, EDGES.size + 1))  # hits and tries, by state and bin of the share
        self.matches: Floats = np.zeros((2, LONGEST_MATCH))  # hits and tries, by length of the match
        self.state = MISS

    def by_share(self) -> Floats:
        """(3, bins) chance that a successor is right, by what was right before it and the bin of its share."""
        hits, tries = self._share_prior + self.shares
        return np.minimum(hits / tries, CERTAIN)

    def by_match(self) -> Floats:
        """(16,) chance that the next token of an n-gram chain is right, by length of the match."""
        hits, tries = self._match_prior + self.matches
        # A longer match is not a worse one: what was seen at one length speaks for the longer ones too.
        return np.minimum(np.maximum.accumulate(hits / tries), CERTAIN)

    def saw_successors(self, shares: Floats, ranks: Sequence[int]) -> None:
        """Count committed tokens, in order.

        Args:
            shares: (A, k) shares in the row of the token before each one; below 0 where nothing is known.
            ranks: (A,) where the committed token stood in that row; k: nowhere.
        """
        k = shares.shape[1]
        for row, rank in zip(shares, ranks, strict=True):
            bins = np.searchsorted(EDGES, row[row >= 0], side="right")
            self.shares[:, self.state] *= self.DECAY
            np.add.at(self.shares[1, self.state], bins, 1.0)
            if rank < k:
                self.shares[0, self.state, bins[rank]] += 1.0
            self.state = FIRST if rank == 0 else (MISS if rank >= k else OTHER)

    def saw_chain(self, matched: int, hits: int, seen: int) -> None:
        """Count a chain behind a match of ``matched`` tokens: its first ``hits`` tokens of ``seen`` were right."""
        for i in range(min(hits + 1, seen)):
            at = min(matched + i, LONGEST_MATCH) - 1
            self.matches[:, at] *= self.DECAY
            self.matches[:, at] += (1.0 if i < hits else 0.0, 1.0)

    def to_dict(self) -> dict[str, Any]:
        """The counts as plain data."""
        return {"shares": self.shares.tolist(), "matches": self.matches.tolist()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Statistics:
        """Read what `to_dict` gave."""
        new = cls()
        new.shares = np.array(data["shares"], dtype=np.float64).reshape(new.shares.shape)
        new.matches = np.array(data["matches"], dtype=np.float64).reshape(new.matches.shape)
        return new


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """The adjacency matrix as arrays: ids (V, k), shares (V, k) and known successors (V,)."""

    table: NDArray[np.integer]
    shares: NDArray[np.floating]
    count: Ints


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """Candidate nodes of a draft, root first, parents before children, sorted by depth.

    Attributes:
        tokens, parent, depth: (N,) int64; the root's parent is -1.
        chance: (N,) that the node is accepted; 1 at the root, never above its parent's.
    """

    tokens: Ints
    parent: Ints
    depth: Ints
    chance: Floats

    def select(self, keep: NDArray[np.bool_]) -> Plan:
        """The nodes where ``keep`` (N,) holds, which must be closed under parents."""
        number = np.cumsum(keep) - 1
        parent = self.parent[keep]
        parent = np.where(parent < 0, -1, number[np.maximum(parent, 0)])
        return Plan(self.tokens[keep], parent, self.depth[keep], self.chance[keep])


def candidates(rows: Rows, statistics: Statistics, root: int, chain: Ints, matched: int, depth_limit: int) -> Plan:
    """Everything that may be worth drafting behind ``root``, level by level.

    Args:
        rows: the adjacency matrix.
        statistics: what was counted.
        root: the last committed token.
        chain: (C,) n-gram continuation of the root; empty without a match.
        matched: length of its match.
        depth_limit: deeper nodes are not drafted.
    """
    by_share, by_match = statistics.by_share(), statistics.by_match()
    k = rows.table.shape[1]
    tokens, chance, state = np.array([root]), np.ones(1), np.array([statistics.state])
    number, spine, total = np.zeros(1, dtype=np.int64), 0, 1  # spine: where this level's chain node stands, or -1
    levels = [(tokens, np.array([-1]), np.zeros(1, dtype=np.int64), chance)]
    states = np.append(np.full(k, OTHER), FIRST)
    states[0] = FIRST
    for depth in range(1, depth_limit + 1):
        ids, known = rows.table[tokens], np.arange(k) < rows.count[tokens][:, None]  # (W, k)
        right = by_share[state[:, None], np.searchsorted(EDGES, rows.shares[tokens], side="right")] * known
        right /= np.maximum(right.sum(1, keepdims=True), 1.0)
        ids = np.concatenate([ids, np.full((ids.shape[0], 1), -1)], axis=1)
        right = np.concatenate([right, np.zeros((right.shape[0], 1))], axis=1)
        if spine >= 0 and depth <= chain.size:
            _add_chain(
                ids[spine], right[spine], int(chain[depth - 1]), by_match[min(matched + depth - 1, LONGEST_MATCH) - 1]
            )
        reach = (chance[:, None] * np.minimum(right, CERTAIN)).ravel()
        best = np.argsort(-reach, kind="stable")[:WIDEST]
        best = best[reach[best] > HOPELESS]
        if best.size == 0:
            break
        width = k + 1
        on_chain = np.flatnonzero(best == spine * width + k) if spine >= 0 else best[:0]
        spine = int(on_chain[0]) if on_chain.size else -1
        tokens, chance, state = ids.ravel()[best].astype(np.int64), reach[best], states[best % width]
        levels.append((tokens, number[best // width], np.full(best.size, depth), chance))
        number = total + np.arange(best.size)
        total += best.size
    return Plan(*(np.concatenate(column) for column in zip(*levels, strict=True)))


def _add_chain(ids: Ints, right: Floats, token: int, chance: float) -> None:
    """Put a chain's token into the last place of a row; what else may come shares what it leaves."""
    same = ids == token
    chance = min(max(chance, float(right[same].sum())), CERTAIN)
    right[same] = 0.0
    others = right.sum()
    if others > 0:
        right *= min(1.0, (1.0 - chance) / others)
    ids[-1], right[-1] = token, chance


def most_per_ms(plan: Plan, cost: Floats) -> Plan:
    """The part of a plan with the most expected tokens per millisecond: down to the root when no node pays.

    Args:
        plan: candidates.
        cost: (M,) milliseconds of a forward over 1..M positions.
    """
    order = np.argsort(-plan.chance, kind="stable")[: cost.shape[0]]
    size = int(np.argmax(np.cumsum(plan.chance[order]) / cost[: order.size])) + 1
    keep = np.zeros(plan.chance.size, dtype=bool)
    keep[order[:size]] = True
    return plan.select(keep)


@lru_cache(maxsize=32)
def best_paths(k: int, n: int, deepest: int = 16) -> tuple[tuple[int, ...], ...]:
    """The n likeliest rank paths of a tree that is fixed beforehand, sorted by depth, prefix-closed.

    From rank frequencies of a hot matrix on Python source: first rank .36 after a miss and .60 after a hit.
    """
    table = np.concatenate([_BY_RANK, np.geomspace(0.022, 0.008, max(k - 4, 1))[None].repeat(3, 0)], axis=1)[:, :k]
    start = (table[MISS] + table[FIRST]) / 2
    waiting = [((r,), start[r]) for r in range(k)]
    chosen: list[tuple[int, ...]] = []
    while len(chosen) < n and waiting:
        path, share = waiting.pop(max(range(len(waiting)), key=lambda i: waiting[i][1]))
        chosen.append(path)
        if len(path) < deepest:
            row = table[FIRST if path[-1] == 0 else OTHER]
            waiting += [((*path, r), share * row[r]) for r in range(k)]
    return tuple(sorted(chosen, key=lambda p: (len(p), p)))
