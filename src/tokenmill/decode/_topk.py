"""Top-k and argmax over a wide vocabulary, in two stages."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 128
SMALL = 64 * BLOCK


def top_tokens(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest logits of each row, largest first; of equal ones the lower token id comes first.

    Stage one takes the maximum of each block of 128 tokens, stage two looks only into the k best blocks. The first
    column is ``logits.argmax(-1)``. A NaN in a row makes that row's first value NaN.

    Args:
        logits: (N, V), any float dtype.
        k: in [1, V].

    Returns:
        values (N, k) and tokens (N, k) int64.
    """
    n, v = logits.shape
    if v <= max(SMALL, k * BLOCK):
        values, tokens = logits.sort(dim=1, descending=True, stable=True)
        return values[:, :k], tokens[:, :k]
    whole = v // BLOCK
    blocks = logits[:, : whole * BLOCK].view(n, whole, BLOCK).amax(2)  # (N, W)
    if v % BLOCK:
        blocks = torch.cat([blocks, logits[:, whole * BLOCK :].amax(1, keepdim=True)], dim=1)
    # Stable sorts keep the lower index among equal maxima; the best blocks are then read in ascending order.
    best = blocks.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values
    tokens = (best[:, :, None] * BLOCK + torch.arange(BLOCK, device=logits.device)).view(n, -1)  # (N, k * BLOCK)
    outside = tokens >= v
    values = logits.gather(1, tokens.clamp(max=v - 1)).masked_fill_(outside, -torch.inf)
    values, order = values.sort(dim=1, descending=True, stable=True)
    return values[:, :k], tokens.gather(1, order[:, :k])
