"""Repeated random splits of tokens, all attempts at once, with exactly the law of making them one after another.

The process: an attempt draws a place of the present sequence, all alike; a token with pairs there becomes one of them,
all alike; a token without pairs stays, and the attempt is spent. A later attempt may hit a piece of an earlier one.

How it is made parallel. Give every leaf a slot that keeps its name: token i of the sequence is slot i, and a split
leaves its left part in the slot that was hit and its right part in a new slot, named after the attempt. Before proposal
t (from 0) the slots are among n + t names, so draw one of those; if nothing lives there (an attempt that failed made no
slot), the proposal does not count and the next one is tried. That is rejection sampling: what counts is uniform over
the leaves that live, whatever happened before, and no draw depends on how many there are. Which slot a proposal hits is
then known at once for all of them; contents follow in a few rounds (first hits of tokens, then hits that follow these
on the same slot or on a slot that they made). The first N proposals that count are the N attempts.

Proposals get wasted as the names outgrow the leaves, so many attempts are made in blocks: the process has no memory but
the sequence, hence a block may start from what the last one left.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tokenmill.text._expansion_table import ExpansionTable

Ints = NDArray[np.int64]
Words = NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mixed(x: Words) -> Words:
    """The finaliser of SplitMix64: neighbouring numbers become unrelated ones."""
    x = x ^ (x >> np.uint64(30))
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def example_keys(seed: int, epoch: int, indices: Ints) -> Words:
    """One stream of draws for each example, told by the seed, the epoch and the example's own number alone."""
    with np.errstate(over="ignore"):
        key = mixed(np.array([seed], dtype=np.uint64) + _GOLDEN)
        key = mixed(key + np.uint64(epoch) * _GOLDEN)
        return mixed(key + indices.astype(np.uint64) * _GOLDEN)


class Leaves(NamedTuple):
    """Sequences behind one another.

    Attributes:
        ids: (T,) int64.
        sources: (T,) int64, the place in the original flat array that a leaf is a piece of.
        lengths: (B,) int64, leaves of each sequence.
    """

    ids: Ints
    sources: Ints
    lengths: Ints


def split(
    table: ExpansionTable,
    ids: Ints,
    lengths: Ints,
    attempts: Ints,
    keys: Words,
    *,
    protected: NDArray[np.bool_] | None = None,
    most: Ints | None = None,
) -> Leaves:
    """Make the attempts of every sequence.

    Args:
        table: the pairs.
        ids: (T,) int64, the sequences behind one another.
        lengths: (B,) int64.
        attempts: (B,) int64, N of each sequence.
        keys: (B,) uint64, see `example_keys`.
        protected: (T,) bool, tokens that are not split; an attempt on one is spent.
        most: (B,) int64, successes after which a sequence is left alone.
    """
    leaves = Leaves(ids, np.arange(len(ids)), lengths)
    left = np.where(lengths > 0, attempts, 0)
    allowed = np.full(len(lengths), np.iinfo(np.int64).max) if most is None else most
    left = np.where(allowed > 0, left, 0)
    while left.any():
        drawn = _draw(leaves, left, keys)
        cover = None if protected is None else protected[leaves.sources]
        leaves, spent, won = settle(table, leaves, drawn, left, allowed, cover)
        allowed = allowed - won
        left = np.where(allowed > 0, left - spent, 0)
        if left.any():
            left = np.where(_can_grow(table, leaves, protected), left, 0)
            with np.errstate(over="ignore"):
                keys = mixed(keys + _GOLDEN)
    return leaves


class Drawn(NamedTuple):
    """Proposals of all sequences behind one another, in the order of time within each.

    Attributes:
        counts: (B,) int64, proposals of each sequence.
        slots: (P,) int64 in [0, n + t): which slot proposal t of its sequence hits.
        fair: (P,) bool; the few that would make slots unequally likely are False and do not count.
        picks: (P,) uint64, which pair, to be reduced to the number of pairs.
    """

    counts: Ints
    slots: Ints
    fair: NDArray[np.bool_]
    picks: Words


