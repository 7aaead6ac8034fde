"""What every visual pruner is measured against: random tokens, the largest norms, and FastV's attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokenmill.budget import to_count
from tokenmill.errors import LimitError, unknown_name
from tokenmill.hf.shortened import Stage, StageView
from tokenmill.hf.shortened import check_stages as check_stage_layers
from tokenmill.prune._attention import LayerProbe
from tokenmill.prune._pruner import Chosen, Newline, Positions, PrunedInputs, VisualPruner, pick

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tokenmill.hf.vision import Visual


def check_choices(where: str, **given: tuple[str, Sequence[str]]) -> None:
    """Refuse a setting whose value is none of the known ones: ``check_choices("X", mode=(value, known))``."""
    for name, (value, known) in given.items():
        if value not in known:
            raise unknown_name(where, name, value, known)


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomTokens(VisualPruner):
    """Uniformly random visual tokens; the floor.

    Attributes:
        keep: share or count of each picture's tokens.
        seed: of the draws; each picture of a call draws anew.
        positions: see `DivPrune`.
        newline: see `DivPrune`.
    """

    keep: int | float = 0.25
    seed: int = 0
    positions: Positions = "keep"
    newline: Newline = "compete"

    def __post_init__(self) -> None:
        self.check_shared()

    def choose(self, model: PreTrainedModel, visual: Visual) -> Chosen:
        """See `VisualPruner.choose`."""
        del model
        # The picture's place makes the draws of a batch differ; a generator a call would repeat them.
        generator = torch.Generator().manual_seed(hash((self.seed, visual.row, int(visual.columns[0]))) % 2**62)

        def select(among: Tensor, k: int) -> Tensor:
            return torch.randperm(len(among), generator=generator)[:k].to(among.device)

        return pick("RandomTokens", visual, self.keep, self.newline, select)


@dataclass(frozen=True, slots=True, kw_only=True)
class NormTokens(VisualPruner):
    """The visual tokens of largest norm, or ZOO-Prune's walk with the norm in place of a token's sensitivity.

    Attributes:
        keep: share or count of each picture's tokens.
        diverse: walk by norm times diversity: the control for ZOO-Prune.
        positions: see `DivPrune`.
        newline: see `DivPrune`.
    """

    keep: int | float = 0.25
    diverse: bool = False
    positions: Positions = "keep"
    newline: Newline = "compete"

    def __post_init__(self) -> None:
        self.check_shared()

    def choose(self, model: PreTrainedModel, visual: Visual) -> Chosen:
        """See `VisualPruner.choose`."""
        from tokenmill.prune.zoo_prune import zoo_select

        del model
        norm = torch.linalg.vector_norm(visual.features.float(), dim=-1)

        def select(among: Tensor, k: int) -> Tensor:
            if self.diverse:
                return zoo_select(visual.features[among], norm[among], k)
            return norm[among].sort(descending=True, stable=True).indices[:k]

        return pick("NormTokens", visual, self.keep, self.newline, select)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionTopK(VisualPruner):
    """FastV's rule: before layer K, keep what the last token attended to most in layer K - 1 (mean over heads).

    Attributes:
        keep: share or count of each row's visual tokens.
        layer: K, at least 1.
    """

    keep: int | float = 0.25
    layer: int = 2

    def __post_init__(self) -> None:
        self.check_shared()
        if self.layer < 1:
            raise LimitError("AttentionTopK", "layer", self.layer, "at least 1")

    def check(self, model: PreTrainedModel) -> None:
        """Refuse a layer that the model does not have."""
        check_stage_layers("AttentionTopK", model, [self.layer])

    def prunes_inputs(self) -> bool:
        """Nothing is dropped before the decoder."""
        return False

    def stages(self, model: PreTrainedModel, pruned: PrunedInputs | None) -> Sequence[Stage]:
        """One stage, before layer K."""
        del pruned
        probe = LayerProbe(model, self.layer - 1)

        def choose(view: StageView) -> Tensor:
            weights = probe.attention(slice(-1, None))[:, :, 0].mean(1)  # (B, L)
            return top_share(weights, view.visual, self.keep)

        return (Stage(self.layer, choose, probe.watch),)


def top_share(scores: Tensor, visual: Tensor, keep: float) -> Tensor:
    """Mask (B, L) of each row's visual tokens with the largest scores (B, L), ``keep`` of them; first index in ties."""
    hidden = scores.masked_fill(~visual, -torch.inf)
    rank = hidden.sort(dim=1, descending=True, stable=True).indices.argsort(dim=1)
    counts = torch.tensor([min(to_count("keep", keep, n), n) if n else 0 for n in visual.sum(1).tolist()])
    return visual & (rank < counts.to(rank.device)[:, None])
