"""Training of an unmasking policy: roll-outs, reward, group-relative advantages, clipped policy gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from tokenmill.diffuse._decoder import Diffusion
from tokenmill.diffuse._policy_network import PolicyNetwork, policy_inputs
from tokenmill.diffuse._reveal_laws import bernoulli_log_likelihood, dpls_log_likelihood
from tokenmill.diffuse._rule import Reveal, RevealRule
from tokenmill.diffuse._rules import above
from tokenmill.errors import LimitError

if TYPE_CHECKING:
    from tokenmill.diffuse._canvas import Canvas
    from tokenmill.diffuse._proposal import Proposal
    from tokenmill.diffuse.unmasking_policies import UnmaskingPolicy

_CHUNK = 200_000  # places that one backward pass holds
_RECENT = 10  # batches whose mean reward chooses the policy that is kept


@dataclass(frozen=True, slots=True, kw_only=True)
class GRPOConfig:
    """How a policy is trained; the defaults are the paper's.

    Attributes:
        max_new_tokens: length G of the answers.
        block_length: of the decoder; None for one block.
        group: roll-outs of a prompt.
        alpha: weight of speed; 0 rewards right answers alone.
        form: "multiplicative" is the paper's reward; "additive" its ablation, which invites fast wrong answers.
        clip: how far a ratio may leave 1.
        passes: optimiser steps on one batch of roll-outs.
        rate, betas, weight_decay, max_norm: of AdamW.
        warm_up: optimiser steps of linear warm-up; a cosine follows.
        experts: thresholds whose decoding joins each group as if the policy had drawn it.
        expert_block: block length of those.
        seed: of the draws.
    """

    max_new_tokens: int
    block_length: int | None = None
    group: int = 8
    alpha: float = 1.0
    form: Literal["multiplicative", "additive"] = "multiplicative"
    clip: float = 0.5
    passes: int = 2
    rate: float = 3e-5
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.1
    max_norm: float = 0.2
    warm_up: int = 100
    experts: tuple[float, ...] = ()
    expert_block: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("max_new_tokens", 1), ("group", 2), ("passes", 1), ("warm_up", 0), ("expert_block", 1)):
            if getattr(self, name) < least:
                raise LimitError("GRPOConfig", name, getattr(self, name), f"at least {least}")
        for name in ("alpha", "clip", "rate", "weight_decay", "max_norm"):
            if not 0 <= getattr(self, name) < math.inf:
                raise LimitError("GRPOConfig", name, getattr(self, name), "at least 0")
        if self.block_length is not None and not 1 <= self.block_length <= self.max_new_tokens:
            raise LimitError("GRPOConfig", "block_length", self.block_length, f"in [1, {self.max_new_tokens}]")


@dataclass(frozen=True, slots=True)
class PolicyBatch:
    """Prompts of one update.

    Attributes:
        input_ids: (P, T) int64, padded on the left.
        right: whether an answer, ids behind prompt number p, is right.
        attention_mask: (P, T), or None without padding.
    """

    input_ids: Tensor
    right: Callable[[int, list[int]], bool]
    attention_mask: Tensor | None = None


@dataclass(slots=True)
class PolicyReport:
    """One entry an update: mean reward, share of right answers and mean passes of the policy's own roll-outs."""

    rewards: list[float] = field(default_factory=list)
    right: list[float] = field(default_factory=list)
    passes: list[float] = field(default_factory=list)
    best: float = -math.inf


@dataclass(slots=True)
class Rollouts:
    """R roll-outs of T passes over L places, what the policy saw and what was drawn.

    Attributes:
        masked, eligible: (R, T, L) bool.
        confidence: (R, T, L, p).
        time: (R, T, 1).
        rank: (R, T, L) int64, the order of a draw; -1 for what stayed masked.
        passes: (R,) int64, passes that each row took.
        answers: (R, G) int64.
        expert: (R,) bool, rows that a threshold has decoded.
    """

    masked: Tensor
    eligible: Tensor
    confidence: Tensor
    time: Tensor
    rank: Tensor
    passes: Tensor
    answers: Tensor
    expert: Tensor

    @property
    def active(self) -> Tensor:
        """(R, T) bool: passes in which something could be revealed."""
        return self.eligible.any(-1)

    def rows(self, index: Tensor) -> Rollouts:
        """Some of the rows, in the given order."""
        return Rollouts(*(getattr(self, one.name)[index] for one in fields(self)))


def reward(right: Tensor, passes: Tensor, length: int, alpha: float, *, form: str = "multiplicative") -> Tensor:
    """Reward of answers, in [0, 1] in its multiplicative form: right, times ((G - n + 1) / G) ** alpha.

    Args:
        right: (R,) bool.
        passes: (R,) int64, n; counted up to G.
        length: G.
        alpha: weight of speed.
        form: "multiplicative", or "additive": right - alpha n / G.

    Raises:
        LimitError: a negative alpha, or no length.
    """
    if not alpha >= 0:
        raise LimitError("reward", "alpha", alpha, "at least 0")
    if length < 1:
        raise LimitError("reward", "length", length, "at least 1")
    n = passes.clamp(max=length).double()
    if form == "additive":
        return right.double() - alpha * n / length
    return right.double() * ((length - n + 1) / length) ** alpha


