"""Chance: one generator a row, and tokens drawn with Gumbel noise in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def generators(seed: int, rows: int, device: torch.device) -> list[torch.Generator]:
    """One generator a row: row b of a call under seed s draws as the row alone does under seed s + b."""
    return [torch.Generator(device).manual_seed((seed + row) % 2**63) for row in range(rows)]


def by_row(draw: Callable[[int, torch.Generator], Tensor], counts: Tensor, each: Sequence[torch.Generator]) -> Tensor:
    """Draws for ``counts`` (B,) items of each row, (sum of counts, ...); what a row gets depends on its count alone."""
    return torch.cat([draw(n, g) for n, g in zip(counts.tolist(), each, strict=True)])


def uniform(where: Tensor, each: Sequence[torch.Generator]) -> Tensor:
    """(B, S) float64: uniform numbers at the true places of ``where`` (B, S), 0 elsewhere."""
    drawn = by_row(
        lambda n, g: torch.rand(n, generator=g, dtype=torch.float64, device=where.device), where.sum(1), each
    )
    return where.double().masked_scatter(where, drawn)


def sample(
    logits: Tensor,
    where: Tensor,
    each: Sequence[torch.Generator],
    *,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Tensor:
    """Tokens of law softmax(logits / T), cut to the top k and the nucleus p: the argmax of logits / T + Gumbel noise.

    Args:
        logits: (B, Q, V).
        where: (B, Q) bool, which rows of logits a token is drawn for.
        each: one generator a row.
        temperature: T, above 0.
        top_k: 0 for all.
        top_p: 1 for all.

    Returns:
        (N,) int64, for the N true entries of ``where`` in order.
    """
    scores = kept(logits[where].double() / temperature, top_k=top_k, top_p=top_p)  # (N, V)
    v = logits.shape[-1]
    u = by_row(
        lambda n, g: torch.rand(n, v, generator=g, dtype=torch.float64, device=logits.device), where.sum(1), each
    )
    return (scores - (-u.clamp(min=1e-300).log()).log()).argmax(-1)


def kept(scores: Tensor, *, top_k: int, top_p: float) -> Tensor:
    """Scores (N, V) with minus infinity outside the ``top_k`` best and outside the nucleus of mass ``top_p``."""
    if top_k:
        least = scores.topk(min(top_k, scores.shape[-1]), -1).values[:, -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
    if top_p < 1:
        ordered, index = scores.sort(dim=-1, descending=True, stable=True)
        p = ordered.softmax(-1)
        out = p.cumsum(-1) - p >= top_p  # the mass in front of a token is enough already
        scores = scores.masked_fill(torch.zeros_like(out).scatter(-1, index, out), -torch.inf)
    return scores
