"""Paired timing: all methods on one item, one after another, in an order that turns with the item."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")
Name = TypeVar("Name")


def timed(work: Callable[[], T]) -> tuple[float, T]:
    """Milliseconds of the work, and its result."""
    start = time.perf_counter()
    value = work()
    return (time.perf_counter() - start) * 1e3, value


def turned(names: Sequence[Name], by: int) -> list[Name]:
    """The names, rotated: whoever came first comes last next time, so that no method always follows the same one."""
    if not names:
        return []
    by %= len(names)
    return [*names[by:], *names[:by]]


def percentiles(ms: Sequence[float]) -> dict[str, float]:
    """20th, 50th and 80th percentile, as ``ms_p20``, ``ms_p50``, ``ms_p80``."""
    return {f"ms_p{p}": float(np.percentile(ms, p)) for p in (20, 50, 80)}


def ratio_of_medians(
    ours: Sequence[float], plain: Sequence[float], *, seed: int, draws: int = 2000, share: float = 0.95
) -> list[float]:
    """``[ratio, low, high]``: median of ours over median of plain, with a bootstrap interval over the paired items."""
    a, b = np.asarray(ours, dtype=float), np.asarray(plain, dtype=float)
    pick = np.random.default_rng(seed).integers(0, len(a), size=(draws, len(a)))
    spread = np.median(a[pick], axis=1) / np.median(b[pick], axis=1)
    tail = (1 - share) / 2
    low, high = np.quantile(spread, [tail, 1 - tail])
    return [float(np.median(a) / np.median(b)), float(low), float(high)]


def means(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of every key over the rows that have it."""
    keys = dict.fromkeys(key for row in rows for key in row)
    return {key: float(np.mean([row[key] for row in rows if key in row])) for key in keys}
