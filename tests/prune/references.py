"""Slow twins of the greedy walks: every step is recomputed from the pairs, with Python loops."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from tokenmill.prune._greedy import Similarity

INSTANCES = 400


def instances(count: int = INSTANCES) -> Iterator[tuple[Tensor, int, torch.Generator]]:
    """Features (N, D) float64 and a count: random ones, few distinct ones with many ties, and exact copies."""
    for seed in range(count):
        g = torch.Generator().manual_seed(seed)
        n, d = int(torch.randint(1, 24, (), generator=g)), int(torch.randint(1, 7, (), generator=g))
        x = torch.randn(n, d, generator=g, dtype=torch.float64)
        if seed % 4 == 1:
            x = torch.randint(-1, 2, (n, d), generator=g).double()  # ties, zero rows
        elif seed % 4 == 2:
            x = x[torch.randint(0, max(1, n // 3), (n,), generator=g)]  # copies
        yield x, int(torch.randint(1, n + 1, (), generator=g)), g


def cosines(x: Tensor) -> list[list[float]]:
    """All pairs, as the fast path computes them; the walk over them is what is checked.

    Row j holds the similarities to token j. A product of matrices need not be symmetric to the last bit.
    """
    return Similarity.of(x[None]).matrix()[0].tolist()


def greedy(n: int, k: int, first: int, value: Callable[[int, list[int]], float]) -> list[int]:
    """Add the token of largest ``value(i, chosen)``; the first index wins a tie."""
    chosen = [first]
    while len(chosen) < k:
        best, at = -float("inf"), -1
        for i in range(n):
            if i in chosen:
                continue
            here = value(i, chosen)
            if at < 0 or here > best:
                best, at = here, i
        chosen.append(at)
    return chosen
