"""Ordinary KV caches under a decoder that drafts: record, keep the accepted rows, give the rest back."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from tokenmill.errors import UnsupportedError


def check_cache(where: str, cache: Any) -> DynamicCache:
    """Return ``cache`` if its rows can be selected after a forward, refuse it otherwise.

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
        raise UnsupportedError(where, f"cannot drop drafted rows from {type(cache).__name__} ({named})", mend)
    return cache


@contextmanager
def recording(cache: DynamicCache) -> Generator[None, None, None]:
    """Let sliding layers keep what a draft pushes out, so that rejected rows can be taken back.

    Enter it after the prefill: before it, a long prompt would be kept whole in every sliding layer.
    """
    changed = [layer for layer in cache.layers if isinstance(layer, DynamicSlidingWindowLayer) and not layer.record_past]
    for layer in changed:
        layer.activate_past_recording()
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
    for layer in cache.layers:
        if not layer.is_initialized:  # layers that share the keys of another one
            continue
        if hasattr(layer, "select_rows"):
            _select_with_state(layer, new, keep)
            continue
        layer = cast("DynamicLayer", layer)
        total = layer.keys.shape[-2]
        if not prefix:
            _move(layer, total - new, keep)
        if new > kept:
            layer.keys = layer.keys[:, :, : total - new + kept]
            layer.values = layer.values[:, :, : total - new + kept]
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.cumulative_length -= new - kept
            layer.crop(0)  # back to the window


def _move(layer: DynamicLayer, base: int, keep: Tensor) -> None:
    # In place: the forward's concatenation made these tensors, nobody else holds them.
    rows = keep.to(layer.keys.device) + base
    layer.keys[:, :, base : base + keep.shape[0]] = layer.keys.index_select(2, rows)
    layer.values[:, :, base : base + keep.shape[0]] = layer.values.index_select(2, rows)


def _select_with_state(layer: Any, new: int, keep: Tensor) -> None:
    base = layer.get_seq_length() - new
    head = torch.arange(base, device=keep.device)
    layer.select_rows(torch.cat([head, keep + base]))
