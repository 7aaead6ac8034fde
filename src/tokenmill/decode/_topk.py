"""Top-k and argmax over a wide vocabulary, in two stages."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 128
SMALL = 64 * BLOCK  # up to here one stage is as good


def top_tokens(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest logits of each row, largest first; of equal ones the lower token id comes first.

    Stage one takes the maximum of each block of 128 tokens, stage two looks only into the k best blocks. The first
    column is ``logits.argmax(-1)``. A NaN in a row makes that row's first value NaN.

    Args:
        logits: (N, V), any float dtype up to float32 (float64 compares as float32 does).
        k: in [1, V].

    Returns:
        values (N, k) and tokens (N, k) int64.
    """
    n, v = logits.shape
    if v <= max(SMALL, k * BLOCK):
        tokens = _ranked(logits, torch.arange(v, device=logits.device)).topk(k, dim=1).indices
        return logits.gather(1, tokens), tokens
    whole = v // BLOCK
    blocks = logits[:, : whole * BLOCK].view(n, whole, BLOCK).amax(2)  # (N, W)
    if v % BLOCK:
        blocks = torch.cat([blocks, logits[:, whole * BLOCK :].amax(1, keepdim=True)], dim=1)
    number = torch.arange(blocks.shape[1], device=logits.device)
    best = _ranked(blocks, number).topk(k, dim=1, sorted=False).indices
    tokens = (best[:, :, None] * BLOCK + torch.arange(BLOCK, device=logits.device)).view(n, -1)  # (N, k * BLOCK)
    inside = tokens.clamp(max=v - 1)
    keys = _ranked(logits.gather(1, inside), tokens).masked_fill_(tokens >= v, torch.iinfo(torch.int64).min)
    tokens = inside.gather(1, keys.topk(k, dim=1).indices)
    return logits.gather(1, tokens), tokens


def _ranked(values: Tensor, index: Tensor) -> Tensor:
    """int64 keys that order by value, and equal values by the lower index; NaN comes first."""
    bits = (values.float() + 0.0).view(torch.int32)  # adding 0 makes -0 equal to 0
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # two's complement order for negative values too
    bits = bits.masked_fill(values.isnan(), torch.iinfo(torch.int32).max)
    return (bits.long() << 32) - index
