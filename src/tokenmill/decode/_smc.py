"""Sequential Monte Carlo over constrained texts: particles that target the model conditioned on the constraint.

Lipkin et al., "Fast Controlled Generation from Language Models with Adaptive Weighted Rejection Sampling" (arXiv
2504.05410). Masking tokens one by one samples from another law than the model's own, given that the whole text
satisfies the constraint; the weights of `awrs_step` make up for it, and resampling moves particles to where they count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from tokenmill.decode._draws import DrawTable
from tokenmill.decode._oracle import Critic, Oracle
from tokenmill.decode._population import Particle, Population, SMCTrace
from tokenmill.decode._rejection import Method, Step, check_limits, first_valid, weighted_step
from tokenmill.decode._weights import WAYS, Resampling, WeightedSequences
from tokenmill.errors import LimitError, TokenmillError, unknown_name
from tokenmill.text import TokenBytes

__all__ = ["Boundary", "LanguageModel", "SMCSettings", "smc"]

Boundary = Literal["eos", "prefix"]
BOUNDARIES: tuple[str, ...] = get_args(Boundary)


class LanguageModel(Protocol):
    """A batch of texts that grow by one token a step, all behind one prompt."""

    def start(self, n: int, /) -> Tensor:
        """Make n rows and return the log-probabilities (n, V) float64 of their first tokens."""
        ...

    def step(self, tokens: Tensor, /) -> Tensor:
        """Append ``tokens`` (n,) int64, one a row, and return the log-probabilities (n, V) behind them."""
        ...

    def select(self, rows: Tensor, /) -> None:
        """Keep these rows (m,) int64, in this order, copies allowed; the next step has m rows."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SMCSettings:
    """How a population is run; see `smc`."""

    n_particles: int = 5
    ess_threshold: float = 0.5
    resampling: Resampling = "stratified"
    method: Method = "auto"
    max_accepts: int = 2
    max_rejects: int | None = None
    boundary: Boundary = "eos"

    def check(self, where: str) -> None:
        """Refuse values outside their limits.

        Raises:
            LimitError: names the parameter.
        """
        n, threshold = self.n_particles, self.ess_threshold
        if not isinstance(n, int) or isinstance(n, bool) or n < 1:
            raise LimitError(where, "n_particles", n, "an integer >= 1", "One particle is never resampled.")
        if not isinstance(threshold, int | float) or isinstance(threshold, bool) or not 0 <= threshold <= 1:
            raise LimitError(where, "ess_threshold", threshold, "in [0, 1]", "0 never resamples, 1 nearly always.")
        if self.resampling not in WAYS:
            raise unknown_name(where, "resampling", str(self.resampling), WAYS)
        if self.boundary not in BOUNDARIES:
            raise unknown_name(where, "boundary", str(self.boundary), BOUNDARIES)
        check_limits(where, self.method, self.max_accepts, self.max_rejects)


def smc(
    model: LanguageModel,
    potential: Any,
    token_bytes: TokenBytes,
    eos_ids: Sequence[int],
    *,
    n_particles: int = 5,
    ess_threshold: float = 0.5,
    max_tokens: int = 100,
    resampling: Resampling = "stratified",
    critic: Critic | None = None,
    proposal: LanguageModel | None = None,
    method: Method = "auto",
    max_accepts: int = 2,
    max_rejects: int | None = None,
    boundary: Boundary = "eos",
    generator: torch.Generator | None = None,
    trace: SMCTrace | None = None,
) -> WeightedSequences:
    """Sample texts from a model conditioned on a constraint (Lipkin et al., AWRS-SMC).

    Args:
        model: gives log-probabilities over tokens.
        potential: the constraint, see `Potential`; one with ``prefix`` and ``complete`` only is enough.
        token_bytes: what the tokens stand for. Tokens without bytes are never drawn, end tokens excepted.
        eos_ids: tokens that end the text; they count as one event, allowed where the text is ``complete``.
        n_particles: N.
        ess_threshold: renew the population when its effective size is below this share of N; 0 never does
            (importance sampling).
        max_tokens: of a text, end token included.
        resampling: see `resample`.
        critic: soft scores in log space, an object with ``prefix(bytes)`` and ``complete(bytes)``: the target is
            multiplied by exp(complete). Its prefix scores steer the particles; with ``ess_threshold=0`` only the
            last score is asked for.
        proposal: draws the tokens in the model's place; the weights make up for it. Its mass must be above 0 wherever
            that of the model is.
        method, max_accepts, max_rejects: see `awrs_step`.
        boundary: what becomes of texts that reach ``max_tokens``. ``"eos"``: the last token must be an end token,
            with its probability as weight where the text is complete, else the particle dies; the target is then
            the texts of at most ``max_tokens``. ``"prefix"``: they stay as they are. Without ``eos_ids`` it is always
            ``"prefix"``.
        generator: of all draws, on the device of the model's log-probabilities.
        trace: is filled; calls of the model are counted by the model.

    Returns:
        The particles, dead ones included. When all are dead, ``log_ml`` is -inf.

    Raises:
        LimitError: settings outside their limits, no string satisfies the constraint, rows that are no
            log-probabilities; before any work where possible.
        ContractError: the constraint contradicts itself.
        StoppedError: the constraint or the critic raised an error, which is the cause.
            Each error has the particles so far in ``.partial``.
    """
    settings = SMCSettings(
        n_particles=n_particles,
        ess_threshold=ess_threshold,
        resampling=resampling,
        method=method,
        max_accepts=max_accepts,
        max_rejects=max_rejects,
        boundary=boundary,
    )
    trace = SMCTrace() if trace is None else trace
    oracle = Oracle("smc", potential, token_bytes, eos_ids, trace, critic=critic)
    run = Sampler("smc", settings, model, oracle, proposal=proposal, generator=generator)
    return run.run(max_tokens)


