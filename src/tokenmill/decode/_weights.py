"""Weighted texts: what a population of particles says, how far its weights have degenerated, and how it is renewed.

Resampling replaces weights by copies: each of the four ways gives particle i on average N W_i copies, W the
normalised weights (Lipkin et al., arXiv 2504.05410, use the stratified one).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from tokenmill.errors import LimitError, TokenmillError, unknown_name

__all__ = ["NoValidContinuation", "Resampling", "WeightedSequences", "effective_size", "resample"]

Resampling = Literal["stratified", "systematic", "residual", "multinomial"]
WAYS: tuple[str, ...] = get_args(Resampling)


class NoValidContinuation(TokenmillError):  # noqa: N818 - the name says what happened
    """No particle is alive: the constraint allowed none of the texts that were tried. ``.partial`` holds them."""


def normalised(log_weights: Tensor) -> Tensor:
    """(N,) weights that sum to 1; all 0 when every weight is, never NaN."""
    if not bool((log_weights > -math.inf).any()):
        return torch.zeros_like(log_weights)
    return log_weights.softmax(0)


def effective_size(log_weights: Tensor) -> float:
    """How many equal weights would do as much: 1 / sum of W_i^2, in [1, N]; 0 when nothing has weight.

    Args:
        log_weights: (N,) float64, up to a constant.
    """
    if not bool((log_weights > -math.inf).any()):
        return 0.0
    size = math.exp(-float((2 * log_weights.log_softmax(0)).logsumexp(0)))
    return min(max(size, 1.0), float(log_weights.shape[0]))


def resample(weights: Tensor, how: Resampling = "stratified", generator: torch.Generator | None = None) -> Tensor:
    """Draw N ancestors of N particles, each particle on average N W_i times.

    Args:
        weights: (N,) float64, at least 0, with sum 1.
        how: ``"multinomial"`` draws independently, ``"stratified"`` once in each N-th of the mass, ``"systematic"``
            at one offset in all of them (floor(N W) or ceil(N W) copies), ``"residual"`` takes floor(N W) copies and
            draws the rest independently.
        generator: of the draws, on the device of ``weights``.

    Returns:
        (N,) int64, ascending. Particles without weight have no copies.

    Raises:
        LimitError: an unknown way, weights that are no law.
    """
    if how not in WAYS:
        raise unknown_name("resample", "how", str(how), WAYS)
    total = float(weights.sum()) if weights.dim() == 1 and weights.shape[0] else math.nan
    if not abs(total - 1) < 1e-6 or bool((weights < 0).any()):
        raise LimitError("resample", "weights", f"{tuple(weights.shape)} with sum {total}", "(N,) >= 0 with sum 1")
    n = weights.shape[0]

    def uniform(count: int) -> Tensor:
        return torch.rand(count, generator=generator, dtype=torch.float64, device=weights.device)

    steps = torch.arange(n, device=weights.device)
    if how == "stratified":
        return _inverse(weights, (steps + uniform(n)) / n)
    if how == "systematic":
        return _inverse(weights, (steps + uniform(1)) / n)
    if how == "multinomial":
        return _inverse(weights, uniform(n)).sort().values
    copies = (n * weights).floor()
    rest = n - int(copies.sum())
    sure = steps.repeat_interleave(copies.long())
    if rest == 0:
        return sure
    fractions = n * weights - copies
    drawn = _inverse(fractions / fractions.sum(), uniform(rest))
    return torch.cat([sure, drawn]).sort().values


def _inverse(weights: Tensor, points: Tensor) -> Tensor:
    """For each point (M,) in [0, 1) the first particle whose cumulative weight is above it."""
    sums = weights.cumsum(0)
    # From the last particle with weight on the sum is 1, whatever it rounded to: all points find somebody alive.
    sums[int(weights.nonzero()[-1]) :] = 1.0
    return torch.searchsorted(sums, points.clamp(max=1 - 2**-53), right=True)


@dataclass(frozen=True, slots=True)
class WeightedSequences:
    """Texts with weights: a sample of a law that is never to be read without them.

    Attributes:
        sequences: ids of each particle behind the prompt, end token included.
        texts: their bytes, without end token.
        log_weights: (N,) float64, not normalised; -inf for particles that died.
        finished: which of them are whole strings of the constraint.
    """

    sequences: list[list[int]]
    texts: list[bytes]
    log_weights: Tensor
    finished: list[bool]

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def alive(self) -> bool:
        """Has any particle weight?"""
        return bool((self.log_weights > -math.inf).any())

    @property
    def log_ml(self) -> float:
        """Logarithm of the mean weight, whose exponential estimates without bias how much of the model's mass
        satisfies the constraint; -inf when no particle is alive."""
        if not self.alive:
            return -math.inf
        return float(self.log_weights.logsumexp(0)) - math.log(len(self))

    @property
    def weights(self) -> Tensor:
        """(N,) float64 with sum 1; all 0 when no particle is alive."""
        return normalised(self.log_weights)

    @property
    def ess(self) -> float:
        """See `effective_size`."""
        return effective_size(self.log_weights)

    def posterior(self) -> dict[bytes, float]:
        """Text -> probability, the likeliest first; equal texts are added up. Empty when no particle is alive."""
        found: dict[bytes, float] = {}
        for text, weight in zip(self.texts, self.weights.tolist(), strict=True):
            if weight > 0:
                found[text] = found.get(text, 0.0) + weight
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def draw(self, generator: torch.Generator | None = None) -> int:
        """The number of a particle, drawn by weight.

        Raises:
            NoValidContinuation: no particle is alive.
        """
        self._check("draw from")
        device = None if generator is None else generator.device
        point = torch.rand(1, generator=generator, dtype=torch.float64, device=device)
        return int(_inverse(self.weights, point.to(self.log_weights.device)))

    def sample(self, generator: torch.Generator | None = None) -> bytes:
        """A text, drawn by weight.

        Raises:
            NoValidContinuation: no particle is alive.
        """
        return self.texts[self.draw(generator)]

    def best(self) -> bytes:
        """The likeliest text of the posterior.

        Raises:
            NoValidContinuation: no particle is alive.
        """
        self._check("choose from")
        return next(iter(self.posterior()))

    def expect(self, function: Callable[[bytes], float]) -> float:
        """The weighted mean of a function of the text.

        Raises:
            NoValidContinuation: no particle is alive.
        """
        self._check("average over")
        return math.fsum(share * function(text) for text, share in self.posterior().items())

    def _check(self, purpose: str) -> None:
        if not self.alive:
            text = f"WeightedSequences: none of {len(self)} particles is alive, so there is nothing to {purpose}."
            raise NoValidContinuation(text, partial=self)

    def __eq__(self, other: Any) -> bool:
        if not isinstance(other, WeightedSequences):
            return NotImplemented
        same = (self.sequences, self.texts, self.finished) == (other.sequences, other.texts, other.finished)
        return same and torch.equal(self.log_weights, other.log_weights)

    __hash__ = None  # pyright: ignore[reportAssignmentType]
