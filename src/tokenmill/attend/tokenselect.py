"""TokenSelect: every chunk of queries reads the sinks, the last tokens, and k tokens that the heads voted for.

Wu et al., "TokenSelect: Efficient Long-Context Inference and Length Extrapolation for LLMs via Dynamic Token-Level KV
Cache Selection" (arXiv 2411.02886). Dot products of the mean query with all cached keys become one vote per head (a
softmax over the candidates), and the sum of the votes chooses one set for all heads of the layer: a single gather.
The chosen tokens get the positions 0, 1, 2, ..., so no position leaves the trained range, whatever the length of the
text. While queries stay similar, decoding uses the last set again.

Use it for texts that are longer than the model was trained for, and for long prompts of which little matters at a
time. Not for texts that fit: short contexts come out a little below dense attention.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tokenmill.attend._gather import assemble as assemble
from tokenmill.attend._gather import sparse_attend, take
from tokenmill.attend._selection_cache import SelectionCache as SelectionCache
from tokenmill.attend._session import Answer, Reading, Span, SparseAttention
from tokenmill.attend._voting import VOTES, Vote, mean_query
from tokenmill.attend._voting import safe_cosine as safe_cosine
from tokenmill.attend._voting import select as select
from tokenmill.attend._voting import vote as vote
from tokenmill.budget import check, to_count
from tokenmill.catalog import Card, Paper, Reported
from tokenmill.errors import LimitError, unknown_name

CARD = Card(
    name="TokenSelect",
    kind="attention",
    paper=Paper(
        title=(
            "TokenSelect: Efficient Long-Context Inference and Length Extrapolation for LLMs via Dynamic Token-Level "
            "KV Cache Selection"
        ),
        date="2024-11",
        arxiv="2411.02886",
        code="https://github.com/pzs19/TokenSelect",
    ),
    summary=(
        "Attention reads the first tokens, the last ones, and k tokens that all heads of a layer vote for with the "
        "mean query of a chunk. What is read is numbered contiguously, so positions never leave the trained range."
    ),
    claim=(
        "A model answers over texts many times longer than it was trained for, without training, and attention over "
        "128K tokens is several times faster than dense attention."
    ),
    api=("TokenSelect", "SelectionCache"),
    exact=False,
    trains=False,
    task="long-context",
    works_with=("llama", "qwen2", "gemma3_text"),
    differs=(
        "query head h votes on KV head h // (H // G); the authors' kernel pairs it with h % G",
        "scores are float32, where the authors' buffer is bfloat16",
        "while a selection is reused, the local window grows, so that no token falls between it and the selection; "
        "strict=True keeps the paper's window",
        "chunks of a prompt are counted from its end, so that left-padded rows choose as they would alone",
        "the selection cache works; in the authors' release it is switched off and its call does not fit",
    ),
    reported=(
        Reported(table="2", setting="Qwen2-7B, 2K+512, InfiniteBench", metric="average", value=49.08),
        Reported(table="2", setting="Llama-3-8B, 2K+512, InfiniteBench", metric="average", value=43.90),
    ),
)

Positions = Literal["contiguous", "original"]
Rotate = Callable[[Tensor, Tensor], Tensor]
_POSITIONS = ("contiguous", "original")


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scaling: float,
    positions: Positions = "original",
    seen: Tensor | None = None,
    rotate: Rotate | None = None,
    places: tuple[Tensor, Tensor] | None = None,
    inner: Callable[..., Tensor] = sparse_attend,
) -> Tensor:
    """Attention of a chunk over its selected keys.

    Args:
        query: (B, H, c, d).
        keys: (B, G, n, d) selected, ascending, the chunk's own last.
        values: (B, G, n, d_v).
        scaling: of the dot products.
        positions: ``"original"``: query and keys are rotated already; ``"contiguous"``: they are not, and are rotated
            here to their places among the selected.
        seen: (B or 1, 1 or H, c, n) bool; by default query i sees the first n - c + i + 1 keys.
        rotate: ``rotate(x (B, H, T, d), positions (B, T))``, for ``"contiguous"``.
        places: positions of the queries (B, c) and the keys (B, n); by default n - c .. n - 1 and 0 .. n - 1.
        inner: attention itself, called like `sparse_attend`.

    Returns:
        (B, H, c, d_v).

    Raises:
        LimitError: unknown positions, or contiguous ones without a rotation.
    """
    if positions not in _POSITIONS:
        raise unknown_name("attend", "positions", positions, _POSITIONS)
    c, n = query.shape[2], keys.shape[2]
    if positions == "contiguous":
        if rotate is None:
            raise LimitError("attend", "rotate", rotate, "given for contiguous positions")
        if places is None:
            line = torch.arange(n, device=keys.device).expand(len(keys), -1)
            places = line[:, n - c :], line
        query, keys = rotate(query, places[0]), rotate(keys, places[1])
    if seen is None and c > 1:
        seen = torch.ones(c, n, dtype=torch.bool, device=keys.device).tril(n - c)[None, None]
    return inner(query, keys, values, scaling=scaling, seen=seen)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSelect(SparseAttention):
    """TokenSelect on the full-attention layers of a model.

    Attributes:
        keep: k, how many tokens are voted for: a count, or a share of the cached ones; on top of sinks and window.
        n_init: sinks that are always read.
        n_local: last tokens that are always read.
        chunk: queries that vote together in a prefill, at most n_local.
        theta: cosine from which on decoding reuses a selection, in [-1, 1]; None selects at every step.
        vote: how heads are joined: soft, hard or topk.
        scale: of the dot products in the vote; "scaling" takes the layer's own.
        pool: odd width of a maximum over neighbouring votes; 1 is none.
        positions: "contiguous" numbers what is read 0, 1, 2, ...; "original" leaves positions as they are.
        strict: keep the window at n_local tokens while a selection is reused, as in the paper.
        layers: indices of the layers; None means all with full attention.
    """

    keep: int | float = 2048  # section 5.1
    n_init: int = 128
    n_local: int = 512
    chunk: int = 512
    theta: float | None = 0.9
    vote: Vote = "soft"
    scale: float | Literal["scaling"] = 1.0  # equation 7
    pool: int = 1
    positions: Positions = "contiguous"
    strict: bool = False
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        where = "TokenSelect"
        check(where, self.keep)
        for name, least in (("n_init", 0), ("n_local", 1), ("chunk", 1), ("pool", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise LimitError(where, name, value, f"an int of at least {least}")
        if self.pool % 2 == 0:
            raise LimitError(where, "pool", self.pool, "odd")
        if self.chunk > self.n_local:
            mend = "A chunk has to see its own keys, which are in the local window."
            raise LimitError(where, "chunk", self.chunk, f"at most n_local = {self.n_local}", mend)
        if self.theta is not None and not -1.0 <= self.theta <= 1.0:
            raise LimitError(where, "theta", self.theta, "in [-1, 1], or None for no reuse")
        if self.scale != "scaling" and not (isinstance(self.scale, int | float) and 0.0 < self.scale < torch.inf):
            raise LimitError(where, "scale", self.scale, "positive, or 'scaling'")
        for name, known in (("vote", VOTES), ("positions", _POSITIONS)):
            if getattr(self, name) not in known:
                raise unknown_name(where, name, getattr(self, name), known)

    @property
    def needs_rotary(self) -> bool:
        """Contiguous positions turn keys back and forth."""
        return self.positions == "contiguous"

    def read(self, reading: Reading) -> Answer:
        """See `SparseAttention.read`."""
        # State first: keys have to be turned back when they are written, also while everything is read.
        keys = reading.unrotated_keys() if self.needs_rotary else reading.key
        state = None
        if self.theta is not None:
            state = reading.follower("tokenselect", SelectionCache, self.theta)
            if state is not None and reading.queries > 1:
                state.reset()
                state = None
        if reading.size <= self._budget(reading.size):
            return reading.dense()
        queries = reading.unrotated_query() if self.needs_rotary else reading.query
        parts = [self._chunk(reading, queries, keys, state, *bounds) for bounds in reading.chunks(self.chunk)]
        return torch.cat(parts, 2).transpose(1, 2).contiguous(), None

    def _budget(self, size: int) -> int:
        return self.n_init + to_count("TokenSelect", self.keep, size) + self.n_local

    def _chunk(
        self, reading: Reading, queries: Tensor, keys: Tensor, state: SelectionCache | None, start: int, stop: int
    ) -> Tensor:
        """Output of the queries start .. stop - 1, (B, H, c, d_v)."""
        end = reading.end(stop)
        budget = self._budget(end)
        seen = reading.seen(start, stop, end)
        span = reading.span(seen)
        if span is None or span.longest <= budget:
            return reading.attend(
                reading.query[:, :, start:stop],
                reading.key[:, :, :end],
                reading.value[:, :, :end],
                seen,
                scaling=reading.scaling,
            )
        batch, query = len(queries), queries[:, :, start:stop]
        real = seen.any(-1).any(1).expand(batch, -1)  # (B, c)
        critical = query
        if self.needs_rotary:
            ahead = self.n_local + (real.long().cumsum(-1) - 1).clamp_min(0)
            critical = _rotate(reading, self.n_local + stop - start)(query, ahead)
        index, since = self._choose(
            reading, state, mean_query(critical, real), keys[:, :, :end], span, budget - self.n_init - self.n_local
        )
        slots = assemble(
            self.n_init, index, self.n_local, span.stop, start=span.first, since=since, strict=self.strict
        )  # (B, n)
        at = slots.clamp_min(0)
        inside = seen.expand(batch, -1, -1, -1).gather(
            -1, at[:, None, None].expand(batch, seen.shape[1], stop - start, -1)
        )
        inside = inside & (slots >= 0)[:, None, None]  # (B, 1 or H, c, n)
        alone = batch == 1 and stop - start == 1 and reading.mask is None
        return attend(
            query,
            take(keys, at),
            take(reading.value, at),
            scaling=reading.scaling,
            positions=self.positions,
            seen=None if alone else inside,
            rotate=_rotate(reading, slots.shape[1]) if self.needs_rotary else None,
            places=_places(inside.any(1), slots, end - (stop - start)) if self.needs_rotary else None,
            inner=lambda q, k, v, *, scaling, seen: reading.attend(q, k, v, seen, scaling=scaling, end=end),
        )

    def _choose(
        self, reading: Reading, state: SelectionCache | None, query: Tensor, keys: Tensor, span: Span, k: int
    ) -> tuple[Tensor, Tensor | None]:
        """Chosen slots (B, k), and what the spans ended at when they were chosen (B,); ``None``: they are new."""
        batch, flat = len(query), query.flatten(1)
        kept = None if state is None else state.get(reading.layer, flat)
        missing = None if kept is None else kept[:, 0] < 0
        count = batch if missing is None else int(missing.sum())
        reading.trace.reused += batch - count
        if state is not None and count == 0:
            return state.stored(reading.layer)
        if state is None or kept is None or missing is None:
            index = self._select(reading, query, keys, span, k)
            if state is not None:
                state.put(reading.layer, flat, index, since=span.stop)
            return index, None
        # Rows that select anew take the width of those that do not.
        index = self._select(reading, query[missing], keys[missing], span.rows(missing), kept.shape[1])
        state.put(reading.layer, flat[missing], index, since=span.stop[missing], rows=missing)
        return state.stored(reading.layer)

    def _select(self, reading: Reading, query: Tensor, keys: Tensor, span: Span, k: int) -> Tensor:
        candidates = span.mask(keys.shape[2], skip=self.n_init, leave=self.n_local)
        scale = reading.scaling if self.scale == "scaling" else float(self.scale)
        score = vote(query, keys, self.vote, scale=scale, valid=candidates, k=k, pool=self.pool)
        looked_at = max(span.longest - self.n_init - self.n_local, 0)
        reading.count_scored(len(query) * keys.shape[1] * looked_at, rows=len(query))
        return select(score, k)


def _rotate(reading: Reading, bound: int) -> Rotate:
    """Rotation to positions below ``bound``."""
    turn = reading.rotary()
    return lambda x, positions: turn.rotate(x, turn.phases_below(positions, bound))


def _places(inside: Tensor, slots: Tensor, own: int) -> tuple[Tensor, Tensor]:
    """Contiguous positions of queries (B, c) and keys (B, n).

    Args:
        inside: (B, c, n) bool, what each query sees of the selected keys.
        slots: (B, n).
        own: slot of the chunk's first query.
    """
    query = (inside.sum(-1) - 1).clamp_min(0)  # (B, c)
    key = (inside.any(1).long().cumsum(-1) - 1).clamp_min(0)  # (B, n)
    # A key of the chunk stands where its query does: on a branched draft that is its depth, not its place in the list.
    offset = slots - own
    mine = (offset >= 0) & (offset < inside.shape[1])
    return query, torch.where(mine, query.gather(1, offset.clamp(0, inside.shape[1] - 1)), key)


def small() -> TokenSelect:
    """Sets of 8 of 24 tokens, chosen by each query for itself."""
    return TokenSelect(keep=3, n_init=1, n_local=4, chunk=1)