def _draw(leaves: Leaves, left: Ints, keys: Words) -> Drawn:
    counts = _proposals(leaves.lengths, left)
    starts = np.cumsum(counts) - counts
    row = np.repeat(np.arange(len(counts)), counts)  # (P,)
    t = np.arange(len(row)) - starts[row]
    with np.errstate(over="ignore"):
        at = keys[row] + (2 * t + 1).astype(np.uint64) * _GOLDEN
        x, picks = mixed(at), mixed(at + _GOLDEN)
        names = (leaves.lengths[row] + t).astype(np.uint64)
        slots = x % names
        fair = x - slots <= np.uint64(0) - names  # the last, incomplete run of 0 .. names - 1 is not used
    return Drawn(counts, slots.astype(np.int64), fair, picks)


def _proposals(live: Ints, left: Ints) -> Ints:
    """How many proposals hold `left` attempts nearly always even if none succeeds, at most half the leaves and 8."""
    n = np.maximum(live, 1)
    enough = n * np.expm1(np.minimum(left / n, 1.0))  # n log((n + t) / n) of t proposals hit one of the n tokens
    enough = enough + 4 * np.sqrt(enough - np.minimum(left, n) + 1e-9) + 2
    return np.where(left > 0, np.minimum(enough.astype(np.int64), n // 2 + 8), 0)


def settle(
    table: ExpansionTable,
    leaves: Leaves,
    drawn: Drawn,
    left: Ints,
    allowed: Ints,
    protected: NDArray[np.bool_] | None = None,
) -> tuple[Leaves, Ints, Ints]:
    """What the proposals do.

    Args:
        table: the pairs.
        leaves: the sequences before.
        drawn: the proposals.
        left: (B,) int64, attempts that a sequence still has; proposals after them do nothing.
        allowed: (B,) int64, successes that a sequence may still have.
        protected: (T,) bool, leaves that are not split.

    Returns:
        the sequences after, attempts that were made (B,) and successes (B,).
    """
    total, counts = len(leaves.ids), drawn.counts
    starts = np.cumsum(counts) - counts
    row = np.repeat(np.arange(len(counts)), counts)
    begin = np.cumsum(leaves.lengths) - leaves.lengths
    new = drawn.slots - leaves.lengths[row]  # >= 0: the slot that this proposal of the same sequence made
    hit = np.where(new < 0, begin[row] + drawn.slots, total + starts[row] + new)  # (P,) in [0, T + P)
    rounds = _Rounds(table, leaves.ids, hit, drawn.fair, drawn.picks, protected)
    nth = _running(rounds.counted, starts, row)
    kept = rounds.success & (nth <= left[row])
    made = _running(kept, starts, row)
    kept &= made <= allowed[row]
    chosen = np.flatnonzero(kept)  # (K,), in the order of time
    won = np.bincount(row[chosen], minlength=len(counts))
    spent = np.minimum(np.bincount(row[rounds.counted], minlength=len(counts)), left)
    contents = np.concatenate([leaves.ids, rounds.right])  # (T + P,)
    contents[hit[chosen]] = rounds.left[chosen]  # of several splits of one slot the last stays
    source = rounds.source[chosen]
    # Within a token the place in its bytes gives the order.
    order = np.argsort(source * (int(table.lengths.max(initial=0)) + 1) + rounds.offset[chosen])
    place = source[order] + 1 + np.arange(len(order))
    old = np.ones(total + len(order), dtype=bool)
    old[place] = False
    ids = np.empty(len(old), dtype=np.int64)
    ids[old], ids[place] = contents[:total], contents[total + chosen[order]]
    sources = np.empty_like(ids)
    sources[old], sources[place] = leaves.sources, leaves.sources[source[order]]
    return Leaves(ids, sources, leaves.lengths + won), spent, won


class _Rounds:
    """The outcome of every proposal, worked out from hits on tokens to hits that depend on them.

    Attributes:
        counted: (P,) bool, it hit a leaf.
        success: (P,) bool, and that leaf was split.
        left, right: (P,) int64, into these.
        source: (P,) int64, the token of the sequence that the leaf is a piece of.
        offset: (P,) int64, where the right part begins in that token's bytes.
    """

    def __init__(
        self,
        table: ExpansionTable,
        ids: Ints,
        hit: Ints,
        fair: NDArray[np.bool_],
        picks: Words,
        protected: NDArray[np.bool_] | None,
    ) -> None:
        n, total = len(hit), len(ids)
        self.counted, self.success = np.zeros(n, dtype=bool), np.zeros(n, dtype=bool)
        self.left, self.right, self.source, self.offset = (np.zeros(n, dtype=np.int64) for _ in range(4))
        now, first, follow = _chains(hit, total, fair)
        content, source, offset = ids[hit[now]], hit[now], np.zeros(len(now), dtype=np.int64)
        while len(now):
            self.counted[now] = True
            begin = table.offsets[content]
            width = table.offsets[content + 1] - begin
            if protected is not None:
                width = np.where(protected[source], 0, width)
            ok = np.flatnonzero(width)
            pair = begin[ok] + (picks[now[ok]] % width[ok].astype(np.uint64)).astype(np.int64)
            won, right = now[ok], table.right[pair].astype(np.int64)
            content[ok] = table.left[pair]
            behind = offset[ok] + table.lengths[content[ok]]
            self.success[won] = True
            self.left[won], self.right[won], self.source[won], self.offset[won] = content[ok], right, source[ok], behind
            on, off = follow[now], first[won]  # the next hit of the same slot, the first of the new one
            a, b = on >= 0, off >= 0
            now = np.concatenate([on[a], off[b]])
            content = np.concatenate([content[a], right[b]])
            source = np.concatenate([source[a], source[ok][b]])
            offset = np.concatenate([offset[a], behind[b]])


def _chains(hit: Ints, total: int, fair: NDArray[np.bool_]) -> tuple[Ints, Ints, Ints]:
    """The first hit of each token, of each new slot (P,), and the next hit of the same slot (P,); -1 for none."""
    able = np.flatnonzero(fair)
    order = able[np.argsort(hit[able], kind="stable")]
    same = hit[order[1:]] == hit[order[:-1]]
    first, follow = np.full(len(hit), -1), np.full(len(hit), -1)
    follow[order[:-1][same]] = order[1:][same]
    heads = order[np.concatenate([np.ones(min(1, len(order)), dtype=bool), ~same])]
    new = hit[heads] >= total
    first[hit[heads[new]] - total] = heads[new]
    return heads[~new], first, follow


def _running(flags: NDArray[np.bool_], starts: Ints, row: Ints) -> Ints:
    """How many flags are up in the same sequence up to here, this one included."""
    total = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(flags)])
    return total[1:] - total[starts][row]