def advantages(rewards: Tensor) -> Tensor:
    """Rewards (P, g) minus the mean of their group; not divided by its deviation."""
    return rewards - rewards.mean(-1, keepdim=True)


def grpo_loss(new: Tensor, old: Tensor, advantage: Tensor, active: Tensor, *, clip: float) -> Tensor:
    """Minus the clipped surrogate: the mean over a roll-out's active passes, summed over roll-outs.

    Args:
        new, old: (R, T) log-likelihoods of what was drawn, under the policy as it is and as it was.
        advantage: (R,).
        active: (R, T) bool.
        clip: how far a ratio may leave 1.
    """
    ratio = (new - old).exp()
    a = advantage[:, None].to(ratio)
    gain = torch.minimum(ratio * a, ratio.clamp(1 - clip, 1 + clip) * a)
    return -((gain * active).sum(1) / active.sum(1).clamp_min(1)).sum()


def with_experts(ll: Tensor, expert: Tensor, group: int, experts: int) -> Tensor:
    """Log-likelihoods (R, T), those of expert rows (R,) under the mixture of g policies and E sure experts."""
    if not experts:
        return ll
    share = math.log(group / (group + experts)), math.log(1 / (group + experts))
    mixed = torch.logaddexp(ll + share[0], torch.full_like(ll, share[1]))
    return torch.where(expert[:, None], mixed, ll)


def log_likelihood(rule: UnmaskingPolicy, rollouts: Rollouts) -> Tensor:
    """(R, T) float32: how likely the policy draws what was drawn; 0 in passes without eligible places."""
    network: Any = rule.network
    u = network(rollouts.masked, rollouts.confidence, rollouts.time) / rule.temperature
    if rule.sampling == "dpls":
        return dpls_log_likelihood(u, rollouts.rank, rollouts.eligible, stop=rule.stop)
    return bernoulli_log_likelihood(u, rollouts.rank >= 0, rollouts.eligible)


class Recorder(RevealRule):
    """A policy, or a threshold in its place, that keeps what was seen and drawn in each pass."""

    def __init__(self, rule: UnmaskingPolicy, threshold: float | None = None) -> None:
        network = rule.network
        assert isinstance(network, PolicyNetwork)
        self.rule, self.threshold, self.config = rule, threshold, network.config
        self.leaves_masks = threshold is None and rule.leaves_masks
        self.seen: list[tuple[Tensor, ...]] = []
        self.total = 0

    def begin(self, canvas: Canvas) -> Recorder:
        """Forget the last batch."""
        self.seen, self.total = [], len(canvas)
        return self

    def reveal(self, proposal: Proposal) -> Reveal:
        """What the rule draws."""
        canvas, eligible, leave = proposal.canvas, proposal.eligible, None
        if self.threshold is None:
            rank = self.rule.draw(proposal, self.rule.utilities(proposal))
            leave = self.rule.given_up(canvas)
        else:
            places = above(proposal.confidence, eligible, self.threshold)
            key = proposal.confidence.masked_fill(~places, -torch.inf)
            order = key.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
            rank = torch.where(places, order, -1)
            eligible = canvas.masked  # what a threshold does is learned for any block
        masked, confidence, time, at = policy_inputs(proposal, self.config)
        rank_at = torch.nn.functional.pad(rank, (0, 1), value=-1).gather(1, at)
        eligible_at = torch.nn.functional.pad(eligible, (0, 1)).gather(1, at)
        self.seen.append((canvas.row, masked, eligible_at, confidence, time, rank_at))
        return Reveal(rank >= 0, leave=leave)

    def rollouts(self, answers: Tensor, passes: Tensor) -> Rollouts:
        """All passes of all rows; a row that had finished has nothing eligible in the passes behind its end."""

        def spread(number: int, empty: float = 0) -> Tensor:
            first = self.seen[0][number]
            whole = first.new_full((self.total, len(self.seen), *first.shape[1:]), empty)
            for t, one in enumerate(self.seen):
                whole[one[0], t] = one[number]
            return whole

        expert = torch.full((self.total,), self.threshold is not None, device=answers.device)
        return Rollouts(spread(1), spread(2), spread(3), spread(4), spread(5, -1), passes, answers, expert)


def roll_out(
    model: Any, rule: UnmaskingPolicy, batch: PolicyBatch, config: GRPOConfig, generator: torch.Generator
) -> Rollouts:
    """Each prompt `config.group` times by the policy and once by each expert; rows of a prompt stand together."""
    prompts = len(batch.input_ids)
    found = []
    for threshold in (None, *config.experts):
        times = config.group if threshold is None else 1
        recorder = Recorder(rule, threshold)
        block = config.block_length if threshold is None else min(config.expert_block, config.max_new_tokens)
        decoder = Diffusion(recorder, block_length=block)
        mask = batch.attention_mask
        out = decoder.generate(
            model,
            batch.input_ids.repeat_interleave(times, 0),
            max_new_tokens=config.max_new_tokens,
            attention_mask=None if mask is None else mask.repeat_interleave(times, 0),
            generator=generator,
        )
        passes = torch.tensor(decoder.trace.row_calls, device=out.device)
        found.append((times, recorder.rollouts(out[:, batch.input_ids.shape[1] :], passes)))
    return _together(found, prompts)


