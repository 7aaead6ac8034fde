"""Cache layers that carry extra tensors with one row per cached token.

A method that needs more than keys and values (reduced keys, pooled keys, scores) keeps it here, so that it follows
whatever happens to the cache: crop, beam reorder, batch repeat and select, reset, offloading, the drop of old rows in
sliding layers, and `select_rows`. What is not one row a token (a selection, pages) is a `Follower`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from tokenmill.errors import LimitError, UnsupportedError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Follower(Protocol):
    """Something of a cache layer with a batch axis but without one row a token."""

    def each(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply a change of the batch axis (the first one) or of the device to every tensor."""

    def crop(self, length: int) -> None:
        """The layer keeps its first ``length`` tokens as they were; what was derived from others must go."""


Followed = TypeVar("Followed", bound=Follower)


@dataclass(slots=True)
class _Column:
    """One named tensor; its last row belongs to token ``end - 1`` of the sequence."""

    value: Tensor
    dim: int
    end: int
    store: Tensor | None = None  # room to grow: `value` is its first rows

    @property
    def start(self) -> int:
        return self.end - self.value.shape[self.dim]

    def extend(self, more: Tensor) -> None:
        """Append rows. Copying the whole at every token would cost as much as attention reads."""
        dim, rows, new = self.dim, self.value.shape[self.dim], more.shape[self.dim]
        if not new:
            return
        if torch.is_grad_enabled() and (more.requires_grad or self.value.requires_grad):
            self.value, self.store = torch.cat([self.value, more], dim=dim), None
        else:
            if self.store is None or self.store.shape[dim] < rows + new or not _writable(self.store):
                shape = [*self.value.shape]
                shape[dim] = rows + new + (rows + new) // 4
                self.store = self.value.new_empty(shape)
                self.store.narrow(dim, 0, rows).copy_(self.value)
            self.store.narrow(dim, rows, new).copy_(more)
            self.value = self.store.narrow(dim, 0, rows + new)
        self.end += new


