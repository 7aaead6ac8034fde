"""How many tokens a pass reveals when the number of passes is given."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenmill.errors import LimitError

END = 1e-3  # where the linear time grid ends


def quotas(masks: int, steps: int) -> list[int]:
    """``masks`` tokens over ``steps`` passes: they differ by at most one, the larger ones first.

    >>> quotas(10, 4)
    [3, 3, 2, 2]
    """
    if steps < 1:
        raise LimitError("quotas", "steps", steps, "at least 1")
    if masks < 0:
        raise LimitError("quotas", "masks", masks, "at least 0")
    return [masks // steps + (i < masks % steps) for i in range(steps)]


def even_quota(masks: Tensor, steps: Tensor, done: Tensor) -> Tensor:
    """The entry ``done`` (B,) of `quotas` for ``masks`` (B,) over ``steps`` (B,) passes; 1 behind its end."""
    entry = masks // steps + (done < masks % steps)
    return torch.where(done < steps, entry, 1).clamp(min=1)


def linear_quota(masks: Tensor, steps: int, done: Tensor) -> Tensor:
    """Tokens that the time grid linspace(1, 0.001, steps + 1) reveals of ``masks`` (B,) in its pass ``done`` (B,).

    It may be 0; the last pass reveals everything.
    """
    grid = torch.linspace(1, END, steps + 1, dtype=torch.float64, device=masks.device)
    at = done.clamp(max=steps - 1)
    share = 1 - grid[at + 1] / grid[at]
    return torch.where(done >= steps - 1, masks, (masks * share).long())
