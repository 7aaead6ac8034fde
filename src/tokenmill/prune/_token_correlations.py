"""Correlations among the patches of a crop: look-alikes, density, outliers, and draws by attention."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tokenmill.errors import LimitError
from tokenmill.prune._baselines import check_choices

MODES = ("topk", "multinomial", "systematic")
Mode = Literal["topk", "multinomial", "systematic"]
_ROWS = 256  # rows of similarities compared at once


def patch_similarity(keys: Tensor) -> Tensor:
    """Cosines of keys (B, H, N, d) with heads joined: (B, N, N) float32.

    Raises:
        LimitError: NaN, with the crop's index.
    """
    if keys.dim() != 4:
        raise LimitError("patch_similarity", "keys", tuple(keys.shape), "(B, H, N, d)")
    found = []
    for number, crop in enumerate(keys):
        # Head by head into one product, so that neither the joined keys nor a normalised copy is held.
        product = torch.zeros(crop.shape[1], crop.shape[1], device=keys.device)
        for head in crop:
            wide = head.float()
            product.addmm_(wide, wide.T)
        norm = product.diagonal().clone().sqrt()
        if not bool(torch.isfinite(norm).all()):
            raise LimitError("patch_similarity", "keys of crop", f"NaN or infinity at {number}", "finite")
        scale = torch.where(norm > 0, norm, torch.inf).reciprocal()
        product *= scale[:, None]
        product *= scale
        found.append(product)
    return torch.stack(found) if len(found) > 1 else found[0][None]


def information_density(
    sim: Tensor, alpha: float = 0.7, beta: float = 0.1, *, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Share of tokens that are not redundant.

    A token is redundant when more than ``beta N`` others have a similarity above ``alpha`` to it.

    Args:
        sim: (B, N, N).
        alpha: cosine from which two tokens look alike.
        beta: share of look-alikes.
        valid: (B, N) bool, false at padding, which counts nowhere.

    Returns:
        d (B,) in [0, 1], and (B, N) bool. A crop of one token has d = 1.

    Raises:
        LimitError: alpha outside (0, 1], beta outside [0, 1).
    """
    if not 0 < alpha <= 1:
        raise LimitError("information_density", "alpha", alpha, "in (0, 1]")
    if not 0 <= beta < 1:
        raise LimitError("information_density", "beta", beta, "in [0, 1)")
    batch, n = sim.shape[:2]
    real = torch.ones(batch, n, dtype=torch.bool, device=sim.device) if valid is None else valid
    # Some rows at a time: summing booleans makes integers of all that are given.
    counts = torch.cat([((rows > alpha) & real[:, None]).sum(-1) for rows in sim.split(_ROWS, dim=1)], dim=1)
    counts -= ((sim.diagonal(dim1=1, dim2=2) > alpha) & real).long()
    total = real.sum(-1)
    redundant = (counts > beta * total[:, None]) & real
    density = 1 - redundant.sum(-1) / total.clamp_min(1)
    return torch.where(total <= 1, 1.0, density.float()), redundant


def iqr_outliers(a: Tensor, factor: float = 1.5) -> Tensor:
    """(B, N) bool: values above Q3 + factor (Q3 - Q1), quartiles by linear interpolation."""
    if not factor > 0:
        raise LimitError("iqr_outliers", "factor", factor, "above 0")
    quartiles = torch.quantile(a.float(), torch.tensor([0.25, 0.75], device=a.device), dim=-1)  # (2, B)
    bound = quartiles[1] + factor * (quartiles[1] - quartiles[0]) + 1e-8
    return a > bound[:, None]


def sample_local(a: Tensor, n: Tensor, mode: Mode = "topk", generator: torch.Generator | None = None) -> Tensor:
    """``n[b]`` distinct tokens of each crop, led by the probabilities ``a``.

    Args:
        a: (B, N), not negative.
        n: (B,) int64 in [0, N].
        mode: ``"topk"`` the most likely; ``"multinomial"`` draws without replacement (Gumbel keys);
            ``"systematic"`` n even steps through the cumulated probabilities, copies collapsed.
        generator: for ``"multinomial"``.

    Returns:
        (B, N) bool. Tokens of probability 0 are taken last.

    Raises:
        LimitError: more tokens than there are, or drawing without a generator.
    """
    check_choices("sample_local", mode=(mode, MODES))
    if int(n.min()) < 0 or int(n.max()) > a.shape[1]:
        raise LimitError("sample_local", "n", n.tolist(), f"in [0, N={a.shape[1]}]")
    wide = a.double()
    if mode == "systematic":
        p = wide / wide.sum(-1, keepdim=True)
        edges = p.cumsum(-1)
        kept = torch.zeros_like(a, dtype=torch.bool)
        for row, count in enumerate(n.tolist()):
            if count:
                points = (torch.arange(count, device=a.device, dtype=torch.float64) + 0.5) / count
                at = torch.searchsorted(edges[row], points).clamp_max(a.shape[1] - 1)
                kept[row, at] = True
        return kept
    key = wide
    if mode == "multinomial":
        if generator is None:
            raise LimitError("sample_local", "generator", None, "given for mode='multinomial'", "Or use mode='topk'.")
        uniform = torch.rand(a.shape, generator=generator, dtype=torch.float64).clamp(1e-300, 1 - 1e-16).to(a.device)
        key = wide.log() - (-uniform.log()).log()
    rank = key.sort(dim=-1, descending=True, stable=True).indices.argsort(-1)
    return rank < n.to(a.device)[:, None]