def _can_grow(table: ExpansionTable, leaves: Leaves, protected: NDArray[np.bool_] | None) -> NDArray[np.bool_]:
    """(B,) bool: sequences with a leaf that may still be split."""
    able = table.offsets[leaves.ids + 1] > table.offsets[leaves.ids]
    if protected is not None:
        able &= ~protected[leaves.sources]
    row = np.repeat(np.arange(len(leaves.lengths)), leaves.lengths)
    return np.bincount(row[able], minlength=len(leaves.lengths)) > 0


def finest(table: ExpansionTable, leaves: Leaves) -> Leaves:
    """Where the process ends: every leaf that has a pair is split, shortest left part first, until none has one."""
    while True:
        begin = table.offsets[leaves.ids]
        can = np.flatnonzero(table.offsets[leaves.ids + 1] > begin)
        if not len(can):
            return leaves
        widths = np.ones(len(leaves.ids), dtype=np.int64)
        widths[can] = 2
        row = np.repeat(np.arange(len(leaves.lengths)), leaves.lengths)
        at = (np.cumsum(widths) - widths)[can]
        ids = np.repeat(leaves.ids, widths)
        ids[at], ids[at + 1] = table.left[begin[can]], table.right[begin[can]]
        added = np.bincount(row[can], minlength=len(leaves.lengths))
        leaves = Leaves(ids, np.repeat(leaves.sources, widths), leaves.lengths + added)
