"""Rules that need no training: quota, random, threshold, factor, entropy, margin, entropy bound."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenmill.diffuse._draws import uniform
from tokenmill.diffuse._proposal import Proposal
from tokenmill.diffuse._rule import RevealRule
from tokenmill.errors import LimitError


def top_n(scores: Tensor, eligible: Tensor, n: Tensor | int) -> Tensor:
    """The ``n`` highest scores (B, S) among the eligible places of each row; of equal ones the lowest place.

    Args:
        scores: (B, S).
        eligible: (B, S) bool.
        n: a count, or (B,) counts; more than there are means all.

    Returns:
        (B, S) bool.
    """
    order = scores.masked_fill(~eligible, -torch.inf).sort(dim=1, descending=True, stable=True).indices
    rank = torch.arange(scores.shape[1], device=scores.device).expand_as(order)
    within = rank < (n if isinstance(n, int) else n[:, None])
    return torch.zeros_like(eligible).scatter(1, order, within) & eligible


def above(confidence: Tensor, eligible: Tensor, tau: float) -> Tensor:
    """Eligible places with a confidence of at least ``tau``, and the best one always; all (B, S)."""
    return (eligible & (confidence >= tau)) | top_n(confidence, eligible, 1)


def factor_set(confidence: Tensor, eligible: Tensor, factor: float) -> Tensor:
    """From the best place down, rank r is revealed while its confidence is at least 1 - factor / (r + 1); (B, S).

    The best one always is. When n marginals exceed 1 - e and (n + 1) e <= 1, revealing them together picks the most
    likely joint value (Fast-dLLM).
    """
    ordered, index = confidence.masked_fill(~eligible, -torch.inf).sort(dim=1, descending=True, stable=True)
    rank = torch.arange(1, ordered.shape[1] + 1, device=ordered.device)
    good = ordered >= 1 - factor / (rank + 1)
    good[:, 0] = True
    return torch.zeros_like(eligible).scatter(1, index, good.cumprod(1).bool()) & eligible


def entropy_bound_set(entropy: Tensor, eligible: Tensor, gamma: float) -> Tensor:
    """From the surest place on, those in front of which the entropies sum up to at most ``gamma``; (B, S)."""
    ordered, index = entropy.masked_fill(~eligible, torch.inf).sort(dim=1, stable=True)
    before = ordered.cumsum(1).roll(1, dims=1)
    before[:, 0] = 0
    return torch.zeros_like(eligible).scatter(1, index, before <= gamma) & eligible


@dataclass(frozen=True)
class Quota(RevealRule):
    """The ``n`` most confident places of each pass; None: as many as the decoder's ``steps`` ask for (LLaDA)."""

    n: int | None = 1

    def __post_init__(self) -> None:
        check_count("Quota", self.n)

    def reveal(self, proposal: Proposal) -> Tensor:
        """The most confident ones."""
        return top_n(proposal.confidence, proposal.eligible, count(self.n, proposal))


@dataclass(frozen=True)
class RandomReveal(RevealRule):
    """``n`` places of each pass at random; None: as many as the decoder's ``steps`` ask for."""

    n: int | None = 1

    def __post_init__(self) -> None:
        check_count("RandomReveal", self.n)

    def reveal(self, proposal: Proposal) -> Tensor:
        """Drawn uniformly, with each row's own generator."""
        scores = uniform(proposal.eligible, proposal.canvas.generators)
        return top_n(scores, proposal.eligible, count(self.n, proposal))


@dataclass(frozen=True)
class Threshold(RevealRule):
    """Places with a confidence of at least ``tau``, and always the best one (Fast-dLLM); above 1: one a pass."""

    tau: float = 0.9

    def __post_init__(self) -> None:
        check_number("Threshold", "tau", self.tau, -math.inf)

    def reveal(self, proposal: Proposal) -> Tensor:
        """Those above."""
        return above(proposal.confidence, proposal.eligible, self.tau)


@dataclass(frozen=True)
class Factor(RevealRule):
    """As many places as their confidences vouch for together (Fast-dLLM), see `factor_set`."""

    f: float = 1.0

    def __post_init__(self) -> None:
        check_number("Factor", "f", self.f, 0)

    def reveal(self, proposal: Proposal) -> Tensor:
        """Those that the factor lets through."""
        return factor_set(proposal.confidence, proposal.eligible, self.f)


@dataclass(frozen=True)
class Entropy(RevealRule):
    """The ``n`` places whose predictions have the lowest entropy; None: as many as ``steps`` ask for (Dream)."""

    n: int | None = 1

    def __post_init__(self) -> None:
        check_count("Entropy", self.n)

    def reveal(self, proposal: Proposal) -> Tensor:
        """The surest ones."""
        return top_n(-proposal.entropy(), proposal.eligible, count(self.n, proposal))


@dataclass(frozen=True)
class Margin(RevealRule):
    """The ``n`` places whose best token leads by most; None: as many as the decoder's ``steps`` ask for (Dream)."""

    n: int | None = 1

    def __post_init__(self) -> None:
        check_count("Margin", self.n)

    def reveal(self, proposal: Proposal) -> Tensor:
        """Those with the largest margin."""
        return top_n(proposal.margin(), proposal.eligible, count(self.n, proposal))


@dataclass(frozen=True)
class EntropyBound(RevealRule):
    """Places in order of entropy while those in front of them sum up to at most ``gamma`` nats (EB sampler)."""

    gamma: float = 0.1

    def __post_init__(self) -> None:
        check_number("EntropyBound", "gamma", self.gamma, 0)

    def reveal(self, proposal: Proposal) -> Tensor:
        """Those within the bound; the surest one always is."""
        return entropy_bound_set(proposal.entropy(), proposal.eligible, self.gamma)


def count(n: int | None, proposal: Proposal) -> Tensor | int:
    """A rule's count: its own, or the quota (B,) of the decoder's steps."""
    return n if n is not None else proposal.canvas.quota


def check_count(where: str, n: int | None) -> None:
    """Refuse what is not ``None`` or a count."""
    if n is not None and (isinstance(n, bool) or n < 1):
        raise LimitError(where, "n", n, "None or at least 1")


def check_number(where: str, name: str, value: float, least: float) -> None:
    """Refuse NaN and what is below ``least``."""
    if math.isnan(value) or value < least:
        raise LimitError(where, name, value, f"a number of at least {least:g}")
