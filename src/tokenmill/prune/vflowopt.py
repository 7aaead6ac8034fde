"""VFlowOpt: one importance map from the vision tower prunes three times, and its few settings are found by search.

"VFlowOpt: A Token Pruning Framework for LMMs with Visual Information Flow-Guided Optimization" (arXiv 2508.05211).
Attention of the tower's global tokens and the entropy of pixels rank the patches. The lowest are dropped before the
decoder, not lost but averaged into one token for each cell of the picture; two decoder layers drop more by the same
ranking. Which thresholds, cells and layers' shares: whatever keeps the last prompt token's final state as it was
(`optimize`), on a few dozen prompts without labels.

Use it when one model serves long and thirty of its prompts are at hand for a search. The tower's attention must be
computable: CLIP, SigLIP, InternViT, or a full-attention layer of Qwen2.5-VL's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokenmill.catalog import Card, Paper, Reported
from tokenmill.errors import LimitError, UnsupportedError
from tokenmill.hf.layout import decoder
from tokenmill.hf.shortened import Stage, StageView, check_stages
from tokenmill.hf.tower import feature_layer, tower_depth
from tokenmill.prune._attention import patch_attention
from tokenmill.prune._flow_search import SearchResult, VFlowParams, flow_objective, optimize
from tokenmill.prune._importance_map import importance, patch_entropy
from tokenmill.prune._layer_budget import LayerSchedule, average_ratio, solve_last_ratio
from tokenmill.prune._pruner import Chosen, Positions, PrunedInputs, VisualPruner
from tokenmill.prune._recycling import recycle_prune

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tokenmill.hf.vision import Visual

__all__ = [
    "CARD",
    "LayerSchedule",
    "SearchResult",
    "VFlowOpt",
    "VFlowParams",
    "average_ratio",
    "flow_objective",
    "importance",
    "optimize",
    "patch_entropy",
    "recycle_prune",
    "solve_last_ratio",
]

CARD = Card(
    name="VFlowOpt",
    kind="policy",
    paper=Paper(
        title="VFlowOpt: A Token Pruning Framework for LMMs with Visual Information Flow-Guided Optimization",
        date="2025-08-07",
        arxiv="2508.05211",
        code="https://github.com/sihany077/VFlowOpt",
    ),
    summary=(
        "An importance map from the vision tower prunes before the decoder and at two layers inside it, and dropped "
        "tokens are averaged into a few. Its settings are searched so that the last token's state stays as it was."
    ),
    claim="LLaVA-OneVision-7B keeps about 90 % of its accuracy at a tenth of its visual tokens, 3.8 times as fast.",
    api=(
        "VFlowOpt",
        "VFlowParams",
        "patch_entropy",
        "importance",
        "recycle_prune",
        "LayerSchedule",
        "average_ratio",
        "solve_last_ratio",
        "optimize",
        "flow_objective",
        "SearchResult",
    ),
    exact=False,
    trains=True,
    task="vqa",
    needs=frozenset({"vision_tokens", "vision_attention"}),
    works_with=("llava", "llava_next", "llava_onevision", "internvl", "qwen2_5_vl"),
    differs=(
        "pixels are brought back to 0 to 255 before their entropy, where the authors' cast wraps negative values",
        "an empty set of global tokens falls back to the most attended one instead of NaN",
        "merging weights are shifted where importance is not positive",
        "exact=True meets the budget to the token",
        "the search is Optuna's, seeded, in place of scikit-optimize's",
    ),
    reported=Reported(table="", setting="LLaVA-OneVision-7B, 10 % of tokens", metric="share of accuracy", value=90.0),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class VFlowOpt(VisualPruner):
    """VFlowOpt on a vision-language model.

    Attributes:
        keep: share of the visual tokens in the mean over the decoder's layers.
        params: t, alpha, m and the shares; found by `optimize`. r0 defaults to 1.2 times keep (at most 1).
        layers: the two layers that prune inside; None means a third and two thirds of the depth, as 9 and 18 of 28.
        recycle: average dropped tokens into cells; False drops them.
        exact: meet round(r0 N) before the decoder to the token.
        tower_layer: which layer's attention ranks; None means the one whose output the projector takes.
        positions: of the stage before the decoder, see `DivPrune`.
    """

    keep: float = 0.25
    params: VFlowParams = field(default_factory=VFlowParams)
    layers: tuple[int, int] | None = None
    recycle: bool = True
    exact: bool = True
    tower_layer: int | None = None
    positions: Positions = "keep"

    def __post_init__(self) -> None:
        self.check_shared()
        if isinstance(self.keep, int) and self.keep != 1:
            raise LimitError("VFlowOpt", "keep", self.keep, "a share in (0, 1], the budget is a mean over layers")
        if self.layers is not None:
            LayerSchedule(tuple(self.layers), (1.0, 1.0))

    def shares(self, model: PreTrainedModel) -> tuple[float, LayerSchedule]:
        """r0 and the schedule inside, with r2 solved from the budget."""
        depth = len(decoder(model).layers)
        layers = self.layers or (max(1, round(depth * 9 / 28)), max(2, round(depth * 18 / 28)))
        p, keep = self.params, float(self.keep)
        r0 = p.r0 if p.r0 is not None else min(1.0, 1.2 * keep)
        r2 = p.r2 if p.r2 is not None else solve_last_ratio(keep, r0, p.r1, layers, depth)
        return r0, LayerSchedule(tuple(layers), (p.r1, r2))

    def check(self, model: PreTrainedModel) -> None:
        """Refuse a model without these layers, or a budget that cannot be met."""
        VisualPruner.check(self, model)
        _, schedule = self.shares(model)
        check_stages("VFlowOpt", model, schedule.layers)
        if model.config.model_type == "qwen2_5_vl":
            layer, full = self._layer(model), model.config.vision_config.fullatt_block_indexes
            if layer not in full:
                raise UnsupportedError(
                    "VFlowOpt", f"layer {layer} of this tower attends in windows", f"Use tower_layer in {list(full)}."
                )

    def _layer(self, model: PreTrainedModel) -> int:
        layer = self.tower_layer if self.tower_layer is not None else feature_layer(model)
        return layer % tower_depth(model)

    def tower_layers(self, model: PreTrainedModel) -> Sequence[int]:
        """The ranking layer."""
        return (self._layer(model),)

    def scores(self, model: PreTrainedModel, visual: Visual) -> Tensor:
        """Importance (N,) of a picture's tokens; LLaVA-NeXT's newlines get 1.0 and stay."""
        (layer,) = visual.tower.values()
        entropy = None
        if self.params.alpha and visual.pixels is not None:
            entropy = patch_entropy(_grey_levels(visual.pixels), visual.pixels.shape[-1] // _side(layer.keys.shape[2]))
        if model.config.model_type == "qwen2_5_vl":
            # A frame attends within itself.
            frames = int(visual.group.max()) + 1
            per = layer.keys.shape[2] // frames
            maps = [
                importance(
                    patch_attention(replace(layer, queries=layer.queries[:, :, at], keys=layer.keys[:, :, at])),
                    None,
                    self.params.t,
                    self.params.alpha,
                )
                for at in (slice(f * per, (f + 1) * per) for f in range(frames))
            ]
            found = visual.pack(torch.cat(maps, 1))
        else:
            found = visual.pack(importance(patch_attention(layer), entropy, self.params.t, self.params.alpha))
        return torch.where(visual.newline, 1.0, found)

    def choose(self, model: PreTrainedModel, visual: Visual) -> Chosen:
        """See `VisualPruner.choose`."""
        r0, _ = self.shares(model)
        scores = self.scores(model, visual)
        count = max(1, round(r0 * len(visual)))
        if r0 == 1 or count >= len(visual):
            return Chosen(torch.arange(len(visual), device=scores.device), scores=scores)
        if not self.recycle:
            keep = scores.sort(descending=True, stable=True).indices[:count].sort().values
            return Chosen(keep, scores=scores[keep])
        cell = self._cell(visual, count)
        left = recycle_prune(visual.features, scores, visual.place, count / len(visual), cell, exact=self.exact)
        return Chosen(left.keep, left.features, left.scores)

    def _cell(self, visual: Visual, count: int) -> float:
        """The cell side, made larger where more cells than kept tokens would come out."""
        cell = float(self.params.m)
        while cell < 1e4:
            key = torch.stack([visual.place[:, 0], *(visual.place[:, 1:] / cell).floor().long().unbind(1)], 1)
            if len(key.unique(dim=0)) <= count:
                return cell
            cell *= 1.25
        return cell

    def stages(self, model: PreTrainedModel, pruned: PrunedInputs | None) -> Sequence[Stage]:
        """Two stages that rank by the scores from before the decoder."""
        if pruned is None or pruned.scores is None:
            raise LimitError(
                "VFlowOpt", "pruned", pruned, "what prepare gave", "Write attach(model, pruned), or use generate."
            )
        _, schedule = self.shares(model)
        scores = pruned.scores
        kinds: list[Stage] = []
        for layer, ratio in zip(schedule.layers, schedule.ratios, strict=True):

            def choose(view: StageView, ratio: float = ratio) -> Tensor:
                mine = scores.to(view.hidden.device).gather(1, view.columns)
                hidden = mine.masked_fill(~view.visual, -torch.inf)
                rank = hidden.sort(dim=1, descending=True, stable=True).indices.argsort(dim=1)
                number = view.visual.sum(1)
                keep = number - (number * (1 - ratio)).round().long()
                return view.visual & (rank < keep[:, None])

            kinds.append(Stage(layer, choose))
        return kinds

    def with_params(self, params: VFlowParams) -> VFlowOpt:
        """The same with other searched settings."""
        return replace(self, params=params)


def _side(patches: int) -> int:
    return round(patches**0.5)


def _grey_levels(pixels: Tensor) -> Tensor:
    """Normalised pixels back to 0..255: each picture's own range, which no choice of mean and std can change."""
    flat = pixels.float().flatten(1)
    low, high = flat.amin(1), flat.amax(1)
    span = (high - low).clamp_min(1e-6)
    return (pixels.float() - low[:, None, None, None]) / span[:, None, None, None] * 255


def small() -> VFlowOpt:
    """Half of the tokens in the mean."""
    return VFlowOpt(keep=0.5)