class Sampler:
    """One run of `smc`.

    Args:
        where: the method, for messages.
        settings: how.
        model, proposal: see `smc`.
        oracle: answers for constraint and critic, and counts.
        generator: of the draws.
        greedy: take the likeliest valid token instead of a draw, with weight 1; for one particle.
        stop: whether a particle ends here, from its ids and the log-probabilities (V,) behind which it drew the last.
        on_step: called behind each token.

    Raises:
        LimitError: settings outside their limits, or no string satisfies the constraint.
    """

    def __init__(
        self,
        where: str,
        settings: SMCSettings,
        model: LanguageModel,
        oracle: Oracle,
        *,
        proposal: LanguageModel | None = None,
        generator: torch.Generator | None = None,
        greedy: bool = False,
        stop: Callable[[list[int], Tensor], bool] | None = None,
        on_step: Callable[[Population], None] | None = None,
    ) -> None:
        settings.check(where)
        self.where, self.settings, self.oracle, self.trace = where, settings, oracle, oracle.trace
        self.models = [model] if proposal is None else [model, proposal]
        self.generator, self.greedy, self.stop, self.on_step = generator, greedy, stop, on_step
        self.population = Population([oracle.start()] * settings.n_particles)
        oracle.partial = self.population.sequences
        self._width = settings.n_particles  # rows that the models hold
        self._blocked: Tensor | None = None
        self._device = torch.device("cpu")

    def run(self, max_tokens: int) -> WeightedSequences:
        """Sample texts of at most ``max_tokens`` tokens; see `smc`."""
        if not isinstance(max_tokens, int) or isinstance(max_tokens, bool) or max_tokens < 1:
            raise LimitError(self.where, "max_tokens", max_tokens, "an integer >= 1")
        try:
            self._run(max_tokens)
        except TokenmillError as error:
            error.partial = self.population.sequences() if error.partial is None else error.partial
            raise
        finally:
            self._note()
        return self.population.sequences()

    def _run(self, max_tokens: int) -> None:
        forced = self.settings.boundary == "eos" and bool(self.oracle.eos_ids)
        laws = self._laws([model.start(self._width) for model in self.models])
        for step in range(1, max_tokens + 1):
            self.oracle.forget()
            if forced and step == max_tokens:
                for particle in self.population.active:
                    self._force(particle, laws[0])
            else:
                self._extend(laws, last=step == max_tokens)
            if self.on_step is not None:
                self.on_step(self.population)
            if not self.population.alive:
                self.trace.died_at = step
            if not self.population.active:
                break
            settings = self.settings
            if self.population.renew(settings.ess_threshold, settings.resampling, self.generator):
                self.trace.resamplings += 1
            if not self.population.active:
                break
            laws = self._laws(self._forward())
        if self.settings.ess_threshold == 0:
            for particle in self.population.alive:
                self._twist(particle)
            if not self.population.alive and not self.trace.died_at:
                self.trace.died_at = max(len(p.ids) for p in self.population.particles)

    def _extend(self, laws: list[Tensor], *, last: bool) -> None:
        """One token for each active particle."""
        table = DrawTable(
            laws[-1], generator=self.generator, blocked=self._blocked, event=self.oracle.eos_ids
        )  # (rows, V)
        for particle in self.population.active:
            step = self._draw(table, particle)
            self.trace.checks_per_token.append(step.n_checks)
            if step.token < 0:
                particle.weigh(-math.inf)
                continue
            correction = self._correction(laws, particle.row, step.token)
            self._append(particle, laws[0][particle.row], step.token)
            particle.weigh(step.logw + correction)
            if particle.status == "active" and (last or self._stops(particle, laws[0])):
                particle.status, particle.whole = "ended", self.oracle.accepting(particle)
            if self.settings.ess_threshold > 0 and particle.status != "dead":
                self._twist(particle)

    def _draw(self, table: DrawTable, particle: Particle) -> Step:
        settings = self.settings

        def accept(token: int) -> bool:
            return self.oracle.accepts(particle, token)

        if self.greedy:
            return first_valid(table.ranked(particle.row), accept, settings.max_rejects)
        return weighted_step(
            table.row(particle.row),
            accept,
            method=settings.method,
            max_accepts=settings.max_accepts,
            max_rejects=settings.max_rejects,
        )

    def _append(self, particle: Particle, law: Tensor, token: int) -> None:
        self.trace.particle_tokens += 1
        if self.oracle.is_end(token):
            particle.ids.append(self.oracle.end_token(law, self.generator, likeliest=self.greedy))
            particle.status, particle.whole = "finished", True
            return
        self.oracle.advance(particle, token)
        particle.ids.append(token)

    def _force(self, particle: Particle, law: Tensor) -> None:
        """The end token in the last place, with its probability as weight where the text is whole."""
        row, end = law[particle.row], self.oracle.eos_ids
        self.trace.checks_per_token.append(1)
        if not self.oracle.accepts(particle, end[0]):
            particle.weigh(-math.inf)
            return
        self._append(particle, row, end[0])
        particle.weigh(float(row[end].logsumexp(0)) if self._weighted else 0.0)
        if self.settings.ess_threshold > 0 and particle.status != "dead":
            self._twist(particle)

    @property
    def _weighted(self) -> bool:
        return not self.greedy and self.settings.method != "lcd"

    def _correction(self, laws: list[Tensor], row: int, token: int) -> float:
        """What the model gives to a token that the proposal drew, in relation to the proposal."""
        if len(laws) == 1 or not self._weighted:
            return 0.0
        ids = self.oracle.eos_ids if self.oracle.is_end(token) else [token]
        wanted, drawn = (float(law[row, ids].logsumexp(0)) for law in laws)
        return wanted - drawn

    def _stops(self, particle: Particle, law: Tensor) -> bool:
        return self.stop is not None and self.stop(particle.ids, law[particle.row])

    def _twist(self, particle: Particle) -> None:
        """Replace what the critic said before by what it says now."""
        score = self.oracle.score(particle)
        if score is not None:
            before, particle.twist = particle.twist, score
            particle.weigh(score - before)

    def _forward(self) -> list[Tensor]:
        """Log-probabilities behind each active particle, which are the only rows that stay."""
        active = self.population.active
        rows = [p.row for p in active]
        device = self._device
        if rows != list(range(self._width)):
            for model in self.models:
                model.select(torch.tensor(rows, device=device))
        for row, particle in enumerate(active):
            particle.row = row
        self._width = len(active)
        tokens = torch.tensor([p.ids[-1] for p in active], device=device)
        return [model.step(tokens) for model in self.models]

    def _laws(self, laws: list[Tensor]) -> list[Tensor]:
        """Checked rows of the models, float64 (rows, V)."""
        for law in laws:
            if law.dim() != 2 or law.shape != (self._width, laws[0].shape[1]):
                limit = f"({self._width}, {laws[0].shape[-1]}): a row a particle, one vocabulary for all models"
                raise LimitError(self.where, "shape of the log-probabilities", tuple(law.shape), limit)
        if self._blocked is None:
            self._device = laws[0].device
            self._blocked = self.oracle.blocked(laws[0].shape[1]).to(self._device)
        return [law.double() for law in laws]

    def _note(self) -> None:
        """Results as counts, also of a run that failed."""
        found = self.population.sequences()
        self.trace.log_ml, self.trace.ess = found.log_ml, found.ess
        self.trace.finished = sum(found.finished)
