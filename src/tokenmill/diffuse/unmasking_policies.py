"""Learned unmasking policies: a small transformer decides which masks a pass reveals, trained by reinforcement.

"Learning Unmasking Policies for Diffusion Language Models" (arXiv 2512.09106). Decoding is a decision process: the
state is the partly masked answer, an action is a set of masks to reveal, the reward is a right answer times a factor
that falls with the number of passes. The policy reads the confidence of every place, which places are masked, and how
much time has passed; the language model stays as it is. `train_policy` learns one with GRPO.

Use it where the whole answer is one block, or where tasks that can be written in parallel and tasks that cannot are
mixed. Within short blocks a tuned constant threshold is about as good, needs no training, and its speed is easier to
set; a policy degrades on tasks that it was not trained on.
"""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from tokenmill.catalog import Card, Paper
from tokenmill.diffuse._draws import uniform
from tokenmill.diffuse._policy_network import PolicyConfig, PolicyNetwork, policy_inputs
from tokenmill.diffuse._policy_training import (
    GRPOConfig,
    PolicyBatch,
    PolicyReport,
    advantages,
    grpo_loss,
    reward,
    train_policy,
)
from tokenmill.diffuse._proposal import Proposal
from tokenmill.diffuse._reveal_laws import (
    bernoulli_choice,
    bernoulli_log_likelihood,
    dpls_choice,
    dpls_log_likelihood,
    with_best,
)
from tokenmill.diffuse._rule import Reveal, RevealRule
from tokenmill.errors import LimitError, unknown_name

if TYPE_CHECKING:
    from tokenmill.diffuse._canvas import Canvas

__all__ = [
    "CARD",
    "GRPOConfig",
    "PolicyBatch",
    "PolicyConfig",
    "PolicyNetwork",
    "PolicyReport",
    "UnmaskingPolicy",
    "advantages",
    "bernoulli_choice",
    "bernoulli_log_likelihood",
    "dpls_choice",
    "dpls_log_likelihood",
    "grpo_loss",
    "reward",
    "train_policy",
]

SAMPLINGS = ("bernoulli-argmax", "bernoulli", "dpls")

CARD = Card(
    name="Unmasking policies",
    kind="rule",
    paper=Paper(
        title="Learning Unmasking Policies for Diffusion Language Models",
        date="2025-12-09",
        arxiv="2512.09106",
        code="https://github.com/apple/ml-rl-dllm",
    ),
    summary=(
        "A one-block transformer of 0.33 million weights reads confidences, masks and time, and gives every masked "
        "place a probability of being revealed. It is trained by group-relative policy optimisation on right answers "
        "in few passes; the language model is never updated."
    ),
    claim=(
        "Matches the best hand-made rules inside short blocks and beats them when the whole answer is one block; one "
        "policy can serve another model and longer answers."
    ),
    api=(
        "UnmaskingPolicy",
        "PolicyNetwork",
        "PolicyConfig",
        "GRPOConfig",
        "PolicyBatch",
        "train_policy",
        "bernoulli_choice",
        "bernoulli_log_likelihood",
        "dpls_choice",
        "dpls_log_likelihood",
        "advantages",
        "grpo_loss",
    ),
    exact=False,
    trains=True,
    task="diffuse",
    needs=frozenset({"policy"}),
    works_with=("llama", "qwen2", "gemma3_text"),
    differs=(
        "the variant that reads the language model's hidden states is left out",
        "equal utilities are decided by confidence, where the authors' argmax takes the first place",
    ),
)


@dataclass(frozen=True)
class UnmaskingPolicy(RevealRule):
    """A trained policy as a rule: ``Diffusion(UnmaskingPolicy(network), block_length=...)``.

    Attributes:
        network: a `PolicyNetwork`, or the folder of a saved one.
        sampling: "bernoulli" as in training: a pass may reveal nothing, and a block that has had as many passes as
            places is given up (`trace.still_masked`). "bernoulli-argmax" then reveals the likeliest place. "dpls"
            draws one place and then more until a stop.
        temperature: of the utilities; 0 reveals what has a positive logit, and always the highest one.
        stop: utility of the stop of "dpls".
    """

    network: PolicyNetwork | Path | str
    _: KW_ONLY
    sampling: Literal["bernoulli-argmax", "bernoulli", "dpls"] = "bernoulli-argmax"  # appendix; evaluation
    temperature: float = 1.0  # README: 0.5 for blocks of 32, 1.0 for one block of 256
    stop: float = 0.0

    def __post_init__(self) -> None:
        if self.sampling not in SAMPLINGS:
            raise unknown_name("UnmaskingPolicy", "sampling", str(self.sampling), SAMPLINGS)
        if not 0 <= self.temperature < math.inf:
            raise LimitError("UnmaskingPolicy", "temperature", self.temperature, "at least 0")
        if math.isnan(self.stop):
            raise LimitError("UnmaskingPolicy", "stop", self.stop, "a number")
        if not isinstance(self.network, PolicyNetwork):
            object.__setattr__(self, "network", PolicyNetwork.load(self.network))
        object.__setattr__(self, "leaves_masks", self.sampling == "bernoulli" and self.temperature > 0)

    def reveal(self, proposal: Proposal) -> Reveal:
        """What the policy draws for each row."""
        rank = self.draw(proposal, self.utilities(proposal))
        return Reveal(rank >= 0, leave=self.given_up(proposal.canvas))

    def given_up(self, canvas: Canvas) -> Tensor | None:
        """Rows (B,) bool whose block has had as many passes as it has places; None where none is ever given up."""
        if not self.leaves_masks:
            return None
        return canvas.block_passes + 1 >= canvas.stop - canvas.start.clamp_min(canvas.prompt)

    def utilities(self, proposal: Proposal) -> Tensor:
        """The network's logits (B, S) float32, minus infinity outside what it sees."""
        network = self.network
        assert isinstance(network, PolicyNetwork)  # __post_init__ has loaded a folder
        masked, confidence, time, places = policy_inputs(proposal, network.config)
        with torch.no_grad():
            logits = network(masked, confidence, time)
        if proposal.canvas.trace is not None:
            proposal.canvas.trace.flops += len(masked) * network.flops(masked.shape[1])
        wide = torch.full((*proposal.eligible.shape,), -torch.inf, device=logits.device)
        return torch.nn.functional.pad(wide, (0, 1)).scatter(1, places, logits)[:, :-1]

    def draw(self, proposal: Proposal, logits: Tensor) -> Tensor:
        """The order (B, S) int64 in which places are drawn, -1 where one is not; 0 for all that have no order."""
        eligible = proposal.eligible & proposal.canvas.masked
        if self.temperature == 0:
            sure = with_best((logits > 0) & eligible, logits, eligible, proposal.confidence)
            return torch.where(sure, 0, -1)
        u, each = logits / self.temperature, proposal.canvas.generators
        if self.sampling == "dpls":
            one = torch.ones_like(eligible[:, :1])
            noise = [uniform(where, each) for where in (eligible, eligible, one)]
            return dpls_choice(u, eligible, torch.cat(noise, 1), stop=self.stop)
        chosen = bernoulli_choice(u, eligible, uniform(eligible, each))
        if self.sampling == "bernoulli-argmax":
            chosen = with_best(chosen, u, eligible, proposal.confidence)
        return torch.where(chosen, 0, -1)


def small() -> UnmaskingPolicy:
    """An untrained policy of little width."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return UnmaskingPolicy(PolicyNetwork(PolicyConfig(width=16, mlp=32, time_width=16)).eval())
