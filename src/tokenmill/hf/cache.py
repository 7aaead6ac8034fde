"""Ordinary KV caches under a decoder that drafts: record, keep the accepted rows, give the rest back."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from tokenmill.errors import UnsupportedError


def check_cache(where: str, cache: Any, *, what: str = "drop drafted rows from") -> DynamicCache:
    """Return ``cache`` if its rows can be selected after a forward, refuse it otherwise.

    Args:
        where: who asks, for messages.
        cache: the cache.
        what: what would be done with it, for messages.

    Raises:
        UnsupportedError: no cache, a static, quantized, offloaded or linear-attention cache.
    """
    mend = "Call generate with use_cache=True and the default dynamic cache (cache_implementation=None)."
    if not isinstance(cache, Cache):
        raise UnsupportedError(where, f"needs a KV cache, but got {type(cache).__name__}", mend)
    odd = {type(x).__name__ for x in cache.layers if type(x) not in (DynamicLayer, DynamicSlidingWindowLayer)}
    odd -= {type(x).__name__ for x in cache.layers if hasattr(x, "select_rows")}
    if not isinstance(cache, DynamicCache) or odd or cache.offloading:
        named = ", ".join(sorted(odd)) or "offloading" if isinstance(cache, DynamicCache) else "its layers"
        raise UnsupportedError(where, f"cannot {what} {type(cache).__name__} ({named})", mend)
    return cache


def record_past(cache: DynamicCache) -> list[DynamicSlidingWindowLayer]:
    """Let sliding layers of one's own cache keep what a draft pushes out; return those that did not before."""
    changed = [x for x in cache.layers if isinstance(x, DynamicSlidingWindowLayer) and not x.record_past]
    for layer in changed:
        layer.activate_past_recording()
    return changed


@contextmanager
def recording(cache: DynamicCache) -> Generator[None, None, None]:
    """Let sliding layers keep what a draft pushes out, so that rejected rows can be taken back.

    Enter it after the prefill: before it, a long prompt would be kept whole in every sliding layer.
    """
    changed = record_past(cache)
    try:
        yield
    finally:
        for layer in changed:
            layer.record_past = False


def keep_rows(cache: DynamicCache, new: int, keep: Tensor) -> None:
    """Of the last ``new`` cached rows keep those at ``keep``, in that order, and drop the others.

    Keys are rotated with their own position when they are written, so moving rows is enough.

    Args:
        cache: checked by `check_cache`; sliding layers inside `recording`.
        new: rows that the last forward appended.
        keep: (A,) int64, strictly ascending, in [0, new).
    """
    kept = keep.shape[0]
    # A chain draft keeps its first rows: a crop, without moving anything.
    prefix = kept == 0 or int(keep[-1]) == kept - 1
    for layer in cast("list[DynamicLayer]", cache.layers):
        keys, values = layer.keys, layer.values
        if keys is None or values is None:  # layers that share the keys of another one
            continue
        if hasattr(layer, "select_rows"):
            _select_with_state(layer, new, keep)
            continue
        base = keys.shape[-2] - new
        if not prefix:
            # In place: the forward's concatenation made these tensors, nobody else holds them.
            for kept_rows in (keys, values):
                kept_rows[:, :, base : base + kept] = kept_rows.index_select(2, keep.to(keys.device) + base)
        if new > kept:
            layer.keys, layer.values = keys[:, :, : base + kept], values[:, :, : base + kept]
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.cumulative_length -= new - kept
            layer.crop(0)  # back to the window


def _select_with_state(layer: Any, new: int, keep: Tensor) -> None:
    base = layer.get_seq_length() - new
    head = torch.arange(base, device=keep.device)
    layer.select_rows(torch.cat([head, keep + base]))
