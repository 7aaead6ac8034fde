"""How likely a text is for a masked diffusion model: an upper bound of its negative log-likelihood."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from tokenmill.errors import LimitError, unknown_name

if TYPE_CHECKING:
    from tokenmill.diffuse._denoiser import Denoiser

WEIGHTINGS = ("count", "time")


def bound_term(nll: Tensor, masked: Tensor, answer: Tensor, t: Tensor | None = None) -> Tensor:
    """One corruption's share of the bound, in nats per token of the answer.

    Args:
        nll: (B, S) negative log-probability of the true token at each place.
        masked: (B, S) bool, the places that were masked.
        answer: (B, S) bool, the places that could be.
        t: (B,) the masking rate; ``None`` when the number of masks was drawn from 1 to the answer's length.

    Returns:
        (B,). Its mean over corruptions is the bound; it equals the mean over all orders of revealing one token at a
        time.
    """
    n, m = answer.sum(1), masked.sum(1)
    weight = n / m.clamp(min=1) if t is None else 1 / t
    return weight * (nll * masked).sum(1) / n


def nll_bound(
    denoiser: Denoiser,
    x: Tensor,
    answer: Tensor,
    *,
    real: Tensor | None = None,
    samples: int = 16,
    weighting: Literal["count", "time"] = "count",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Estimate the bound, in nats per token of the answer: (B,) float64.

    Args:
        denoiser: the model.
        x: (B, S) int64, prompt and true answer.
        answer: (B, S) bool, places of the answer, at least one in each row.
        real: (B, S) bool, false at padding.
        samples: corruptions.
        weighting: ``"count"`` draws how many places are masked, ``"time"`` at which rate (stratified over samples).
            Both have one mean; the first varies less.
        generator: of the draws.

    Raises:
        LimitError: no sample, an unknown weighting, or a row without an answer.
    """
    where = "nll_bound"
    if samples < 1:
        raise LimitError(where, "samples", samples, "at least 1")
    if weighting not in WEIGHTINGS:
        raise unknown_name(where, "weighting", str(weighting), WEIGHTINGS)
    if not bool(answer.any(1).all()):
        raise LimitError(where, "answer", "a row without a place", "at least one place in each row")
    rows, n = x.shape[0], answer.sum(1)
    total = torch.zeros(rows, dtype=torch.float64, device=x.device)
    shift = torch.rand(rows, generator=generator, dtype=torch.float64, device=x.device)
    for i in range(samples):
        noise = torch.rand(x.shape, generator=generator, dtype=torch.float64, device=x.device)
        t = None
        if weighting == "time":
            t = ((shift + i / samples) % 1).clamp(min=1e-3)
            masked = answer & (noise < t[:, None])
        else:
            m = (torch.rand(rows, generator=generator, dtype=torch.float64, device=x.device) * n).long() + 1
            order = noise.masked_fill(~answer, 2.0).argsort(1).argsort(1)  # rank of each place among the answer's
            masked = answer & (order < m[:, None])
        batch = denoiser.logits(torch.where(masked, denoiser.mask_id, x), real=real)
        logp = batch.logits.double().log_softmax(-1).gather(-1, x.gather(1, batch.targets)[..., None])[..., 0]
        nll = torch.zeros(x.shape[0], x.shape[1] + 1, dtype=torch.float64, device=x.device)
        nll = nll.scatter(1, torch.where(batch.valid, batch.targets, x.shape[1]), -logp)[:, :-1]
        total += bound_term(torch.where(masked, nll, 0.0), masked, answer, t)
    return total / samples
