"""Information Horizon: choose carefully before the decoder, drop at random behind the layer where pictures are read.

Wang et al., "All You Need Are Random Visual Tokens? Demystifying Token Pruning in VLLMs" (arXiv 2512.07580). Past some
layer no visual token changes the answer any more; there no rule of choice can beat chance, so what is left is pruned at
random (or dropped whole), and the budget that this saves is spent on the layers before.

Use `kl_curve` and `information_horizon` to find that layer on your model and data, without labels; then a schedule. A
layer that suits one task is too early for another (reading text needs pictures longer), and a shallow model may have no
horizon before its end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from tokenmill.budget import check, to_count
from tokenmill.catalog import Card, Paper, Reported
from tokenmill.errors import LimitError
from tokenmill.hf.layout import decoder
from tokenmill.hf.shortened import Stage, StageView, check_stages
from tokenmill.prune._attention import LayerProbe
from tokenmill.prune._baselines import RandomTokens, check_choices
from tokenmill.prune._pruner import Chosen, Newline, Positions, PrunedInputs, PruneTrace, VisualPruner
from tokenmill.prune._token_information import TokenInformation, kl_curve, token_information
from tokenmill.prune.divprune import DivPrune, divprune_select

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tokenmill.hf.vision import Visual

__all__ = [
    "CARD",
    "InformationHorizon",
    "PruneSchedule",
    "TokenInformation",
    "apply_schedule",
    "dart_select",
    "information_horizon",
    "kl_curve",
    "solve_schedule",
    "token_information",
]

SELECTORS = ("divprune", "random", "drop_all", "dart")
Selector = Literal["divprune", "random", "drop_all", "dart"]

CARD = Card(
    name="Information Horizon",
    kind="selector",
    paper=Paper(
        title="All You Need Are Random Visual Tokens? Demystifying Token Pruning in VLLMs",
        date="2025-12-08",
        arxiv="2512.07580",
        code="https://github.com/YahongWang1/Information-Horizon",
    ),
    summary=(
        "Visual tokens are chosen by diversity before the decoder and pruned at random behind the layer where they "
        "stop mattering. That layer is measured on the model, without labels."
    ),
    claim="DivPrune with random pruning behind the horizon keeps 96.9 % of Qwen2.5-VL-7B at half of the tokens.",
    api=(
        "InformationHorizon",
        "PruneSchedule",
        "apply_schedule",
        "solve_schedule",
        "token_information",
        "TokenInformation",
        "kl_curve",
    ),
    exact=False,
    trains=False,
    task="vqa",
    needs=frozenset({"vision_tokens"}),
    works_with=("llava", "llava_next", "llava_onevision", "internvl", "qwen2_5_vl"),
    differs=(
        "positions are kept behind the horizon; positions_inside='compact' renumbers them as the authors' code does",
        "draws are seeded",
        "the horizon's threshold and the probe without labels are reconstructed",
    ),
    reported=Reported(
        table="", setting="Qwen2.5-VL-7B, half of the tokens", metric="mean share of accuracy", value=96.9
    ),
)


@dataclass(frozen=True, slots=True)
class PruneSchedule:
    """Stages ``(layer, keep, selector)``: before this layer runs, so many visual tokens of each row stay.

    Layer 0 prunes before the decoder. Keeps are counts, shares of the row's tokens, or 0 for none.

    Raises:
        LimitError: layers that do not ascend, keeps that grow, or an unknown selector.
    """

    stages: tuple[tuple[int, float, str | Callable[[StageView, int], Tensor]], ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(tuple(stage) for stage in self.stages))
        before, last, kept = -1, 0, None
        for layer, keep, selector in self.stages:
            if isinstance(layer, bool) or not isinstance(layer, int) or layer <= before:
                raise LimitError("PruneSchedule", "layer", layer, f"an int above {before}", "Layers ascend from 0.")
            if keep != 0:
                check("PruneSchedule", keep)
            if kept is not None and type(keep) is type(kept) and keep > kept:
                raise LimitError(
                    "PruneSchedule", "keep", keep, f"at most the {kept} that survive at layer {last}", "Keeps shrink."
                )
            if isinstance(selector, str):
                check_choices("PruneSchedule", selector=(selector, SELECTORS))
                if layer == 0 and selector == "dart":
                    raise LimitError("PruneSchedule", "selector", selector, "at a layer of at least 1")
            before, last, kept = layer, layer, keep


def solve_schedule(T: int, N: int, avg: float, deep_layer: int, deep_ratio: float) -> PruneSchedule:
    """DivPrune at layer 0 and random pruning at ``deep_layer``, so that the layers hold ``avg`` tokens in the mean.

    ``n0 = avg T / (R + rho (T - R))`` and ``n1 = rho n0`` (section 5 of the paper, solved for the counts).

    Args:
        T: number of decoder layers.
        N: visual tokens of a prompt.
        avg: tokens in the mean over layers.
        deep_layer: R in [1, T].
        deep_ratio: rho in [0, 1], the share that survives R.

    Raises:
        LimitError: more tokens than there are, or bad R and rho.
    """
    if not 1 <= deep_layer <= T:
        raise LimitError("solve_schedule", "deep_layer", deep_layer, f"in [1, T={T}]")
    if not 0 <= deep_ratio <= 1:
        raise LimitError("solve_schedule", "deep_ratio", deep_ratio, "in [0, 1]")
    first = avg * T / (deep_layer + deep_ratio * (T - deep_layer))
    n0 = round(first)
    if not 1 <= n0 <= N:
        raise LimitError("solve_schedule", "avg", avg, f"such that n0 = {first:.1f} lies in [1, N={N}]")
    n1 = min(n0, round(deep_ratio * first))
    return PruneSchedule(((0, n0, "divprune"), (deep_layer, n1, "random")))


def apply_schedule(
    model: PreTrainedModel, schedule: PruneSchedule, seed: int = 0, *, positions: Positions = "keep"
) -> AbstractContextManager[PruneTrace]:
    """Run the schedule's stages of layer 1 and deeper on every prompt inside the ``with``; see `InformationHorizon`."""
    if schedule.stages and schedule.stages[0][0] == 0:
        raise LimitError(
            "apply_schedule", "layer", 0, "at least 1 inside the model", "Use InformationHorizon(...).generate."
        )
    return InformationHorizon(schedule=schedule, seed=seed, positions_inside=positions).attach(model)


