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
EDGES = np.array([0.02, 0.06, 0.15, 0.3, 0.45, 0.6, 0.75, 0.87, 0.95, 1.5])  # of shares; the last is SEEN
MISS, FIRST, OTHER = 0, 1, 2  # what was right just before: nothing in the row, rank 0, another rank
BESIDE = 3  # added to the state where an n-gram chain offers another token
# What a hot matrix did on Python source before anything is counted: chance by rank and state.
_BY_RANK = np.array([[0.36, 0.08, 0.05, 0.035], [0.60, 0.11, 0.05, 0.03], [0.42, 0.10, 0.05, 0.03]])
_BESIDE = 0.3
_BY_MATCH = np.array([0.4, 0.52, 0.64, 0.7, 0.76, 0.8, 0.83, 0.85, 0.87, 0.88, 0.89, 0.9, 0.91, 0.92, 0.93, 0.94])
_BY_AGREEMENT = np.array([1.1, 0.9, 0.75])  # the chain's token is the row's first, another one, not among them
LONGEST_MATCH = _BY_MATCH.size
CERTAIN = 0.995  # no prediction is surer, so that a child is always less likely than its parent
WIDEST = 32  # nodes of one level that are followed further
HOPELESS = 0.01  # nodes below this chance are not followed


class Statistics:
    """Decayed counts of how often a predicted token was right, and of tokens per millisecond so far."""

    PRIOR_RANK, PRIOR_SHARE, PRIOR_MATCH, PRIOR_STEPS = 12.0, 30.0, 6.0, 4.0
    DECAY = 0.995

    def __init__(self, k: int) -> None:
        alone = rank_table(k)
        self._rank_prior = np.concatenate([alone, _BESIDE * alone])  # (6, k)
        match = np.minimum(_BY_MATCH * _BY_AGREEMENT[:, None], 0.97)
        self._match_prior = self.PRIOR_MATCH * np.stack([match, np.ones_like(match)])
        self.shares: Floats = np.zeros((2, 6, k, EDGES.size + 1))  # hits and tries, by state, rank and bin of the share
        self.matches: Floats = np.zeros((2, 3, LONGEST_MATCH))  # hits and tries, by agreement and length of the match
        self.pace: Floats = np.zeros(2)  # tokens and milliseconds of the last steps
        self.state = MISS

    def by_share(self) -> Floats:
        """(6, k, bins) chance that a successor is right, by what was right before it, its rank and its share.

        A rank's own frequency is the prior of its bins, so that a rare bin speaks like its rank.
        """
        hits, tries = self.shares
        rank = (hits.sum(2) + self.PRIOR_RANK * self._rank_prior) / (tries.sum(2) + self.PRIOR_RANK)
        return np.minimum((hits + self.PRIOR_SHARE * rank[:, :, None]) / (tries + self.PRIOR_SHARE), CERTAIN)

    def by_match(self) -> Floats:
        """(3, 16) chance that the next token of an n-gram chain is right, by agreement and length of the match."""
        hits, tries = self._match_prior + self.matches
        # A longer match is not a worse one: what was seen at one length speaks for the longer ones too.
        return np.minimum(np.maximum.accumulate(hits / tries, axis=1), CERTAIN)

    def tokens_per_ms(self, tokens: float, ms: float) -> float:
        """The pace of the last steps, begun with a few steps of ``tokens`` in ``ms``."""
        seen_tokens, seen_ms = self.pace
        return float((seen_tokens + self.PRIOR_STEPS * tokens) / (seen_ms + self.PRIOR_STEPS * ms))

    def saw_step(self, tokens: int, ms: float) -> None:
        """Count one forward and what it emitted."""
        self.pace = self.pace * 0.95 + (tokens, ms)

    def saw(self, shares: Floats, ranks: Sequence[int], chain_ranks: Sequence[int]) -> None:
        """Count committed tokens, in order.

        Args:
            shares: (A, k) shares in the row of the token before each one; below 0 where nothing is known.
            ranks: (A,) where the committed token stood in that row; k: nowhere.
            chain_ranks: (C,) C <= A, the same for the token that the n-gram chain offered there, while the chain was
                right up to it.
        """
        k = shares.shape[1]
        self.shares *= self.DECAY ** len(ranks)
        bins = np.searchsorted(EDGES, shares, side="right")
        for i, rank in enumerate(ranks):
            chain = chain_ranks[i] if i < len(chain_ranks) else -1
            hits, tries = self.shares[:, self.state + (BESIDE if chain >= 0 else 0)]
            judged = np.flatnonzero((shares[i] >= 0) & (np.arange(k) != chain))
            tries[judged, bins[i, judged]] += 1.0
            if rank < k and rank != chain:
                hits[rank, bins[i, rank]] += 1.0
            self.state = FIRST if rank == 0 else (MISS if rank >= k else OTHER)

    def saw_chain(self, agreements: Sequence[int], hits: int, matched: int) -> None:
        """Count the tokens of a chain that could be judged: the first ``hits`` were right, the next one was not.

        Args:
            agreements: (C,) see `agreement`.
            hits: of these C.
            matched: length of the match behind the first one.
        """
        for i, kind in enumerate(agreements):
            cell = self.matches[:, kind, min(matched + i, LONGEST_MATCH) - 1]
            cell *= self.DECAY
            cell += (1.0 if i < hits else 0.0, 1.0)

    def to_dict(self) -> dict[str, Any]:
        """The counts as plain data."""
        return {"shares": self.shares.tolist(), "matches": self.matches.tolist(), "pace": self.pace.tolist()}

    @classmethod
    def from_dict(cls, k: int, data: dict[str, Any]) -> Statistics:
        """Read what `to_dict` gave."""
        new = cls(k)
        new.shares = np.array(data["shares"], dtype=np.float64).reshape(new.shares.shape)
        new.matches = np.array(data["matches"], dtype=np.float64).reshape(new.matches.shape)
        new.pace = np.array(data["pace"], dtype=np.float64).reshape(2)
        return new