def _together(found: list[tuple[int, Rollouts]], prompts: int) -> Rollouts:
    """Join roll-outs of the same prompts, with as many passes as the longest has."""
    most = max(one.masked.shape[1] for _, one in found)

    def join(name: str) -> Tensor:
        parts = []
        for times, one in found:
            value = getattr(one, name)
            if name in ("masked", "eligible", "confidence", "time", "rank"):
                more = value.new_full(
                    (len(value), most - value.shape[1], *value.shape[2:]), -1 if name == "rank" else 0
                )
                value = torch.cat([value, more], 1)
            parts.append(value.view(prompts, times, *value.shape[1:]))
        return torch.cat(parts, 1).flatten(0, 1)

    return Rollouts(*(join(one.name) for one in fields(Rollouts)))


def train_policy(
    model: Any,
    rule: UnmaskingPolicy,
    batches: Iterable[PolicyBatch],
    config: GRPOConfig,
    *,
    updates: int,
    on_update: Callable[[int, PolicyReport], None] | None = None,
) -> PolicyReport:
    """Train the network of ``rule`` in place; the state with the best mean reward over ten batches is kept.

    The rule's ``sampling`` and ``temperature`` are those of the roll-outs and of the likelihoods.

    Args:
        model: a bidirectional model, as `Diffusion` takes it; it is not changed.
        rule: the policy; its temperature is not 0.
        batches: prompts, at least ``updates`` batches of them.
        config: of the training.
        updates: batches of roll-outs.
        on_update: called after each update.

    Raises:
        LimitError: a rule without chance.
    """
    network: Any = rule.network
    if rule.temperature == 0:
        raise LimitError("train_policy", "temperature", 0, "above 0", "Training explores by the policy's draws.")
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=config.rate, betas=config.betas, weight_decay=config.weight_decay
    )
    generator = torch.Generator().manual_seed(config.seed)
    report, best = PolicyReport(), _copy(network)
    for update, batch in enumerate(islice(batches, updates)):
        network.eval()
        rollouts = roll_out(model, rule, batch, config, generator)
        size = config.group + len(config.experts)
        right = torch.tensor([batch.right(row // size, ids) for row, ids in enumerate(rollouts.answers.tolist())])
        gained = reward(right, rollouts.passes, config.max_new_tokens, config.alpha, form=config.form)
        own = ~rollouts.expert
        report.rewards.append(float(gained[own].mean()))
        report.right.append(float(right[own].double().mean()))
        report.passes.append(float(rollouts.passes[own].double().mean()))
        recent = sum(report.rewards[-_RECENT:]) / len(report.rewards[-_RECENT:])
        if recent > report.best and len(report.rewards) >= min(_RECENT, updates):
            report.best, best = recent, _copy(network)
        a = advantages(gained.view(-1, size)).flatten()
        if float(a.abs().max()) >= 1e-6:
            for group in optimizer.param_groups:
                group["lr"] = _rate(config, update, updates)
            _improve(rule, rollouts, a, config, optimizer)
        if on_update is not None:
            on_update(update + 1, report)
    network.load_state_dict(best)
    return report


def _improve(
    rule: UnmaskingPolicy, rollouts: Rollouts, a: Tensor, config: GRPOConfig, optimizer: torch.optim.Optimizer
) -> None:
    """`config.passes` steps on one batch of roll-outs; in the first of them every ratio is 1."""
    network: Any = rule.network
    old: list[Tensor] = []
    count = len(a)
    per_row = max(1, math.prod(rollouts.masked.shape[1:]))
    chunks = torch.arange(count, device=a.device).split(max(1, _CHUNK // per_row))
    for number in range(config.passes):
        optimizer.zero_grad(set_to_none=True)
        for at, index in enumerate(chunks):
            part = rollouts.rows(index)
            new = with_experts(log_likelihood(rule, part), part.expert, config.group, len(config.experts))
            if number == 0:
                old.append(new.detach())
            loss = grpo_loss(new, old[at], a[index], part.active, clip=config.clip) / count
            loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), config.max_norm)
        optimizer.step()


def _rate(config: GRPOConfig, update: int, updates: int) -> float:
    """Linear warm-up, counted in optimiser steps, then a cosine over the updates."""
    step = update * config.passes
    warm = min(1.0, (step + 1) / config.warm_up) if config.warm_up else 1.0
    return config.rate * warm * 0.5 * (1 + math.cos(math.pi * update / updates))


def _copy(network: PolicyNetwork) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}
