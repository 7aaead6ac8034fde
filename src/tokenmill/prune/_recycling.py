"""Dropped tokens that are not lost: the lowest-scored ones of each cell of a picture become their mean."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenmill.errors import LimitError


@dataclass(frozen=True, slots=True)
class Recycled:
    """What is left of N tokens.

    Attributes:
        features: (k, d), kept or merged.
        scores: (k,) of the kept tokens, and of each cell's highest.
        keep: (k,) int64, ascending, where they stand.
        cells: (N,) int64, the cell that each dropped token went into, -1 for kept tokens.
    """

    features: Tensor
    scores: Tensor
    keep: Tensor
    cells: Tensor


def recycle_prune(
    feat: Tensor,
    score: Tensor,
    grid: tuple[int, int] | Tensor,
    keep_ratio: float,
    cell: float,
    *,
    exact: bool = False,
) -> Recycled:
    """Drop the lowest-scored tokens and average them into one token for each cell of the picture (step 4).

    Args:
        feat: (N, d).
        score: (N,).
        grid: (rows, columns), or (N, 3) int64 with view, row and column of each token.
        keep_ratio: share of tokens to keep, in (0, 1].
        cell: side of a cell in tokens, at least 1, any real number.
        exact: choose how many are low so that exactly round(keep_ratio N) tokens come out.

    Returns:
        What is left; without ``exact`` about keep_ratio N tokens.

    Raises:
        LimitError: bad ratio, cell or shapes.
    """
    n = len(feat)
    if not 0 < keep_ratio <= 1:
        raise LimitError("recycle_prune", "keep_ratio", keep_ratio, "in (0, 1]")
    if not cell >= 1:
        raise LimitError("recycle_prune", "cell", cell, "at least 1")
    if score.shape != (n,):
        raise LimitError("recycle_prune", "score", tuple(score.shape), f"({n},), one a token")
    if isinstance(grid, Tensor):
        place = grid
    elif grid[0] * grid[1] != n:
        raise LimitError("recycle_prune", "grid", grid, f"rows x columns = {n}")
    else:
        at = torch.arange(n, device=feat.device)
        place = torch.stack([torch.zeros_like(at), at // grid[1], at % grid[1]], 1)
    key = torch.stack([place[:, 0], (place[:, 1] / cell).floor().long(), (place[:, 2] / cell).floor().long()], 1)
    _, cells = key.unique(dim=0, return_inverse=True)
    order = score.sort(stable=True).indices  # lowest first, lower index first
    low = min(n, round(n * (1 - keep_ratio)) + int(n / cell**2))
    if keep_ratio == 1:
        low = 0
    elif exact:
        low = _exact_low(order, cells, max(1, round(keep_ratio * n)))
    dropped = order[:low]
    return _merged(feat, score, cells, dropped)


def _exact_low(order: Tensor, cells: Tensor, wanted: int) -> int:
    """How many tokens are low when n - low + (cells that they touch) is ``wanted``.

    One more low token removes one and adds a cell or none, so the size never grows and every size is met.
    """
    n, names = len(order), cells[order]
    if wanted >= n:
        return 0
    at = torch.arange(n, device=order.device)
    count = int(cells.max()) + 1
    first = torch.full((count,), n, device=order.device).scatter_reduce(0, names, at, "amin")
    fresh = torch.zeros(n + 1, dtype=torch.long, device=order.device).scatter(0, first, 1)[:n]
    sizes = n - 1 - at + fresh.cumsum(0)
    found = (sizes <= wanted).nonzero()
    if not len(found):
        raise LimitError("recycle_prune", "keep_ratio", wanted / n, f"above {count / n:g}, one token a cell")
    return int(found[0]) + 1


def _merged(feat: Tensor, score: Tensor, cells: Tensor, dropped: Tensor) -> Recycled:
    """Average the dropped tokens of each cell into its highest-scored one."""
    n = len(feat)
    keep = torch.ones(n, dtype=torch.bool, device=feat.device)
    where = torch.full((n,), -1, dtype=torch.long, device=feat.device)
    if not len(dropped):
        return Recycled(feat, score, keep.nonzero()[:, 0], where)
    keep[dropped] = False
    where[dropped] = cells[dropped]
    names, member = cells[dropped].unique(return_inverse=True)
    mine, count = score[dropped].float(), len(names)
    low = mine.new_full((count,), torch.inf).scatter_reduce(0, member, mine, "amin")
    # Weights must not be negative or all zero: shift a cell that has such a score.
    weight = torch.where((low <= 0)[member], mine - low[member] + 1e-6, mine)
    total = mine.new_zeros(count).scatter_add(0, member, weight)
    best = mine.new_full((count,), -torch.inf).scatter_reduce(0, member, mine, "amax")
    # A cell's highest token (the first of equals) lends its place and its score.
    top = mine == best[member]
    first = torch.full((count,), n, dtype=torch.long, device=feat.device)
    first = first.scatter_reduce(0, member[top], dropped[top], "amin")
    keep[first] = True
    at = keep.nonzero()[:, 0]
    out = feat[at]
    # One small matrix of weights (cells, N) times the features, so that no copy of the features is held. A cell of
    # one token stays bit for bit what it is.
    several = torch.bincount(member, minlength=count) > 1
    mix = feat.new_zeros(count, n, dtype=mine.dtype)
    mix[member, dropped] = weight / total[member]
    mix = mix[several]
    wide = feat if feat.dtype in (torch.float32, torch.float64) else feat.float()
    place = torch.searchsorted(at, first[several])
    out[place] = (mix.to(wide.dtype) @ wide).to(feat.dtype)
    return Recycled(out, score[at], at, where)
