"""What every sparse attention is measured against: the best choice there is, and three that need little."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tokenmill.attend._gather import assemble, grouped, heads, sparse_attend, take, top_indices, window_scores
from tokenmill.attend._session import Answer, Reading, SparseAttention
from tokenmill.budget import check, to_count
from tokenmill.errors import LimitError, unknown_name

_TILE = 64  # queries whose scores are held at once


@dataclass(frozen=True, slots=True, kw_only=True)
class OracleTopK(SparseAttention):
    """Each query head reads the keys with the highest exact scores: an upper bound, since it reads all keys to choose.

    Attributes:
        keep: share or count of the cached tokens.
        layers: indices of the layers; None means all with full attention.
    """

    keep: int | float = 256
    layers: tuple[int, ...] | None = None
    by_head = True

    def __post_init__(self) -> None:
        check("OracleTopK", self.keep)

    def read(self, reading: Reading) -> Answer:
        """See `SparseAttention.read`."""
        if reading.size <= to_count("OracleTopK", self.keep, reading.size):
            return reading.dense()
        parts = [self._tile(reading, *bounds) for bounds in reading.chunks(_TILE)]
        return torch.cat(parts, 2).transpose(1, 2).contiguous(), None

    def _tile(self, reading: Reading, start: int, stop: int) -> Tensor:
        end = reading.end(stop)
        query, key = reading.query[:, :, start:stop], reading.key[:, :, :end]
        seen = reading.seen(start, stop, end)
        score = grouped(query, key).masked_fill(~seen, -torch.inf)  # (B, H, q, end)
        index = top_indices(score, min(to_count("OracleTopK", self.keep, end), end))
        reading.count_scored(key[..., 0].numel(), rows=len(query))
        reading.count_read(index[:, :, -1].numel(), end=end, heads=query.shape[1])
        chosen = torch.zeros_like(score, dtype=torch.bool).scatter(-1, index, True) & seen
        return by_head(reading, query, key, reading.value[:, :, :end], seen=chosen)


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamingLLM(SparseAttention):
    """Every query reads the first tokens and the last ones (Xiao et al., arXiv 2309.17453).

    Attributes:
        keep: share or count of the tokens that are read, sinks included.
        n_sink: first tokens that are always read.
        positions: "contiguous" moves the sinks to right before the window, as if nothing lay between; "original" leaves
            all positions as they are.
        layers: indices of the layers; None means all with full attention.
    """

    keep: int | float = 1024
    n_sink: int = 4
    positions: Literal["contiguous", "original"] = "contiguous"
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check("StreamingLLM", self.keep)
        _at_least("StreamingLLM", 0, n_sink=self.n_sink)
        if self.positions not in ("contiguous", "original"):
            raise unknown_name("StreamingLLM", "positions", self.positions, ("contiguous", "original"))
        if isinstance(self.keep, int):
            self._window(self.keep)

    @property
    def needs_rotary(self) -> bool:
        """Contiguous positions move the sinks."""
        return self.positions == "contiguous"

    def read(self, reading: Reading) -> Answer:
        """See `SparseAttention.read`."""
        keys = reading.unrotated_keys() if self.needs_rotary else reading.key
        keep = to_count("StreamingLLM", self.keep, reading.size)
        if reading.size <= keep:
            return reading.dense()
        window = self._window(keep)
        parts = [self._chunk(reading, keys, window, *bounds) for bounds in reading.chunks(max(window, _TILE))]
        return torch.cat(parts, 2).transpose(1, 2).contiguous(), None

    def _window(self, keep: int) -> int:
        if keep <= self.n_sink:
            limit = f"above n_sink = {self.n_sink}, since the window needs a token"
            raise LimitError("StreamingLLM", "keep", self.keep, limit)
        return keep - self.n_sink

    def _chunk(self, reading: Reading, unrotated: Tensor, window: int, start: int, stop: int) -> Tensor:
        end, count = reading.end(stop), stop - start
        query, key, value = reading.query[:, :, start:stop], reading.key[:, :, :end], reading.value[:, :, :end]
        seen = reading.seen(start, stop, end)
        span = reading.span(seen)
        if span is None or end <= self.n_sink + window:
            return reading.attend(query, key, value, seen, scaling=reading.scaling)
        batch = len(query)
        none = span.first.new_empty(batch, 0)
        slots = assemble(self.n_sink, none, window + count - 1, span.stop, start=span.first)  # (B, n)
        at = slots.clamp_min(0)
        inside = seen.expand(batch, -1, -1, -1).gather(-1, at[:, None, None].expand(-1, seen.shape[1], count, -1))
        # Ranks count from a row's first real token, so padding moves nothing.
        rank = at - span.first[:, None]  # (B, n)
        own = (seen.expand(batch, -1, -1, -1)[:, 0].sum(-1) - 1).clamp_min(0)  # (B, c)
        near = (rank[:, None] < self.n_sink) | (rank[:, None] > own[..., None] - window)
        inside = inside & ((slots >= 0)[:, None] & near)[:, None]
        key, value = take(key, at), take(value, at)
        if self.needs_rotary:
            # A query sees the window from where it stands and the sinks from its place in the cache. Both fit into one
            # dot product of twice the width.
            turn = reading.rotary()
            place = own.clamp_max(self.n_sink + window - 1)
            moved = turn.rotate(turn.unrotate(query, _phases(reading, start, stop)), turn.phases(place))
            first = at[:, : self.n_sink]
            sinks = turn.rotate(take(unrotated, first), turn.phases(rank[:, : self.n_sink]))
            query = torch.cat([moved, query], -1)  # (B, H, c, 2 d)
            pad = torch.nn.functional.pad
            width = key.shape[-1]
            key = torch.cat([pad(sinks, (0, width)), pad(key[:, :, self.n_sink :], (width, 0))], 2)
        return reading.attend(query, key, value, inside, scaling=reading.scaling, end=end)


@dataclass(slots=True)
class _Kept:
    """Follower: slots (B, G, k) that SnapKV left of a prompt of ``length`` slots, with -1 in short rows."""

    index: Tensor | None = None
    length: int = 0

    def each(self, change: Callable[[Tensor], Tensor]) -> None:
        self.index = None if self.index is None else change(self.index)

    def crop(self, length: int) -> None:
        if length < self.length:
            self.index = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapKV(SparseAttention):
    """After a prompt its last queries choose what decoding may still read of it (Li et al., arXiv 2404.14469).

    A forward with more than one query is a prompt and is read whole. Nothing leaves the cache: what is dropped is not
    read.

    Attributes:
        keep: share or count of the prompt's tokens that stay, the window included.
        window: last tokens of the prompt, which choose and always stay.
        pool: odd width of the mean over neighbouring scores.
        layers: indices of the layers; None means all with full attention.
    """

    keep: int | float = 1024
    window: int = 32
    pool: int = 5
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check("SnapKV", self.keep)
        _at_least("SnapKV", 1, window=self.window, pool=self.pool)
        if self.pool % 2 == 0:
            raise LimitError("SnapKV", "pool", self.pool, "odd")
        if isinstance(self.keep, int) and self.keep <= self.window:
            raise LimitError("SnapKV", "keep", self.keep, f"above window = {self.window}", "The window always stays.")

    def read(self, reading: Reading) -> Answer:
        """See `SparseAttention.read`."""
        kept = reading.follower("snapkv", _Kept)
        if kept is not None and reading.queries > 1:
            kept.index, kept.length = self._choose(reading), reading.size
        if kept is None or kept.index is None or reading.queries > 1:
            return reading.dense()
        batch, groups = kept.index.shape[:2]
        new = torch.arange(kept.length, reading.size, device=kept.index.device).expand(batch, groups, -1)
        slots = torch.cat([kept.index, new], -1)  # (B, G, n)
        at = slots.clamp_min(0)
        seen = reading.seen(0, 1, reading.size)[:, :1, 0].expand(batch, groups, -1).gather(-1, at) & (slots >= 0)
        out = reading.attend(
            reading.query,
            take(reading.key, at),
            take(reading.value, at),
            heads(seen[..., None], reading.query.shape[1]).mT,
            scaling=reading.scaling,
            end=reading.size,
        )
        return out.transpose(1, 2).contiguous(), None

    def _choose(self, reading: Reading) -> Tensor | None:
        """(B, G, k) ascending, or ``None`` when everything stays."""
        size, keep = reading.size, max(to_count("SnapKV", self.keep, reading.size), self.window + 1)
        if size <= keep:
            return None
        first = max(reading.queries - self.window, 0)
        seen = reading.seen(first, reading.queries, size)
        span = reading.span(seen)
        if span is None:
            return None
        score = window_scores(reading.query[:, :, first:], reading.key, seen, scaling=reading.scaling)
        score = torch.nn.functional.avg_pool1d(score, self.pool, stride=1, padding=self.pool // 2)
        batch, groups = reading.key.shape[:2]
        score = score.view(batch, groups, -1, size).mean(2)  # (B, G, S)
        prefix = span.mask(size, leave=self.window)[:, None]
        index = top_indices(score.masked_fill(~prefix, -torch.inf), keep - self.window)
        index = index.masked_fill(~prefix.expand_as(score).gather(-1, index), -1)
        window = span.stop[:, None] - self.window + torch.arange(self.window, device=index.device)
        window = window.masked_fill(window < span.first[:, None], -1)
        reading.count_scored(reading.key[..., 0].numel(), rows=batch)
        return torch.cat([index, window[:, None].expand(-1, groups, -1)], -1)


@dataclass(slots=True)
class Pages:
    """Follower: the smallest and the largest value of each channel of each full page of keys.

    Attributes:
        page: keys of a page.
        low: (B, G, P, D) float32.
        high: (B, G, P, D) float32.
        real: (B, P) bool, whether a page has a key that is no padding.
    """

    page: int
    low: Tensor | None = None
    high: Tensor | None = None
    real: Tensor | None = None

    def update(self, key: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Bounds of all pages, the last one may be short.

        Args:
            key: (B, G, S, D).
            valid: (B, S) bool, false at padding.

        Returns:
            low and high, (B, G, P, D), and real (B, P).
        """
        done = 0 if self.low is None else self.low.shape[2]
        new = _bounds(key[:, :, done * self.page :], valid[:, done * self.page :], self.page)
        old = (self.low, self.high, self.real)
        low, high, real = (
            b if a is None else torch.cat([a, b], axis) for a, b, axis in zip(old, new, (2, 2, 1), strict=True)
        )
        full = key.shape[2] // self.page
        self.low, self.high, self.real = low[:, :, :full], high[:, :, :full], real[:, :full]
        return low, high, real

    def each(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.low is not None and self.high is not None and self.real is not None:
            self.low, self.high, self.real = change(self.low), change(self.high), change(self.real)

    def crop(self, length: int) -> None:
        if self.low is not None and self.high is not None and self.real is not None:
            full = length // self.page
            self.low, self.high, self.real = self.low[:, :, :full], self.high[:, :, :full], self.real[:, :full]


def _bounds(key: Tensor, valid: Tensor, page: int) -> tuple[Tensor, Tensor, Tensor]:
    b, g, s, d = key.shape
    short = -s % page
    pad = torch.nn.functional.pad
    real = pad(valid, (0, short)).view(b, -1, page)  # (B, P, page)
    rows = pad(key.float(), (0, 0, 0, short)).view(b, g, -1, page, d)
    hidden = ~real[:, None, :, :, None]
    low = rows.masked_fill(hidden, torch.inf).amin(3)
    high = rows.masked_fill(hidden, -torch.inf).amax(3)
    some = real.any(-1)
    empty = ~some[:, None, :, None]
    return low.masked_fill(empty, 0), high.masked_fill(empty, 0), some


def page_bound(query: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The largest dot product that a key within the bounds could have.

    Args:
        query: (B, H, D).
        low: (B, G, P, D).
        high: (B, G, P, D).

    Returns:
        (B, H, P) float32; no key of a page is above it.
    """
    q = query[:, :, None]
    return (grouped(q.clamp_min(0), high) + grouped(q.clamp_max(0), low))[:, :, 0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Quest(SparseAttention):
    """In decoding each query head reads the pages that could hold the highest scores (Tang et al., arXiv 2406.10774).

    Attributes:
        keep: share or count of the cached tokens, rounded down to pages.
        page: tokens of a page.
        min_pages: pages that are read at least.
        newest: whether the page of the current token is always one of them.
        dense_layers: first layers of the model that read everything.
        layers: indices of the layers; None means all with full attention.
    """

    keep: int | float = 1024
    page: int = 16
    min_pages: int = 3
    newest: bool = True
    dense_layers: int = 2
    layers: tuple[int, ...] | None = None
    by_head = True

    def __post_init__(self) -> None:
        check("Quest", self.keep)
        _at_least("Quest", 1, page=self.page, min_pages=self.min_pages)
        _at_least("Quest", 0, dense_layers=self.dense_layers)

    def read(self, reading: Reading) -> Answer:
        """See `SparseAttention.read`."""
        keep = max(to_count("Quest", self.keep, reading.size) // self.page, self.min_pages)
        if reading.layer < self.dense_layers or reading.queries > 1 or keep * self.page >= reading.size:
            return reading.dense()
        batch, count = reading.query.shape[:2]
        valid = reading.seen(0, 1, reading.size)[:, 0, 0].expand(batch, -1)  # (B, S)
        pages = reading.follower("quest", Pages, self.page) or Pages(self.page)
        low, high, real = pages.update(reading.key, valid)
        bound = page_bound(reading.query[:, :, 0], low, high).masked_fill(~real[:, None], -torch.inf)
        if self.newest:
            bound[..., -1] = torch.inf
        index = top_indices(bound, keep)  # (B, H, pages)
        slots = (index[..., None] * self.page + torch.arange(self.page, device=index.device)).flatten(2)
        inside = slots < reading.size  # the last page may be short
        slots = slots.clamp_max(reading.size - 1)
        inside = inside & valid[:, None].expand(-1, count, -1).gather(-1, slots)
        reading.count_scored(2 * low[..., 0].numel(), rows=batch)
        reading.count_read(slots.numel(), end=reading.size, heads=count)
        out = by_head(reading, reading.query, reading.key, reading.value, index=slots, seen=inside[:, :, None])
        return out.transpose(1, 2).contiguous(), None


def by_head(
    reading: Reading, query: Tensor, key: Tensor, value: Tensor, *, seen: Tensor, index: Tensor | None = None
) -> Tensor:
    """Attention where each query head has a set of its own; the models' functions know sets of KV heads only."""
    softcap = reading.options.get("softcap")
    return sparse_attend(query, key, value, scaling=reading.scaling, index=index, seen=seen, softcap=softcap)


def _phases(reading: Reading, start: int, stop: int) -> tuple[Tensor, Tensor]:
    cos, sin = reading.call.position_embeddings
    return cos[:, start:stop], sin[:, start:stop]


def _at_least(where: str, least: int, **given: int) -> None:
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise LimitError(where, name, value, f"an int of at least {least}")