def information_horizon(curves: Tensor, tol: float = 0.01, *, layers: Sequence[int] | None = None) -> int | None:
    """First layer from which on every value stays within ``tol``; ``None`` when the last one does not.

    Args:
        curves: (n,) or (samples, n), or information (samples, n, G): size of the effect at ascending layers; samples
            are averaged, groups take their largest.
        tol: nats for `kl_curve`, probability for `token_information`.
        layers: the layers, by default 1 to n.
    """
    size = curves.abs()
    size = size.amax(-1) if size.dim() == 3 else size
    mean = size.mean(0) if size.dim() == 2 else size
    names = list(layers) if layers is not None else list(range(1, len(mean) + 1))
    if len(names) != len(mean):
        raise LimitError("information_horizon", "layers", len(names), f"{len(mean)}, one for each value")
    small = mean <= tol
    if not bool(small[-1]):
        return None
    above = (~small).nonzero()
    return names[int(above[-1]) + 1 if len(above) else 0]


@dataclass(frozen=True, slots=True, kw_only=True)
class InformationHorizon(VisualPruner):
    """DivPrune before the decoder, random pruning behind the horizon; or any schedule.

    Attributes:
        keep: tokens in the mean over layers, a share or a count of each picture's; used without a schedule.
        layer: R, the layer before which tokens are dropped at random; None means 5/8 of the depth, as 20 of 32.
        ratio: the share of the first stage's tokens that survives R; 0 drops all of them.
        schedule: stages of one's own in place of the three above.
        seed: of the random draws.
        positions: of the stage before the decoder, see `DivPrune`.
        positions_inside: of the stages inside, "compact" as in the authors' code.
        newline: see `DivPrune`.
    """

    keep: int | float = 1 / 3  # 192 of 576
    layer: int | None = None
    ratio: float = 0.13  # the released schedule
    schedule: PruneSchedule | None = None
    seed: int = 0
    positions: Positions = "keep"
    positions_inside: Positions = "keep"
    newline: Newline = "compete"

    def __post_init__(self) -> None:
        self.check_shared()
        if self.layer is not None and self.layer < 1:
            raise LimitError("InformationHorizon", "layer", self.layer, "at least 1")
        if not 0 <= self.ratio <= 1:
            raise LimitError("InformationHorizon", "ratio", self.ratio, "in [0, 1]")

    def select(self, x: Tensor) -> Tensor:
        """Tokens of bare features x (B, N, D) that pass the stage before the decoder: (B, K) int64, ascending."""
        k = min(to_count("InformationHorizon", self.keep, x.shape[-2]), x.shape[-2])
        return divprune_select(x, k).sort(-1).values

    def check(self, model: PreTrainedModel) -> None:
        """Refuse layers that the model does not have."""
        VisualPruner.check(self, model)
        inside = [layer for layer, _, _ in self._inside(model)]
        check_stages("InformationHorizon", model, inside, self.positions_inside if inside else "keep")

    def choose(self, model: PreTrainedModel, visual: Visual) -> Chosen:
        """The stage before the decoder."""
        if self.schedule is None:
            depth, layer = len(decoder(model).layers), self._deep_layer(model)
            average = to_count("InformationHorizon", self.keep, len(visual))
            first = round(average * depth / (layer + self.ratio * (depth - layer)))
            return DivPrune(keep=max(1, min(first, len(visual))), newline=self.newline).choose(model, visual)
        _, keep, selector = self.schedule.stages[0]
        if keep == 0 or selector == "drop_all":
            return Chosen(torch.zeros(0, dtype=torch.long, device=visual.features.device), asked=0)
        if callable(selector):
            raise LimitError("PruneSchedule", "selector", "a callable", "'divprune' or 'random' at layer 0")
        pruner: VisualPruner = (
            DivPrune(keep=keep, newline=self.newline)
            if selector == "divprune"
            else RandomTokens(keep=keep, newline=self.newline, seed=self.seed)
        )
        return pruner.choose(model, visual)

    def prunes_inputs(self) -> bool:
        """Whether the schedule begins before the decoder."""
        return self.schedule is None or bool(self.schedule.stages and self.schedule.stages[0][0] == 0)

    def stages(self, model: PreTrainedModel, pruned: PrunedInputs | None) -> Sequence[Stage]:
        """The stages inside the decoder."""
        del pruned
        # One generator a prompt: every prompt draws anew, the same seed draws the same.
        generator = torch.Generator().manual_seed(self.seed)
        return tuple(self._stage(model, layer, keep, rule, generator) for layer, keep, rule in self._inside(model))

    def _deep_layer(self, model: PreTrainedModel) -> int:
        depth = len(decoder(model).layers)
        return self.layer if self.layer is not None else max(1, round(0.625 * depth))

    def _inside(self, model: PreTrainedModel) -> list[tuple[int, float, Any]]:
        if self.schedule is not None:
            return [stage for stage in self.schedule.stages if stage[0] > 0]
        return [(self._deep_layer(model), self.ratio, "random")]

    def _stage(self, model: PreTrainedModel, layer: int, keep: float, rule: Any, generator: torch.Generator) -> Stage:
        probe = LayerProbe(model, layer - 1)

        def choose(view: StageView) -> Tensor:
            if keep == 0 or rule == "drop_all":
                return torch.zeros_like(view.visual)
            kept = torch.zeros_like(view.visual)
            for row, visual in enumerate(view.visual):
                at = visual.nonzero()[:, 0]
                if not len(at):
                    continue
                count = min(to_count("PruneSchedule", keep, len(at)), len(at))
                if rule == "random":
                    picked = torch.randperm(len(at), generator=generator)[:count].to(at.device)
                elif rule == "divprune":
                    picked = divprune_select(view.hidden[row, at], count)
                elif rule == "dart":
                    picked = dart_select(view, row, at, probe, count)
                else:
                    picked = rule(view, count)
                kept[row, at[picked]] = True
            return kept

        return Stage(layer, choose, probe.watch if rule == "dart" else None)


