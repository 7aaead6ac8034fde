"""VisionSelector: a small network that scores visual tokens, trained through a differentiable top-k.

Everything but the scorer is frozen. Its scores become a soft mask that sums to the budget, the tokens are multiplied by
it, and the model's own loss on the answers trains the scorer; a second loss pushes the soft mask towards a hard one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenmill.errors import LimitError
from tokenmill.hf.vision import PICTURE_INPUTS, encode
from tokenmill.models._state import load_network, save_network
from tokenmill.prune._positions import full_positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_STEPS = 64  # bisections; 2^-64 of the bracket


class VisionSelectorScorer(nn.Module):
    """Score of a token: the mean over keys of its query's scaled products, in O(N h).

    Args:
        in_features: width D of the tokens, the decoder's.
        hidden: width h of queries and keys; ``None`` means D // 2, the authors' choice.
    """

    def __init__(self, in_features: int, hidden: int | None = None) -> None:
        super().__init__()
        self.in_features = in_features
        self.hidden = hidden if hidden is not None else in_features // 2
        if in_features < 1 or self.hidden < 1:
            raise LimitError("VisionSelectorScorer", "hidden", self.hidden, "at least 1")
        self.query = nn.Linear(in_features, self.hidden)
        self.key = nn.Linear(in_features, self.hidden)
        for layer in (self.query, self.key):
            nn.init.normal_(layer.weight, std=1e-4)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Raw scores (B, N) of tokens (B, N, D): s_i = q_i . mean_j(k_j) / sqrt(h)."""
        if x.dim() != 3 or x.shape[-1] != self.in_features:
            raise LimitError("VisionSelectorScorer", "x", tuple(x.shape), f"(B, N, {self.in_features})")
        return (self.query(x) @ self.key(x).mean(1)[:, :, None])[..., 0] / self.hidden**0.5

    def save(self, folder: Path) -> None:
        """Write ``scorer.safetensors`` and ``scorer.json`` into a folder, each whole or not at all."""
        save_network(folder, "scorer", self, {"in_features": self.in_features, "hidden": self.hidden})

    @classmethod
    def load(cls, folder: Path) -> VisionSelectorScorer:
        """Read what `save` wrote.

        Raises:
            LimitError: the folder has no scorer.
        """
        settings, weights = load_network("VisionSelectorScorer.load", folder, "scorer")
        made = cls(**settings)
        made.load_state_dict(weights)
        return made.eval()


