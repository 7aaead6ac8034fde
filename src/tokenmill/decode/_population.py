"""Particles of a constrained text: what each has written, what it weighs, and how the population is renewed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Literal

import torch

from tokenmill.decode._potential import State
from tokenmill.decode._weights import Resampling, WeightedSequences, effective_size, normalised, resample
from tokenmill.trace import Trace

# active: goes on; finished: ended by the end token; ended: stopped by a limit or a criterion; dead: no weight
Status = Literal["active", "finished", "ended", "dead"]


@dataclass(slots=True)
class SMCTrace(Trace):
    """Counts of one constrained text. ``checks`` are calls of the constraint: particles in one state share answers.

    Attributes:
        checks_per_token: for every token of every particle, how many tokens its step asked about.
        resamplings: how often the population was renewed.
        critic_calls: calls of the critic.
        proposal_calls: forward passes of the proposal model.
        particle_tokens: tokens that all particles drew together.
        finished: particles that are whole strings of the constraint.
        log_ml: see `WeightedSequences.log_ml`.
        ess: effective number of particles at the end.
        died_at: the step behind which no particle was alive; 0 when some are.
    """

    checks_per_token: list[int] = field(default_factory=list)
    resamplings: int = 0
    critic_calls: int = 0
    proposal_calls: int = 0
    particle_tokens: int = 0
    finished: int = 0
    log_ml: float = 0.0
    ess: float = 0.0
    died_at: int = 0

    @property
    def median_checks(self) -> float:
        """Median of ``checks_per_token``; 0 before the first."""
        return float(median(self.checks_per_token)) if self.checks_per_token else 0.0


@dataclass(slots=True)
class Particle:
    """One text under way.

    Attributes:
        state: of the constraint; a value, so copies may share it.
        row: where the model keeps this particle.
        twist: what the critic has put into ``logw``.
        whole: the text is a whole string of the constraint.
    """

    state: State
    row: int
    ids: list[int] = field(default_factory=list)
    text: bytes = b""
    logw: float = 0.0
    twist: float = 0.0
    status: Status = "active"
    whole: bool = False

    def weigh(self, logw: float) -> None:
        """Add to the weight; a particle without weight is dead."""
        self.logw += logw
        if self.logw == -math.inf:
            self.status, self.whole = "dead", False

    def copy(self) -> Particle:
        """A particle that goes its own way from here on."""
        return replace(self, ids=list(self.ids))


class Population:
    """N particles of one prompt."""

    def __init__(self, states: Sequence[State]) -> None:
        self.particles = [Particle(state, row) for row, state in enumerate(states)]

    def __len__(self) -> int:
        return len(self.particles)

    @property
    def active(self) -> list[Particle]:
        """Those that go on, in order."""
        return [p for p in self.particles if p.status == "active"]

    @property
    def alive(self) -> list[Particle]:
        """Those with weight."""
        return [p for p in self.particles if p.status != "dead"]

    @property
    def log_weights(self) -> torch.Tensor:
        """(N,) float64."""
        return torch.tensor([p.logw for p in self.particles], dtype=torch.float64)

    def renew(self, threshold: float, how: Resampling, generator: torch.Generator | None) -> bool:
        """Resample when the effective size is below ``threshold`` * N; every copy then has the mean weight.

        Finished particles take part. Nothing happens when all are dead.
        """
        logs, n = self.log_weights, len(self)
        # An effective size of N is N only up to rounding, and equal weights need no renewal.
        if not self.alive or effective_size(logs) >= threshold * n * (1 - 1e-9):
            return False
        mean = float(logs.logsumexp(0)) - math.log(n)
        device = None if generator is None else generator.device
        ancestors = resample(normalised(logs).to(device), how, generator).tolist()
        self.particles = [self.particles[i].copy() for i in ancestors]
        for particle in self.particles:
            particle.logw = mean
        return True

    def sequences(self) -> WeightedSequences:
        """What there is now, as a result."""
        return WeightedSequences(
            sequences=[list(p.ids) for p in self.particles],
            texts=[p.text for p in self.particles],
            log_weights=self.log_weights,
            finished=[p.whole for p in self.particles],
        )


def common_prefix(texts: Sequence[list[int]]) -> list[int]:
    """The tokens with which all texts begin."""
    low, high = min(texts), max(texts)  # in lexicographic order these two are farthest apart
    for i, token in enumerate(low):
        if high[i] != token:
            return low[:i]
    return low
