"""VFlowOpt's importance map: attention of the tower's global patches, and the entropy of pixels."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenmill.errors import LimitError
from tokenmill.prune._greedy import check_finite


def patch_entropy(pixels: Tensor, patch: int) -> Tensor:
    """Entropy in bits of each patch's grey levels.

    Args:
        pixels: (B, 3, H, W) in 0..255, H and W multiples of ``patch``.
        patch: side of a patch.

    Returns:
        (B, P) float32 in [0, 8], row by row.

    Raises:
        LimitError: another shape, or NaN.
    """
    if pixels.dim() != 4 or pixels.shape[1] != 3 or pixels.shape[2] % patch or pixels.shape[3] % patch:
        raise LimitError("patch_entropy", "pixels", tuple(pixels.shape), f"(B, 3, H, W) in patches of {patch}")
    check_finite("patch_entropy", "pixels", pixels.float())
    grey = pixels.float().mean(1).round().clamp(0, 255).long()  # (B, H, W)
    tiles = grey.unfold(1, patch, patch).unfold(2, patch, patch).flatten(3).flatten(1, 2)  # (B, P, patch^2)
    counts = torch.zeros(*tiles.shape[:2], 256, device=pixels.device)
    counts.scatter_add_(2, tiles, torch.ones_like(tiles, dtype=counts.dtype))
    p = counts / tiles.shape[2]
    return (-torch.special.xlogy(p, p).sum(-1) / math.log(2)).clamp_min(0)


def importance(attn: Tensor, entropy: Tensor | None, t: float, alpha: float) -> Tensor:
    """Importance of each patch: what the global patches attend to, plus the share of pixel entropy.

    A patch is global when it receives more than ``t`` times the mean attention. Sums to 1 + alpha.

    Args:
        attn: (B, heads, P, P) or (B, P, P) after the softmax, without a class token.
        entropy: (B, P) in bits; ``None`` counts as equal everywhere.
        t: threshold, at least 0; 0 makes every patch global.
        alpha: weight of the entropy, in [-1, 1].

    Returns:
        (B, P) float32.

    Raises:
        LimitError: bad t or alpha, shapes that differ, NaN.
    """
    if not t >= 0:
        raise LimitError("importance", "t", t, "at least 0")
    if not -1 <= alpha <= 1:
        raise LimitError("importance", "alpha", alpha, "in [-1, 1]")
    mean = attn.float().mean(1) if attn.dim() == 4 else attn.float()
    check_finite("importance", "attn", mean)
    received = mean.mean(1)  # (B, P)
    votes = received > t * received.mean(1, keepdim=True)
    lonely = ~votes.any(1)
    if bool(lonely.any()):  # nobody is global: the most attended patch votes alone
        best = F.one_hot(received.argmax(1), received.shape[1]).bool()
        votes = torch.where(lonely[:, None], best, votes)
    weight = votes.float() / votes.sum(1, keepdim=True)
    c = (weight[:, None] @ mean)[:, 0]
    if alpha == 0:
        return c
    if entropy is None:
        return c + alpha / c.shape[1]
    if entropy.shape != c.shape:
        raise LimitError("importance", "entropy", tuple(entropy.shape), f"{tuple(c.shape)}, one value a patch")
    return c + alpha * entropy.float().softmax(-1)