class _SoftTopK(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, k: int) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        wide = scores.double()
        low = -wide.amax(-1, keepdim=True) - 10
        high = -wide.amin(-1, keepdim=True) + 10
        for _ in range(_STEPS):
            middle = (low + high) / 2
            more = torch.sigmoid(wide + middle).sum(-1, keepdim=True) < k
            low, high = torch.where(more, middle, low), torch.where(more, high, middle)
        p = torch.sigmoid(wide + (low + high) / 2)
        ctx.save_for_backward(p)
        return p.to(scores.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (p,) = ctx.saved_tensors
        slope = p * (1 - p)
        wide = grad.double()
        mean = (slope * wide).sum(-1, keepdim=True) / slope.sum(-1, keepdim=True).clamp_min(1e-30)
        return (slope * (wide - mean)).to(grad.dtype), None


def soft_topk(scores: Tensor, k: int) -> Tensor:
    """Soft mask p = sigmoid(s + t) with the shift t at which it sums to k (DiffTopK); gradients are implicit.

    Args:
        scores: (B, N).
        k: in (0, N).

    Returns:
        (B, N) in (0, 1), each row sums to k.

    Raises:
        LimitError: k outside (0, N).
    """
    if not 0 < k < scores.shape[-1]:
        raise LimitError("soft_topk", "k", k, f"in (0, N={scores.shape[-1]})", "With all tokens there is no choice.")
    out: Tensor = _SoftTopK.apply(scores, k)  # pyright: ignore[reportAssignmentType]
    return out


@dataclass(frozen=True, slots=True)
class ScorerTraining:
    """What a training reached: steps, seconds, and the mean loss of the answers in its first and last tenth."""

    steps: int
    seconds: float
    first_loss: float
    last_loss: float


def train_scorer(
    model: PreTrainedModel,
    data: Iterable[Mapping[str, Any]],
    *,
    budget: float = 0.2,
    steps: int,
    rate: float = 5e-5,
    sharpen: tuple[float, float] = (0.1, 2.0),
    hidden: int | None = None,
    seed: int = 0,
    on_step: Callable[[int, float], None] | None = None,
) -> tuple[VisionSelectorScorer, ScorerTraining]:
    """Train a scorer on a frozen model (VisionSelector's recipe: answers' loss + annealed binary cross-entropy).

    Args:
        model: frozen; its forward must take ``mm_encoder_outputs``.
        data: batches of inputs with ``labels`` (B, T), -100 where nothing is to be answered; repeated as needed.
        budget: share of each picture's tokens that the soft mask sums to.
        steps: optimiser steps.
        rate: peak learning rate, cosine after 3 % of warm-up.
        sharpen: weight of the second loss at the first and at the last step. It confirms what the scorer prefers
            already, so on a model whose answers suffer little from the soft mask give it less.
        hidden: width of the scorer.
        seed: of the scorer's weights.
        on_step: called with the step and the loss.

    Returns:
        The scorer in eval mode, and what happened.

    Raises:
        LimitError: bad budget, steps, weights or data.
    """
    _check_training(budget, steps, sharpen)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        scorer = VisionSelectorScorer(model.config.get_text_config().hidden_size, hidden).to(model.device)
    optimizer = torch.optim.AdamW(scorer.parameters(), lr=rate, weight_decay=0.0)
    losses: list[float] = []
    began = time.monotonic()
    with _frozen(model):
        for step, batch in enumerate(islice(_again(data), steps)):
            done = step / steps
            warm = min(1.0, (step + 1) / max(1, round(0.03 * steps)))
            for group in optimizer.param_groups:
                group["lr"] = rate * warm * 0.5 * (1 + math.cos(math.pi * done))
            answered, mask = _losses(model, scorer, batch, budget)
            loss = answered + (sharpen[0] + (sharpen[1] - sharpen[0]) * done) * mask
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            losses.append(float(answered.detach()))
            if on_step is not None:
                on_step(step + 1, losses[-1])
    tenth = max(1, len(losses) // 10)
    first, last = (sum(part) / len(part) for part in (losses[:tenth], losses[-tenth:]))
    return scorer.eval(), ScorerTraining(steps, time.monotonic() - began, first, last)


def _check_training(budget: float, steps: int, sharpen: tuple[float, float]) -> None:
    if not 0 < budget < 1:
        raise LimitError("train_scorer", "budget", budget, "a share in (0, 1)")
    if steps < 1:
        raise LimitError("train_scorer", "steps", steps, "at least 1")
    if len(sharpen) != 2 or min(sharpen) < 0:
        raise LimitError("train_scorer", "sharpen", sharpen, "two weights that are not negative")


def _again(data: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """The batches over and over."""
    while True:
        empty = True
        for batch in data:
            empty = False
            yield batch
        if empty:
            raise LimitError("train_scorer", "data", "empty", "at least one batch")


@contextmanager
def _frozen(model: PreTrainedModel) -> Generator[None, None, None]:
    """Inside, no weight of the model wants a gradient."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    for parameter, _ in before:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, wanted in before:
            parameter.requires_grad_(wanted)


def _losses(model: Any, scorer: VisionSelectorScorer, batch: Mapping[str, Any], budget: float) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the answers on softly masked tokens, and binary cross-entropy of the soft to the hard mask."""
    inputs = {k: v for k, v in batch.items() if k != "labels" and v is not None}
    with torch.no_grad():
        encoded = encode("train_scorer", model, inputs)
    masked, apart = [], []
    for visual in encoded.visuals:
        tokens = visual.features.float()
        k = min(max(1, round(budget * len(tokens))), len(tokens) - 1)
        raw = scorer(tokens[None])
        soft = soft_topk(raw, k)
        hard = torch.zeros_like(soft).scatter(1, raw.topk(k).indices, 1.0)
        apart.append(F.binary_cross_entropy(soft.clamp(1e-6, 1 - 1e-6), hard))
        masked.append((tokens * soft[0, :, None]).to(visual.features.dtype))
    passed = {k: v for k, v in inputs.items() if k not in PICTURE_INPUTS}
    positions = full_positions(model, inputs)
    logits = model(
        **{**passed, "position_ids": positions}, mm_encoder_outputs=encoded.outputs(masked), use_cache=False
    ).logits
    labels = batch["labels"]
    asked = labels[:, 1:] != -100
    return F.cross_entropy(logits[:, :-1][asked].float(), labels[:, 1:][asked]), torch.stack(apart).mean()
