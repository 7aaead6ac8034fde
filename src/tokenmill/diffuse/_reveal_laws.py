"""Laws over sets of places: Bernoulli, and Plackett-Luce with a stop; draws and likelihoods."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-6  # probabilities are kept this far from 0 and 1 before their logarithm
_HUGE = 1e4  # utilities beyond this are as good as infinite


def bernoulli_choice(u: Tensor, eligible: Tensor, uniform: Tensor) -> Tensor:
    """Each eligible place on its own, with probability sigmoid(u); (..., L) bool.

    Args:
        u: (..., L), utilities: logits over temperature.
        eligible: (..., L) bool.
        uniform: (..., L) in [0, 1), the noise.
    """
    return (uniform < u.double().sigmoid()) & eligible


def with_best(chosen: Tensor, u: Tensor, eligible: Tensor, tie: Tensor) -> Tensor:
    """The choice (..., L) bool, or the eligible place of the highest utility where nothing was chosen.

    Args:
        chosen: (..., L) bool.
        u: (..., L), utilities.
        eligible: (..., L) bool.
        tie: (..., L), decides between equal utilities; between equal ones of it the first place wins.
    """
    highest = u.masked_fill(~eligible, -torch.inf).amax(-1, keepdim=True)
    best = eligible & (u == highest)
    at = tie.masked_fill(~best, -torch.inf).argmax(-1, keepdim=True)
    forced = torch.zeros_like(chosen).scatter(-1, at, True) & eligible
    return torch.where(chosen.any(-1, keepdim=True), chosen, forced)


def bernoulli_log_likelihood(u: Tensor, chosen: Tensor, eligible: Tensor) -> Tensor:
    """Log-probability (...,) float32 of a choice among the eligible places; 0 where there are none."""
    p = u.float().sigmoid().clamp(EPS, 1 - EPS)
    each = torch.where(chosen, p, 1 - p).log()
    return (each * eligible).sum(-1)


def dpls_choice(u: Tensor, eligible: Tensor, uniform: Tensor, *, stop: float = 0.0) -> Tensor:
    """Dynamic Plackett-Luce: one place, then more without replacement until a stop is drawn.

    Args:
        u: (..., L), utilities.
        eligible: (..., L) bool.
        uniform: (..., 2 L + 1) in [0, 1), the noise of the first draw, of the others, and of the stop.
        stop: utility of the stop; plus infinity reveals one place, minus infinity all.

    Returns:
        (..., L) int64: 0 for the place drawn first, 1, 2 and so on; -1 for those not drawn.
    """
    length = u.shape[-1]
    noise = -(-uniform.double().clamp(1e-300, 1 - 1e-16).log()).log()
    wide = u.double().clamp(-_HUGE, _HUGE)
    first = (wide + noise[..., :length]).masked_fill(~eligible, -torch.inf).argmax(-1, keepdim=True)
    is_first = torch.zeros_like(eligible).scatter(-1, first, True) & eligible
    second = (wide + noise[..., length : 2 * length]).masked_fill(~eligible | is_first, -torch.inf)
    drawn = (second > stop + noise[..., 2 * length :]) & eligible & ~is_first
    key = second.masked_fill(~drawn, -torch.inf).masked_fill(is_first, torch.inf)
    rank = key.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    return torch.where(drawn | is_first, rank, -1)


def dpls_log_likelihood(u: Tensor, rank: Tensor, eligible: Tensor, *, stop: float = 0.0) -> Tensor:
    """Log-probability (...,) float32 of an ordered choice; 0 where nothing is eligible.

    Args:
        u: (..., L), utilities.
        rank: (..., L) int64 as `dpls_choice` gives it.
        eligible: (..., L) bool.
        stop: utility of the stop.
    """
    u = u.float().clamp(-_HUGE, _HUGE)
    stop = min(max(stop, -_HUGE), _HUGE)
    low = -2 * _HUGE  # stands for minus infinity, whose gradient would be NaN
    drawn = rank >= 0
    length = u.shape[-1]
    order = torch.where(drawn, rank, length).argsort(dim=-1, stable=True)  # those drawn first, in their order
    ordered, valid = u.gather(-1, order), drawn.gather(-1, order)
    first = ordered[..., 0] - u.masked_fill(~eligible, low).logsumexp(-1)
    never = u.masked_fill(~eligible | drawn, low)
    rest = F.pad(never, (0, 1), value=stop).logsumexp(-1, keepdim=True)  # the stop and what was never drawn
    still = ordered.masked_fill(~valid, low).flip(-1).logcumsumexp(-1).flip(-1)
    later = torch.where(valid, ordered - torch.logaddexp(still, rest), 0.0)[..., 1:].sum(-1)
    return torch.where(valid[..., 0], first + later + stop - rest[..., 0], 0.0)