def agreement(rank: int, k: int) -> int:
    """Where a chain's token stands in the row of the token before it: 0 first, 1 elsewhere, 2 not among its k."""
    return 0 if rank == 0 else (1 if rank < k else 2)


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
        if spine >= 0 and depth <= chain.size:
            state[spine] += BESIDE
        bins = np.searchsorted(EDGES, rows.shares[tokens], side="right")
        right = by_share[state[:, None], np.arange(k), bins] * known
        right /= np.maximum(right.sum(1, keepdims=True), 1.0)
        ids = np.concatenate([ids, np.full((ids.shape[0], 1), -1)], axis=1)
        right = np.concatenate([right, np.zeros((right.shape[0], 1))], axis=1)
        if spine >= 0 and depth <= chain.size:
            _add_chain(
                ids[spine],
                right[spine],
                int(chain[depth - 1]),
                by_match[:, min(matched + depth - 1, LONGEST_MATCH) - 1],
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


def _add_chain(ids: Ints, right: Floats, token: int, by_agreement: Floats) -> None:
    """Put a chain's token into the last place of a row of k + 1; it takes the place of an equal successor."""
    same = np.flatnonzero((ids == token) & (right > 0))
    chance = by_agreement[agreement(int(same[0]), ids.size - 1) if same.size else 2]
    right[same] = 0.0
    right *= min(1.0, (1.0 - chance) / max(right.sum(), 1e-9))
    ids[-1], right[-1] = token, chance


def worth_its_ms(plan: Plan, cost: Floats, pace: float) -> Plan:
    """The part of a plan whose nodes are worth their milliseconds: down to the root when no node is.

    In the long run tokens per millisecond are highest when every step maximises its expected tokens less its
    milliseconds times the pace that is reached anyway.

    Args:
        plan: candidates.
        cost: (M,) milliseconds of a forward over 1..M positions.
        pace: tokens per millisecond so far.
    """
    order = np.argsort(-plan.chance, kind="stable")[: cost.shape[0]]
    size = int(np.argmax(np.cumsum(plan.chance[order]) - pace * cost[: order.size])) + 1
    keep = np.zeros(plan.chance.size, dtype=bool)
    keep[order[:size]] = True
    return plan.select(keep)


def rank_table(k: int) -> Floats:
    """(3, k) chance of each rank by state, before anything is counted."""
    tail = np.geomspace(0.022, 0.008, max(k - 4, 1))
    return np.concatenate([_BY_RANK, np.tile(tail, (3, 1))], axis=1)[:, :k]


@lru_cache(maxsize=32)
def best_paths(k: int, n: int, deepest: int = 16) -> tuple[tuple[int, ...], ...]:
    """The n likeliest rank paths of a tree that is fixed beforehand, sorted by depth, prefix-closed.

    From the rank frequencies of a hot matrix on Python source.
    """
    table = rank_table(k)
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