class _TokenState:
    """What both layers add to their class of transformers. Rows of the sequence are numbered from its first token."""

    keys: Any
    values: Any
    is_initialized: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._columns: dict[str, _Column] = {}
        self._followers: dict[str, Follower] = {}
        self._visible = 0  # rows of the keys that the last update returned

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Cache new keys and values (B, G, Q, D); returns what attention reads, see transformers."""
        self._trim()  # now, and not before: until here somebody may still read the last forward's state
        keys, values = super().update(key_states, value_states, *args, **kwargs)  # type: ignore[misc]
        self._visible = keys.shape[-2]
        return keys, values

    def missing(self, name: str) -> int:
        """How many of the last rows that attention sees have no state ``name`` yet.

        Ask after the update, compute the state of that many last keys, and hand it to `append_state`.
        """
        column = self._columns.get(name)
        first = self._length() - self._visible
        if column is None or column.start > first:
            return self._visible
        return self._length() - max(column.end, first)

    def append_state(self, name: str, value: Tensor, *, dim: int = 2) -> Tensor:
        """Store the state of the rows that miss it.

        Args:
            name: what it is.
            value: (B, H, missing, D) with ``dim=2``, (B, missing, ...) with ``dim=1``; B leads in any case.
            dim: the axis of tokens.

        Returns:
            The state of all rows that attention sees now, in the order of the keys that the update returned.

        Raises:
            LimitError: another number of rows than `missing` says, or another batch size than the cache has.
        """
        where, missing = type(self).__name__, self.missing(name)
        if not 1 <= dim < value.dim():
            raise LimitError(where, "dim", dim, f"in [1, {value.dim() - 1}]", "The first axis is the batch.")
        if value.shape[dim] != missing:
            raise LimitError(where, f"{name}.shape[{dim}]", value.shape[dim], f"{missing}, the rows without state")
        if self.is_initialized and value.shape[0] != self.keys.shape[0]:
            raise LimitError(where, f"{name}.shape[0]", value.shape[0], f"the cache's batch size {self.keys.shape[0]}")
        column = self._columns.get(name)
        if column is not None and missing < self._visible:
            column.extend(value)
            value = column.value
        else:
            self._columns[name] = _Column(value, dim, self._length())
        return value.narrow(dim, value.shape[dim] - self._visible, self._visible)

    def state(self, name: str) -> Tensor:
        """The state of the rows that the cache keeps, aligned with ``keys``.

        Raises:
            LimitError: a name that was never appended, or rows without state.
        """
        column = self._columns.get(name)
        start = self._length() - self._rows()
        if column is None or column.end != self._length() or column.start > start:
            lacking = self._rows() if column is None else self._length() - column.end + max(column.start - start, 0)
            raise LimitError(type(self).__name__, "name", name, f"a state of all rows, and {lacking} rows have none")
        return column.value.narrow(column.dim, start - column.start, self._rows())

    def follower(self, name: str, make: Callable[[], Followed]) -> Followed:
        """The follower of that name, made when it is not there yet; `reset` forgets it."""
        if name not in self._followers:
            self._followers[name] = make()
        return self._followers[name]  # type: ignore[return-value]

    def select_rows(self, index: Tensor) -> None:
        """Keep the given rows of the sequence, keys, values and state, and forget the others.

        Args:
            index: (R,) or (B, R) int64, ascending, in [0, sequence length). Rows that a sliding layer has dropped may
                be named and stay dropped; the sequence length becomes R. State that lacks rows is forgotten as a
                whole, so that `missing` asks for it again.

        Raises:
            LimitError: another rank, a row out of range, or batch rows that would keep different numbers of rows.
            UnsupportedError: a sliding layer has dropped rows that its window would need now.
        """
        if not self.is_initialized:
            return
        self._trim()
        where, length, rows = type(self).__name__, self._length(), self._rows()
        if index.dim() not in (1, 2):
            raise LimitError(where, "index.dim()", index.dim(), "1 or 2")
        if index.numel() and (int(index.min()) < 0 or int(index.max()) >= length):
            raise LimitError(where, "index", (int(index.min()), int(index.max())), f"in [0, {length - 1}]")
        kept = index.shape[-1]
        index = index.to(self.keys.device)
        moved = (index != torch.arange(kept, device=index.device)).reshape(-1, kept).any(0)
        untouched = int(moved.long().argmax()) if bool(moved.any()) else kept
        index = index - (length - rows)
        if index.dim() == 1:
            index = index[index >= 0]
        else:
            counts = (index >= 0).sum(-1)
            if bool((counts != counts[0]).any()):
                raise LimitError(where, "index", counts.tolist(), "rows with equal numbers of kept rows")
            index = index[index >= 0].view(index.shape[0], -1)
        self._check_select(kept, index.shape[-1])
        complete = {n: c for n, c in self._columns.items() if c.end == length and c.start == length - rows}
        self.keys, self.values = _take(self.keys, index, 2), _take(self.values, index, 2)
        self._columns = {n: _Column(_take(c.value, index, c.dim), c.dim, kept) for n, c in complete.items()}
        self._after_select(kept)
        self._visible = self._rows()
        self._trim()
        if untouched < length:
            self._crop_followers(untouched)

    def _check_select(self, kept: int, left: int) -> None:
        """Refuse a selection of ``kept`` rows of which only ``left`` are still there."""

    def _after_select(self, kept: int) -> None:
        """Bring the counters of the class of transformers in line."""

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` rows."""
        if not self.is_initialized:
            return
        super().crop(tokens_to_remove)  # type: ignore[misc]
        self._visible = self._rows()
        self._trim()
        if tokens_to_remove:
            self._crop_followers(self._length())

    def reset(self) -> None:
        """Forget everything."""
        super().reset()  # type: ignore[misc]
        self._columns.clear()
        self._followers.clear()
        self._visible = 0

    def reorder_cache(self, beam_idx: Any) -> None:
        """Take the batch rows ``beam_idx`` (B,)."""
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._each(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each batch row ``repeats`` times."""
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self._each(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the batch rows ``indices``."""
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._each(lambda x: x[indices, ...])

    def offload(self) -> None:
        """Move everything to the CPU."""
        super().offload()  # type: ignore[misc]
        self._each(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move everything back to the layer's device."""
        super().prefetch()  # type: ignore[misc]
        self._each(lambda x: x.to(self.keys.device, non_blocking=True))

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        for column in self._columns.values():
            column.value, column.store = change(column.value), None
        for follower in self._followers.values():
            follower.each(change)

    def _crop_followers(self, length: int) -> None:
        for follower in self._followers.values():
            follower.crop(length)

    def _length(self) -> int:
        return self.get_seq_length()  # type: ignore[attr-defined]

    def _rows(self) -> int:
        return self.keys.shape[-2] if self.is_initialized and self.keys.numel() else 0

    def _trim(self) -> None:
        """Cut every column to the rows that the cache keeps."""
        end = self._length()
        start = end - self._rows()
        for name, column in list(self._columns.items()):
            low, high = max(column.start, start), min(column.end, end)
            if high <= low:
                del self._columns[name]
            elif (low, high) != (column.start, column.end):
                if low > column.start:
                    column.store = None
                column.value = column.value.narrow(column.dim, low - column.start, high - low)
                column.end = high


class StatefulLayer(_TokenState, DynamicLayer):
    """`DynamicLayer` with per-token state."""


class StatefulSlidingLayer(_TokenState, DynamicSlidingWindowLayer):
    """`DynamicSlidingWindowLayer` with per-token state; it keeps the state of the last ``window - 1`` tokens."""

    def _check_select(self, kept: int, left: int) -> None:
        if left < min(kept, self.sliding_window - 1):
            raise UnsupportedError(
                "StatefulSlidingLayer.select_rows",
                f"the window needs {min(kept, self.sliding_window - 1)} of the {kept} rows, and {left} are left",
                "Call cache.activate_past_recording() before the forward whose rows are dropped.",
            )

    def _after_select(self, kept: int) -> None:
        self.cumulative_length = kept
        if kept >= self.sliding_window:
            self.keys = self.keys[:, :, -self.sliding_window + 1 :, :]
            self.values = self.values[:, :, -self.sliding_window + 1 :, :]


def stateful_cache(model: PreTrainedModel) -> DynamicCache:
    """A `DynamicCache` for the model, with state on its full and sliding layers; pass it as ``past_key_values``."""
    cache = DynamicCache(config=model.config)
    for index, layer in enumerate(cache.layers):
        if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
            token_state(cache, index)
    return cache


def token_state(cache: Cache, layer_idx: int, *, visible: int | None = None) -> StatefulLayer | StatefulSlidingLayer:
    """The stateful layer at ``layer_idx``; an ordinary dynamic layer there is replaced by one with the same rows.

    This is how a method reaches its state when `generate` has made the cache itself.

    Args:
        cache: a dynamic cache.
        layer_idx: which layer.
        visible: rows of the keys that attention received in this forward; ``None`` between forwards.

    Raises:
        UnsupportedError: a static, quantized, linear-attention or other layer that cannot carry state.
    """
    layer: Any = cache.layers[layer_idx]
    if isinstance(layer, StatefulLayer | StatefulSlidingLayer):
        return layer
    if type(layer) is DynamicSlidingWindowLayer:
        made: Any = StatefulSlidingLayer(sliding_window=layer.sliding_window)
    elif type(layer) is DynamicLayer:
        made = StatefulLayer()
    else:
        raise UnsupportedError(
            "token_state",
            f"layer {layer_idx} of the cache is a {type(layer).__name__}",
            "Use the default dynamic cache (cache_implementation=None).",
        )
    vars(made).update(vars(layer))
    made._visible = made._rows() if visible is None else visible
    cache.layers[layer_idx] = made
    return made


def _writable(store: Tensor) -> bool:
    """What was made in inference mode may be written in it only."""
    return torch.is_inference_mode_enabled() or not store.is_inference()


def _take(value: Tensor, index: Tensor, dim: int) -> Tensor:
    """Rows ``index`` (R,) or (B, R) of ``value`` along its axis ``dim``."""
    if index.dim() == 1:
        return value.index_select(dim, index)
    shape = [1] * value.dim()
    shape[0], shape[dim] = index.shape
    wide = [*value.shape[:dim], index.shape[1], *value.shape[dim + 1 :]]
    return value.gather(dim, index.view(shape).expand(wide))
