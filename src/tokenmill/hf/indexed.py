"""A KV cache that writes chosen rows and lets attention read chosen rows.

Row ``r`` holds the token at place ``r`` of the sequence. A policy recomputes any places by feeding just their tokens
with ``plan(write=places)``, and prunes by ``plan(read=places)``; without a plan the cache appends and reads all, like
an ordinary one. Keys are cached after rotation, so pass ``position_ids`` whenever rows are chosen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from tokenmill.errors import LimitError

from .layout import attention_shape

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(slots=True)
class Plan:
    """Rows of the next forwards: (Q,) or (B, Q) to write and (R,) or (B, R) to read; ``None``: append, read all."""

    write: Tensor | None = None
    read: Tensor | None = None
    stop: int = 0  # one past the last row that is written


class IndexedLayer(CacheLayerMixin):
    """One layer's rows (B, G, S, D), in a buffer that grows, or of ``capacity`` rows from the start."""

    is_sliding = False
    is_croppable = True

    def __init__(self, capacity: int | None = None, plan: Plan | None = None) -> None:
        super().__init__()
        if capacity is not None and capacity < 1:
            raise LimitError("IndexedLayer", "capacity", capacity, "at least 1")
        self.capacity = capacity
        self.plan = plan if plan is not None else Plan()
        self.length = 0
        self._store: tuple[Tensor, Tensor] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the buffers for the batch, heads, width, dtype and device of the first states."""
        self.dtype, self.device = key_states.dtype, key_states.device
        rows = self.capacity or key_states.shape[-2]
        self._store = (_empty(key_states, rows), _empty(value_states, rows))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write (B, G, Q, D) to the planned rows; returns the rows that attention reads, (B, G, R, D).

        Raises:
            LimitError: a plan for another number of tokens or batch rows, more rows than the capacity.
        """
        plan, (batch, _, new, _) = self.plan, key_states.shape
        stop = self.length + new if plan.write is None else plan.stop
        if plan.write is not None and plan.write.shape[-1] != new:
            raise LimitError("IndexedLayer", "plan.write", plan.write.shape[-1], f"one row for each of {new} tokens")
        for name, rows in (("write", plan.write), ("read", plan.read)):
            if rows is not None and rows.dim() == 2 and rows.shape[0] != batch:
                raise LimitError("IndexedLayer", f"plan.{name}", rows.shape[0], f"one line for each of {batch} items")
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._reserve(stop)
        assert self._store is not None
        rows = plan.write if plan.write is not None else torch.arange(self.length, stop, device=key_states.device)
        self._store = (_write(self._store[0], rows, key_states), _write(self._store[1], rows, value_states))
        self._show(max(self.length, stop))
        assert self.keys is not None
        assert self.values is not None
        if plan.read is None:
            return self.keys, self.values
        return _read(self.keys, plan.read), _read(self.values, plan.read)

    def _reserve(self, rows: int) -> None:
        assert self._store is not None
        have = self._store[0].shape[2]
        if rows <= have:
            return
        if self.capacity is not None:
            raise LimitError("IndexedLayer", "rows", rows, f"at most the capacity {self.capacity}", "Raise it.")
        # Doubling keeps the cost of a long generation linear.
        more = max(rows, 2 * have) - have
        self._store = (
            torch.cat([self._store[0], _empty(self._store[0], more)], dim=2),
            torch.cat([self._store[1], _empty(self._store[1], more)], dim=2),
        )

    def _show(self, length: int) -> None:
        self.length = length
        if self._store is not None:
            self.keys, self.values = self._store[0][:, :, :length], self._store[1][:, :, :length]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of rows that attention will read, and the first of them (0)."""
        if self.plan.read is not None:
            return self.plan.read.shape[-1], 0
        stop = self.length + query_length if self.plan.write is None else self.plan.stop
        return max(self.length, stop), 0

    def get_seq_length(self) -> int:
        """One past the last row in use."""
        return self.length

    def get_max_length(self) -> int:
        """The capacity, -1 when the buffer grows."""
        return self.capacity if self.capacity is not None else -1

    get_max_cache_shape = get_max_length

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` rows.

        Raises:
            LimitError: a positive number.
        """
        if tokens_to_remove > 0:
            raise LimitError("IndexedLayer.crop", "tokens_to_remove", tokens_to_remove, "at most 0")
        self._show(max(self.length + tokens_to_remove, 0))

    def reset(self) -> None:
        """Forget all rows; the plan stays."""
        self._store, self.keys, self.values, self.length, self.is_initialized = None, None, None, 0, False

    def reorder_cache(self, beam_idx: Any) -> None:
        """Take the batch rows ``beam_idx`` (B,)."""
        self._each(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each batch row ``repeats`` times."""
        self._each(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the batch rows ``indices``."""
        self._each(lambda x: x[indices, ...])

    def offload(self) -> None:
        """Move the rows to the CPU."""
        self._each(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move the rows back to the layer's device."""
        self._each(lambda x: x.to(self.device, non_blocking=True))

    def _each(self, change: Any) -> None:
        if self._store is not None:
            self._store = (change(self._store[0]), change(self._store[1]))
            self._show(self.length)


class IndexedCache(Cache):
    """A cache of `IndexedLayer` for a whole model; all layers follow one plan.

    Sliding layers keep all rows too: the mask restricts what they see.
    """

    layers: list[IndexedLayer]  # type: ignore[assignment]

    def __init__(self, layers: int | PreTrainedModel, *, capacity: int | None = None) -> None:
        """Make it for a number of layers, or for a model.

        Raises:
            LimitError: no layer, or a capacity below 1.
        """
        count = layers if isinstance(layers, int) else attention_shape(layers).layers
        if count < 1:
            raise LimitError("IndexedCache", "layers", count, "at least 1")
        self._plan = Plan()
        self.capacity = capacity
        # (B, S): rows that hold a token. Rows between written ones exist and hold nothing.
        self._written: Tensor | None = None
        super().__init__(layers=[IndexedLayer(capacity, self._plan) for _ in range(count)])

    def plan(self, write: Tensor | None = None, read: Tensor | None = None) -> None:
        """Say which rows the next forwards write and read; it holds until the next call.

        Args:
            write: (Q,) or (B, Q) int64, the rows of the Q tokens that are fed; ``None`` appends.
            read: (R,) or (B, R) int64, the rows that attention sees, in that order; rows that are being written
                count as present. ``None`` reads everything up to the last row in use.

        Raises:
            LimitError: another rank, negative or repeated rows, beyond the capacity, or rows to read that nobody has
                written.
        """
        length = self.get_seq_length()
        stop = length
        for name, rows in (("write", write), ("read", read)):
            if rows is None:
                continue
            if rows.dim() not in (1, 2) or rows.shape[-1] < 1:
                raise LimitError("IndexedCache.plan", name, tuple(rows.shape), "(R,) or (B, R) with R at least 1")
            if int(rows.min()) < 0:
                raise LimitError("IndexedCache.plan", name, int(rows.min()), "at least 0")
        if write is not None:
            stop = int(write.max()) + 1
            if self.capacity is not None and stop > self.capacity:
                raise LimitError("IndexedCache.plan", "write", stop - 1, f"below the capacity {self.capacity}")
            if bool((write.sort(-1).values.diff(dim=-1) == 0).any()):
                raise LimitError("IndexedCache.plan", "write", "with a row twice", "free of repeats")
        if read is not None:
            self._check_read(write, read, max(stop, length))
        self._plan.write, self._plan.read, self._plan.stop = write, read, stop

    def _check_read(self, write: Tensor | None, read: Tensor, end: int) -> None:
        if int(read.max()) >= end:
            mend = "Rows that are appended cannot be chosen: plan them as written." if write is None else ""
            raise LimitError("IndexedCache.plan", "read", int(read.max()), f"in [0, {end - 1}]", mend)
        written = _mark(self._written, write, end, read.device)
        lines = read if read.dim() == 2 else read[None]
        if written.shape[0] != lines.shape[0]:
            lines = lines.expand(max(written.shape[0], lines.shape[0]), -1)
            written = written.expand(lines.shape[0], -1)
        held = written.gather(1, lines)
        if not bool(held.all()):
            raise LimitError("IndexedCache.plan", "read", int(lines[~held][0]), "among the rows that were written")

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """See `IndexedLayer.update`."""
        if layer_idx == 0:
            old, plan = self.layers[0].length, self._plan
            stop = old + key_states.shape[-2] if plan.write is None else plan.stop
            write = torch.arange(old, stop, device=key_states.device) if plan.write is None else plan.write
            written = _mark(self._written, write, max(old, stop), key_states.device)
            out = super().update(key_states, value_states, layer_idx, *args, **kwargs)
            self._written = written
            return out
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def mask(self, queries: int, *, causal: bool, padding: Tensor | None = None, window: int | None = None) -> Tensor:
        """The mask of a forward under the current plan, for ``model(..., attention_mask=mask)``.

        Args:
            queries: number of tokens that will be fed.
            causal: a query sees rows up to its own only.
            padding: (B, S) over all rows, nonzero where there is a token; a row beyond S is a token.
            window: a query sees rows less than ``window`` away, for sliding layers.

        Returns:
            (B or 1, 1, Q, R) bool, True where visible; rows that nobody wrote are hidden.
        """
        length, plan = self.get_seq_length(), self._plan
        stop = length + queries if plan.write is None else plan.stop
        device = self._written.device if self._written is not None else None
        end = max(length, stop)
        write = plan.write if plan.write is not None else torch.arange(length, stop, device=device)
        read = plan.read if plan.read is not None else torch.arange(end, device=write.device)
        held = _mark(self._written, write, end, write.device)
        if padding is not None:
            real = torch.nn.functional.pad(
                padding.to(write.device).bool(), (0, max(end - padding.shape[1], 0)), value=True
            )
            held = held & real[:, :end]
        q, k = (rows if rows.dim() == 2 else rows[None] for rows in (write, read))
        batch = max(q.shape[0], k.shape[0], held.shape[0])
        seen = held.expand(batch, -1).gather(1, k.expand(batch, -1))[:, None, :]  # (B, 1, R)
        gap = q[:, :, None] - k[:, None, :]  # (B or 1, Q, R)
        if causal:
            seen = seen & (gap >= 0)
        if window is not None:
            seen = seen & (gap.abs() < window)
        return seen.expand(batch, queries, -1)[:, None]

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` rows."""
        super().crop(tokens_to_remove)
        if self._written is not None:
            self._written = self._written[:, : self.get_seq_length()]

    def reset(self) -> None:
        """Forget all rows and the plan."""
        super().reset()
        self._written = None
        self.plan()

    def reorder_cache(self, beam_idx: Any) -> None:
        """Take the batch rows ``beam_idx`` (B,), of the plan as well."""
        super().reorder_cache(beam_idx)
        self._each(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each batch row ``repeats`` times, of the plan as well."""
        super().batch_repeat_interleave(repeats)
        self._each(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the batch rows ``indices``, of the plan as well."""
        super().batch_select_indices(indices)
        self._each(lambda x: x[indices, ...])

    def _each(self, change: Any) -> None:
        plan = self._plan
        if plan.write is not None and plan.write.dim() == 2:
            plan.write = change(plan.write)
        if plan.read is not None and plan.read.dim() == 2:
            plan.read = change(plan.read)
        if self._written is not None and self._written.shape[0] > 1:
            self._written = change(self._written)


def _mark(written: Tensor | None, write: Tensor | None, end: int, device: torch.device) -> Tensor:
    """(B or 1, end) bool: the rows that hold a token once ``write`` is done."""
    old = torch.zeros(1, 0, dtype=torch.bool, device=device) if written is None else written
    marked = torch.nn.functional.pad(old, (0, max(end - old.shape[1], 0)))
    if write is None:
        return marked
    if write.dim() == 1:
        return marked.index_fill(1, write, True)
    return marked.expand(max(marked.shape[0], write.shape[0]), -1).scatter(1, write, True)


def _empty(like: Tensor, rows: int) -> Tensor:
    return like.new_zeros((*like.shape[:2], rows, like.shape[3]))


def _wide(rows: Tensor, like: Tensor) -> Tensor:
    """(B, R) as an index of (B, G, R, D)."""
    return rows[:, None, :, None].expand(-1, like.shape[1], -1, like.shape[3])


def _write(store: Tensor, rows: Tensor, states: Tensor) -> Tensor:
    # A graph may hold the old rows, so gradients need a copy.
    traced = torch.is_grad_enabled() and (states.requires_grad or store.requires_grad)
    if rows.dim() == 1:
        return store.index_copy(2, rows, states) if traced else store.index_copy_(2, rows, states)
    index = _wide(rows, states)
    return store.scatter(2, index, states) if traced else store.scatter_(2, index, states)


def _read(rows: Tensor, index: Tensor) -> Tensor:
    return rows.index_select(2, index) if index.dim() == 1 else rows.gather(2, _wide(index, rows))
