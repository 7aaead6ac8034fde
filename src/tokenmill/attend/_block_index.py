"""Index of keys by blocks: one pooled key a block finds the blocks, the tokens' own keys choose among theirs.

Blocks begin at each row's first real token, so left padding moves nothing. Every function works tile by tile over the
queries and never holds a score for every pair of query and key.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tokenmill.errors import LimitError, unknown_name

POOLS, FORCED, SCORES = ("mean", "max"), ("inside", "extra"), ("dsa", "dot")
Pool = Literal["mean", "max"]
Forced = Literal["inside", "extra"]
ScoreFn = Literal["dsa", "dot"]
_TILE = 1 << 24  # numbers that one tile of gathered keys holds


@dataclass(slots=True)
class BlockKeys:
    """Pooled keys that grow with the cache.

    Attributes:
        total: (B, M, d) float32, sums (or maxima) of the keys of each block.
        count: (B, M) float32, real tokens of each block.
        first: (B,) int64, the first real token of each row.
        size: tokens of a block.
        pool: how a block's keys become one.
        length: tokens that were seen, padding included.
    """

    total: Tensor
    count: Tensor
    first: Tensor
    size: int
    pool: Pool
    length: int = 0

    @classmethod
    def empty(cls, first: Tensor, width: int, size: int, pool: Pool = "mean") -> BlockKeys:
        """No tokens yet, for rows that begin at ``first`` (B,)."""
        total = torch.zeros(len(first), 0, width, device=first.device)
        return cls(total, total.new_zeros(len(first), 0), first, size, pool)

    @property
    def keys(self) -> Tensor:
        """(B, M, d) float32: the pooled key of each block; zeros for blocks without a token."""
        if self.pool == "max":
            return self.total.masked_fill(self.count[..., None] == 0, 0)
        return self.total / self.count[..., None].clamp_min(1)

    def append(self, keys: Tensor) -> None:
        """Add the keys (B, n, d) that follow. In whatever portions they come, sums are added one after another."""
        n = keys.shape[1]
        at = torch.arange(self.length, self.length + n, device=keys.device) - self.first[:, None]  # (B, n)
        block = at.clamp_min(0) // self.size
        more = -(-(self.length + n - int(self.first.min())) // self.size) - self.total.shape[1]  # may be negative
        if more > 0:
            lowest = -torch.inf if self.pool == "max" else 0.0
            fresh = self.total.new_full((len(keys), more, keys.shape[-1]), lowest)
            self.total = torch.cat([self.total, fresh], 1)
            self.count = torch.cat([self.count, self.count.new_zeros(len(keys), more)], 1)
        real = at >= 0
        self.count.scatter_add_(1, block, real.float())
        where = block[..., None].expand(-1, -1, keys.shape[-1])
        if self.pool == "max":
            self.total.scatter_reduce_(1, where, keys.float().masked_fill(~real[..., None], -torch.inf), "amax")
        else:
            self.total.scatter_add_(1, where, keys.float() * real[..., None])
        self.length += n

    def begin(self, first: Tensor) -> None:
        """Let rows that have had nothing but padding so far begin at ``first`` (B,)."""
        self.first = torch.where(self.first >= self.length, first, self.first)

    def crop(self, keys: Tensor) -> None:
        """Go back to the keys (B, n, d) that are left: the block that is cut is made anew from them."""
        fresh = BlockKeys.empty(self.first, keys.shape[-1], self.size, self.pool)
        whole = max(0, (keys.shape[1] - int(self.first.max())) // self.size)
        begin = self.first + whole * self.size
        rest = keys.shape[1] - int(begin.min())
        # Rows begin at places of their own, so what is left over is counted from the earliest.
        fresh.first, fresh.length = begin - int(begin.min()), 0
        fresh.append(keys[:, keys.shape[1] - rest :])
        self.total = torch.cat([self.total[:, :whole], fresh.total], 1)
        self.count = torch.cat([self.count[:, :whole], fresh.count], 1)
        self.length = keys.shape[1]

    def rows(self, index: Tensor) -> None:
        """Take the batch rows ``index``."""
        self.total, self.count, self.first = (x.index_select(0, index) for x in (self.total, self.count, self.first))


def check_budget(where: str, block_size: int, top_blocks: int, top_k: int, forced: Forced) -> None:
    """Refuse budgets that cannot be met.

    Raises:
        LimitError: naming the parameter, its value and the limit.
    """
    named = {"block_size": block_size, "top_blocks": top_blocks, "top_k": top_k}
    for name, value in named.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise LimitError(where, name, value, "an int of at least 1")
    if forced not in FORCED:
        raise unknown_name(where, "forced", forced, FORCED)
    if forced == "inside" and top_blocks < 2:
        raise LimitError(where, "top_blocks", top_blocks, "at least 2", "The first and the newest block always stay.")
    if top_blocks * block_size < top_k:
        raise LimitError(
            where,
            "top_blocks * block_size",
            top_blocks * block_size,
            f"at least top_k={top_k}",
            "Raise top_blocks or block_size, or lower top_k.",
        )


def gated(q: Tensor, keys: Tensor, w: Tensor | None, score_fn: ScoreFn) -> Tensor:
    """Scores of keys for each query in float32.

    Args:
        q: (B, R, H, d).
        keys: (B, n, d), or (B, R, n, d) when each query has its own.
        w: (B, R, H); ``None`` counts every head as 1.
        score_fn: ``"dsa"``: sum_h w_h relu(q_h . k); ``"dot"``: the sum without the relu.

    Returns:
        (B, R, n).
    """
    wide = keys.float() if keys.dim() == 4 else keys.float()[:, None]
    if score_fn == "dot":
        joined = q.float().sum(2) if w is None else torch.einsum("brhd,brh->brd", q.float(), w.float())
        return (wide @ joined[..., None])[..., 0]
    scores = (q.float() @ wide.transpose(-1, -2)).relu_()  # (B, R, H, n)
    return scores.sum(2) if w is None else (w.float()[:, :, None] @ scores)[:, :, 0]


def choose_blocks(scores: Tensor, newest: Tensor, top_blocks: int, forced: Forced) -> tuple[Tensor, Tensor]:
    """Blocks of each query: the best by score, the first and the newest one always.

    Args:
        scores: (B, R, M).
        newest: (B, R) int64, the block that holds the query itself; negative for padding.
        top_blocks: m.
        forced: ``"inside"``: the two count among the m; ``"extra"``: they join them (Algorithm 1 of the paper).

    Returns:
        (B, R, C) int64, and (B, R, C) bool, false at fillers: blocks of the future, and repeats.
    """
    blocks = torch.arange(scores.shape[-1], device=scores.device)
    open_ = blocks <= newest[..., None]
    scores = scores.masked_fill(~open_, -torch.inf)
    count = min(top_blocks, scores.shape[-1])
    edges = torch.stack([torch.zeros_like(newest), newest], -1).clamp_min(0)  # (B, R, 2)
    if forced == "inside":
        scores = scores.scatter(-1, edges, torch.finfo(scores.dtype).max).masked_fill(~open_, -torch.inf)
        best = scores.topk(count, dim=-1).indices
        return best, open_.gather(-1, best)
    # The newest block's mean holds tokens that come after the query, so it joins without being ranked.
    open_ = blocks < newest[..., None]
    best = scores.masked_fill(~open_, -torch.inf).topk(count, dim=-1).indices
    ranked = open_.gather(-1, best)
    known = ((best[..., None] == edges[..., None, :]) & ranked[..., None]).any(-2)  # (B, R, 2)
    both = torch.cat([best, edges], -1)
    joins = ~known & (newest >= 0)[..., None]
    joins[..., 1] &= newest > 0  # with one block the first is the newest
    good = torch.cat([ranked, joins], -1)
    return both, good


def select(
    q: Tensor,
    k: Tensor,
    w: Tensor | None,
    index: BlockKeys,
    *,
    valid: Tensor | None,
    top_blocks: int,
    top_k: int,
    forced: Forced,
    score_fn: ScoreFn,
    tile: int | None = None,
    source: Tensor | None = None,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Tiles of queries, each with chosen keys (B, R, K) int64, whether they count (B, R, K), and keys scored (B, R).

    The queries are the last ones of the sequence. A place that does not count names the query's own token. ``source``
    (B,) says which row of the keys and of the index each row of the queries looks into; ``None``: its own.
    """
    batch, queries, _, _ = q.shape
    total, size = k.shape[1], index.size
    if source is None:
        source = torch.arange(batch, device=k.device)
    pooled, first = index.keys[source], index.first[source, None]  # (B, M, d), (B, 1)
    pooled = pooled[:, : -(-total // size)]  # the index may reach beyond these keys
    kept = min(top_k, total)
    wide = min(top_blocks, pooled.shape[1]) + 2
    rows = tile if tile is not None else max(1, _TILE // (batch * wide * size * k.shape[-1]))
    inner = torch.arange(size, device=k.device)
    rows_of = source[:, None, None] * total  # in the keys of all items, one by one
    flat = k.flatten(0, 1)
    for start in range(0, queries, rows):
        part = slice(start, min(start + rows, queries))
        own = torch.arange(total - queries + part.start, total - queries + part.stop, device=k.device)  # (R,)
        newest = torch.div(own - first, size, rounding_mode="floor")  # (B, R)
        mine, gates = q[:, part], None if w is None else w[:, part]
        blocks, good = choose_blocks(gated(mine, pooled, gates, score_fn), newest, top_blocks, forced)
        at = (blocks * size + first[:, :, None])[..., None] + inner  # (B, R, C, size)
        seen = (good[..., None] & (at <= own[:, None, None]) & (at < total)).flatten(2)
        at = at.flatten(2).clamp_max(total - 1)  # (B, R, C * size)
        if valid is not None:
            seen &= valid[:, part].expand(batch, -1, -1).gather(-1, at)
        theirs = flat.index_select(0, (at + rows_of).flatten()).view(*at.shape, -1)  # (B, R, C * size, d)
        scores = gated(mine, theirs, gates, score_fn).masked_fill(~seen, -torch.inf)
        best = scores.topk(min(kept, scores.shape[-1]), dim=-1)
        counts = best.values > -torch.inf
        chosen = torch.where(counts, at.gather(-1, best.indices), own[:, None])
        yield chosen, counts, seen.sum(-1) + pooled.shape[1]
