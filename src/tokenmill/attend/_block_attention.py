"""Hierarchical choice in ordinary attention: the heads' own queries and keys find the blocks and the tokens in them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokenmill.attend._baselines import by_head
from tokenmill.attend._block_index import BlockKeys, select
from tokenmill.attend._session import Answer, Reading, SparseAttention

if TYPE_CHECKING:
    from tokenmill.attend.hisa import HISA

_TILE = 64  # queries whose sets are attended at once


@dataclass(slots=True)
class _Pooled:
    """Follower: pooled keys of each KV head, one row for each pair of item and head; a crop makes them anew."""

    groups: int
    index: BlockKeys | None = None

    def each(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.index is not None:
            for name in ("total", "count", "first"):
                value = getattr(self.index, name)
                setattr(self.index, name, change(value.unflatten(0, (-1, self.groups))).flatten(0, 1))

    def crop(self, length: int) -> None:
        if self.index is not None and length < self.index.length:
            self.index = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockAttention(SparseAttention):
    """What `HISA` with ``score_fn="dot"`` attaches: each query head reads its ``keep`` keys of the best blocks.

    Attributes:
        how: the settings.
        keep: keys of each query.
        layers: indices of the layers; None means all with full attention.
    """

    how: HISA
    keep: int
    layers: tuple[int, ...] | None = None
    by_head = True

    def read(self, reading: Reading) -> Answer:
        """See `SparseAttention.read`."""
        batch, groups = reading.key.shape[:2]
        # The last query tells where each row begins; the mask of a whole prompt would be the largest tensor here.
        span = reading.span(reading.seen(reading.queries - 1, reading.queries, reading.size))
        pooled = reading.follower("hisa", _Pooled, groups) or _Pooled(groups)
        if span is None:
            return reading.dense()
        index = self._pool(pooled, reading.key, span.first.repeat_interleave(groups))
        if reading.size <= self.keep:
            return reading.dense()
        heads = reading.query.shape[1]
        # One row for each query head; those of a group look into the same keys.
        rows = torch.arange(batch * heads, device=reading.key.device) // (heads // groups)
        parts = [self._tile(reading, index, rows, span.first, start, stop) for start, stop in reading.chunks(_TILE)]
        return torch.cat(parts, 2).transpose(1, 2).contiguous(), None

    def _pool(self, state: _Pooled, key: Tensor, first: Tensor) -> BlockKeys:
        """The index of all keys (B, G, S, d), of which the last ones are new."""
        index = state.index
        if index is None or index.size != self.how.block_size or index.pool != self.how.pool:
            index = BlockKeys.empty(first, key.shape[-1], self.how.block_size, self.how.pool)
        index.begin(first)
        index.append(key[:, :, index.length :].flatten(0, 1))
        state.index = index
        return index

    def _tile(self, reading: Reading, index: BlockKeys, rows: Tensor, first: Tensor, start: int, stop: int) -> Tensor:
        """Output of the queries start .. stop - 1, (B, H, q, d_v)."""
        query, end = reading.query[:, :, start:stop], reading.end(stop)
        batch, heads, count, _ = query.shape
        key, value = reading.key[:, :, :end], reading.value[:, :, :end]
        if reading.queries > 1:  # `read` has looked at a single query's span
            seen = reading.seen(start, stop, end)
            span = reading.span(seen)
            if span is None or not torch.equal(span.first, first):  # of several texts in a row the last is pooled
                return reading.attend(query, key, value, seen, scaling=reading.scaling)
        chosen, good, scored = (
            torch.cat(part, 1)
            for part in zip(
                *select(
                    query.flatten(0, 1)[:, :, None],
                    key.flatten(0, 1),
                    None,
                    index,
                    valid=None,
                    top_blocks=self.how.blocks(end, self.keep),
                    top_k=self.keep,
                    forced=self.how.forced,
                    score_fn="dot",
                    source=rows,
                ),
                strict=True,
            )
        )
        chosen, good = (x.view(batch, heads, count, -1) for x in (chosen, good))
        reading.count_scored(int(scored[:, -1].sum()), rows=batch * count)
        reading.count_read(chosen[:, :, -1].numel(), end=end, heads=heads)
        if count == 1:
            return by_head(reading, query, key, value, index=chosen[:, :, 0], seen=good)
        # A place that counts for nothing names the query's own token, which is read or not for its own sake.
        mask = torch.zeros(batch, heads, count, end, dtype=torch.uint8, device=key.device)
        mask = mask.scatter_reduce_(-1, chosen, good.to(torch.uint8), "amax").bool()
        return by_head(reading, query, key, value, seen=mask)