def dart_select(view: StageView, row: int, at: Tensor, probe: LayerProbe, count: int) -> Tensor:
    """DART's step: 4 visual and 4 text pivots of largest key norm (L1), then the tokens least like each pivot.

    Args:
        view: of the stage.
        row: of the batch.
        at: (n,) columns of the visual tokens.
        probe: of the layer before.
        count: how many of them stay.

    Returns:
        (count,) int64 among ``at``. Exactly that many, where the authors' code keeps 4 + 8 floor(count / 8).
    """
    norms = probe.heads("k")[row].float().abs().sum((-1, -2))
    hidden = view.hidden[row].float()
    unit = torch.nn.functional.normalize(hidden / hidden.pow(2).mean(-1, keepdim=True).sqrt().clamp_min(1e-6), dim=-1)
    text = (view.real[row] & ~view.visual[row]).nonzero()[:, 0]
    mine = norms[at].topk(min(4, count, len(at))).indices
    pivots = torch.cat([at[mine], text[norms[text].topk(min(4, len(text))).indices]])
    chosen = torch.zeros(len(at), dtype=torch.bool, device=at.device)
    chosen[mine] = True
    left = count - len(mine)
    for number, pivot in enumerate(pivots):
        share = left // (len(pivots) - number)
        like = (unit[at] @ unit[pivot]).masked_fill(chosen, torch.inf)
        picked = like.sort(stable=True).indices[:share]
        chosen[picked] = True
        left -= share
    return chosen.nonzero()[:, 0]


def small() -> InformationHorizon:
    """Half of the tokens in the mean."""
    return InformationHorizon(keep=0.5, layer=1)
