"""Which tree to draft next: the one with the most expected tokens per millisecond.

Two things are predicted. Adjacency nodes are right according to their rank and to the rank that was right before
(text that follows the matrix goes on doing so). Nodes of an n-gram chain are right according to the length of the
match so far. Both are counted while decoding, also for candidates that were not drafted: the text tells afterwards
which rank was the right one. This planning is ours; the paper uses one fixed tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tokenmill.decode._tree import Tree

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# What a hot matrix of a 270M model did on Python source, before anything is counted.
_AFTER_MISS = (0.36, 0.08, 0.05, 0.035, 0.025, 0.02, 0.015, 0.012)
_AFTER_FIRST = (0.60, 0.11, 0.05, 0.03, 0.02, 0.015, 0.01, 0.008)
_AFTER_OTHER = (0.42, 0.10, 0.05, 0.03, 0.02, 0.015, 0.01, 0.008)
_BY_MATCH = (0.25, 0.45, 0.58, 0.68, 0.76, 0.80, 0.83, 0.85, 0.87, 0.88, 0.89, 0.90, 0.91, 0.92, 0.93, 0.94)
LONGEST_MATCH = len(_BY_MATCH)
_MISS, _FIRST, _OTHER = 0, 1, 2


class Statistics:
    """Decayed counts of which rank, and which length of match, was right.

    Args:
        k: ranks of the adjacency matrix.
    """

    PRIOR_RANKS, PRIOR_MATCH, DECAY = 16.0, 8.0, 0.985

    def __init__(self, k: int) -> None:
        self.k = k
        table = np.array([_AFTER_MISS, _AFTER_FIRST, _AFTER_OTHER])
        prior = np.full((3, k + 1), 0.004)
        prior[:, : min(k, 8)] = table[:, :k]
        prior[:, k] = np.maximum(1 - prior[:, :k].sum(1), 0.02)
        self._rank_prior = self.PRIOR_RANKS * prior / prior.sum(1, keepdims=True)
        self._match_prior = self.PRIOR_MATCH * np.stack([np.array(_BY_MATCH), 1 - np.array(_BY_MATCH)], axis=1)
        self.ranks: Floats = np.zeros((3, k + 1))
        self.matches: Floats = np.zeros((LONGEST_MATCH, 2))
        self.state = _MISS

    def successor(self) -> Floats:
        """(3, k) probability that rank r is right, after a miss, a first rank and another rank."""
        counts = self._rank_prior + self.ranks
        return np.minimum((counts / counts.sum(1, keepdims=True))[:, : self.k], 0.995)

    def continuation(self) -> Floats:
        """(16,) probability that the next token of an n-gram chain is right, by length of the match."""
        counts = self._match_prior + self.matches
        # A longer match is not a worse one: what was seen at one length speaks for the longer ones too.
        return np.minimum(np.maximum.accumulate(counts[:, 0] / counts.sum(1)), 0.995)

    def saw_ranks(self, ranks: Sequence[int]) -> None:
        """Count the ranks (k: not in the matrix) at which the committed tokens stood, in order."""
        for rank in ranks:
            row = self.ranks[self.state]
            row *= self.DECAY
            row[rank] += 1
            self.state = _FIRST if rank == 0 else (_MISS if rank >= self.k else _OTHER)

    def saw_chain(self, matched: int, hits: int, seen: int) -> None:
        """Count a chain behind a match of ``matched`` tokens: its first ``hits`` tokens of ``seen`` were right."""
        for i in range(min(hits + 1, seen)):
            row = self.matches[min(matched + i, LONGEST_MATCH) - 1]
            row *= self.DECAY
            row[0 if i < hits else 1] += 1

    def to_dict(self) -> dict[str, Any]:
        return {"ranks": self.ranks.tolist(), "matches": self.matches.tolist()}

    @classmethod
    def from_dict(cls, k: int, data: dict[str, Any]) -> Statistics:
        new = cls(k)
        new.ranks = np.array(data["ranks"], dtype=np.float64).reshape(3, k + 1)
        new.matches = np.array(data["matches"], dtype=np.float64).reshape(LONGEST_MATCH, 2)
        return new


@dataclass(frozen=True, slots=True, eq=False)
class Draft:
    """A planned draft; tokens are filled in level by level.

    Attributes:
        parent: (N,) int64, -1 at the root.
        rank: (N,) int64, the successor rank; -1 where the token comes from the n-gram chain (and at the root).
        depth: (N,) int64, ascending.
    """

    parent: Ints
    rank: Ints
    depth: Ints


@dataclass(frozen=True, slots=True, eq=False)
class Universe:
    """All nodes that a plan may choose from: a chain of `spine` nodes, and adjacency paths that leave it.

    Attributes:
        parent, rank, depth: (U,) as in `Draft`, root first, parents before children.
        leaves: (U,) the depth at which a node's path leaves the spine; its own depth on the spine.
        first: (U,) rank of the first step off the spine, -1 on the spine.
        later: (U, 3 * k) how often each (previous kind, rank) occurs behind that first step.
    """

    parent: Ints
    rank: Ints
    depth: Ints
    leaves: Ints
    first: Ints
    later: Floats


@lru_cache(maxsize=8)
def universe(k: int, spine: int, copies: int, paths: int) -> Universe:
    """``paths`` adjacency paths under each of the first ``copies`` spine nodes (the root is the first)."""
    rows: list[tuple[int, int, int, tuple[int, ...]]] = []  # (depth, 1 off the spine, leaves at, ranks)
    rows += [(d, 0, d, ()) for d in range(spine + 1)]
    for start in range(min(copies, spine + 1)):
        rows += [(start + len(p), 1, start, p) for p in best_paths(k, paths)]
    rows.sort(key=lambda r: r[:3])
    number = {(leaves, ranks): i for i, (_, _, leaves, ranks) in enumerate(rows)}
    parent = [
        number[(leaves, ranks[:-1])] if ranks else number.get((leaves - 1, ()), -1) for _, _, leaves, ranks in rows
    ]
    later = np.zeros((len(rows), 3 * k))
    for i, (_, _, _, ranks) in enumerate(rows):
        for before, rank in zip(ranks, ranks[1:], strict=False):
            later[i, (_FIRST if before == 0 else _OTHER) * k + rank] += 1
    return Universe(
        parent=np.array(parent),
        rank=np.array([r[3][-1] if r[3] else -1 for r in rows]),
        depth=np.array([r[0] for r in rows]),
        leaves=np.array([r[2] for r in rows]),
        first=np.array([r[3][0] if r[3] else -1 for r in rows]),
        later=later,
    )


@lru_cache(maxsize=32)
def best_paths(k: int, n: int, deepest: int = 16) -> tuple[tuple[int, ...], ...]:
    """The n likeliest paths before anything is counted, sorted by depth: prefix-closed by construction."""
    table = Statistics(k).successor()
    start = table[_MISS] * 0.5 + table[_FIRST] * 0.5
    open_paths = [((r,), start[r]) for r in range(k)]
    chosen: list[tuple[int, ...]] = []
    while len(chosen) < n and open_paths:
        best = max(range(len(open_paths)), key=lambda i: open_paths[i][1])
        path, share = open_paths.pop(best)
        chosen.append(path)
        if len(path) < deepest:
            row = table[_FIRST if path[-1] == 0 else _OTHER]
            open_paths += [((*path, r), share * row[r]) for r in range(k)]
    return tuple(sorted(chosen, key=lambda p: (len(p), p)))


def expected_hits(
    nodes: Universe, statistics: Statistics, *, matched: int, chain_ranks: Ints, depth_limit: int
) -> Floats:
    """(U,) probability that each node of the universe is accepted, 0 where it may not be drafted.

    Args:
        nodes: the universe.
        statistics: what was counted.
        matched: tokens of the n-gram match; 0 means that there is no chain.
        chain_ranks: (copies,) rank of the next chain token in the matrix row of each spine node; k: not there.
        depth_limit: deeper nodes are not drafted.
    """
    successor, k = statistics.successor(), statistics.k
    spine = int(nodes.leaves.max())
    go_on = np.zeros(spine + 1)  # go_on[j]: the chain's token j + 1 is right, given the first j were
    if matched:
        lengths = np.minimum(matched + np.arange(spine + 1), LONGEST_MATCH) - 1
        go_on = statistics.continuation()[lengths]
    reach = np.concatenate([[1.0], np.cumprod(go_on[:-1])])  # (spine + 1,)
    copies = chain_ranks.shape[0]
    start = np.tile(successor[_FIRST], (copies, 1))  # behind a chain token that was right
    start[0] = successor[statistics.state]
    padded = np.concatenate([start, np.zeros((copies, 1))], axis=1)
    on_chain = padded[np.arange(copies), np.minimum(chain_ranks, k)]
    leave = reach[:copies] * (1 - go_on[:copies]) / np.maximum(1 - on_chain, 0.05)
    if matched:
        padded[np.arange(copies), np.minimum(chain_ranks, k)] = 0.0  # the chain has this token already
    off = nodes.first >= 0
    hits = reach[nodes.leaves]
    at = nodes.leaves[off]
    first = np.minimum(leave[at, None] * padded[at, :k], reach[at, None])[np.arange(at.size), nodes.first[off]]
    hits[off] = first * np.exp(nodes.later[off] @ np.log(np.maximum(successor, 1e-9)).ravel())
    hits[nodes.depth > depth_limit] = 0.0
    hits[0] = 1.0
    return hits


def choose(nodes: Universe, hits: Floats, cost: Floats) -> Draft:
    """The nodes that maximise expected tokens per millisecond.

    Args:
        nodes: the universe.
        hits: (U,) from `expected_hits`; a child is never likelier than its parent.
        cost: (M,) milliseconds of a forward over 1..M positions.
    """
    order = np.argsort(-hits, kind="stable")[: cost.shape[0]]
    gain = np.cumsum(hits[order])
    size = int(np.argmax(np.where(hits[order] > 0, gain / cost[: order.size], 0.0))) + 1
    return subset(nodes, order[:size])


def subset(nodes: Universe | Draft, chosen: Ints) -> Draft:
    """The draft made of ``chosen`` nodes (closed under parents)."""
    keep = np.zeros(nodes.parent.shape[0], dtype=bool)
    keep[chosen] = True
    number = np.cumsum(keep) - 1
    parent = nodes.parent[keep]
    return Draft(np.where(parent < 0, -1, number[np.maximum(parent, 0)]), nodes.rank[keep], nodes.depth[keep])


def draft_tree(draft: Draft) -> Tree:
    """The shape of a draft as tensors."""
    return Tree.from_parents(torch.from_numpy(draft.parent))
