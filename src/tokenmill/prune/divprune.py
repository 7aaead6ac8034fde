"""DivPrune: keep the visual tokens that are least alike, chosen once before the decoder.

Alvar et al., "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models" (arXiv 2503.02175). The
smallest cosine distance among the kept tokens is made large by a farthest-first walk: start at the token whose nearest
neighbour is farthest, then add whichever token is farthest from all that were chosen. No attention maps, no text, no
calibration; one product of all pairs of tokens.

Use it as the first thing to try on photographs at 10 to 50 % of the tokens. Not on dense text, where every token
differs from every other and the question decides what matters, nor on noise, which is diverse too.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokenmill.budget import to_count
from tokenmill.catalog import Card, Paper, Reported
from tokenmill.errors import LimitError, unknown_name
from tokenmill.prune._greedy import METRICS, Metric, Similarity, as_items, squeeze, walk
from tokenmill.prune._pruner import Chosen, Newline, Positions, VisualPruner, pick

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tokenmill.hf.vision import Visual

CARD = Card(
    name="DivPrune",
    kind="selector",
    paper=Paper(
        title="DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models",
        date="2025-03",
        arxiv="2503.02175",
        code="https://github.com/vbdi/divprune",
    ),
    summary=(
        "Visual tokens are kept by a farthest-first walk over cosine distances, so that no two kept ones are alike. "
        "It happens once before the decoder and needs neither attention maps nor the question."
    ),
    claim=(
        "At a tenth of the visual tokens a LLaVA-1.5 keeps most of its accuracy on general questions about pictures, "
        "far more than pruning by attention."
    ),
    api=("DivPrune", "divprune_select", "divprune_mask", "divprune_exact"),
    exact=False,
    trains=False,
    task="vqa",
    needs=frozenset({"vision_tokens"}),
    works_with=("llava", "llava_next", "llava_onevision", "internvl", "qwen2_5_vl"),
    differs=(
        "chosen tokens are masked, where the authors' code can choose a duplicate twice",
        "distances are computed in float32, not in the model's half precision",
        "kept tokens keep their positions; positions='compact' renumbers them as the authors' code does",
    ),
    reported=Reported(table="2", setting="LLaVA-1.5-7B, 9.8 % of tokens", metric="GQA", value=56.85),
)


def divprune_select(
    features: Tensor,
    k: int | None = None,
    *,
    keep_ratio: float | None = None,
    metric: Metric = "cosine",
    center: bool = False,
    valid: Tensor | None = None,
    trace: bool = False,
    stream: bool | None = None,
) -> Any:
    """Farthest-first walk (Algorithm 1 of the paper, with chosen tokens masked).

    Args:
        features: (N, D) or (B, N, D), any float dtype; computed in float32 or wider.
        k: how many to keep; or ``keep_ratio``, a share of N.
        metric: ``"cosine"``, ``"l1"`` or ``"l2"``.
        center: subtract the mean token first.
        valid: (B, N) bool, false at padding.
        trace: also give each choice's distance to those before it (infinity for the first).
        stream: never hold the N x N product; by default above 8,192 tokens.

    Returns:
        (k,) or (B, k) int64 in the order of choice; with ``trace`` a pair with the distances.

    Raises:
        LimitError: both or neither budget, k outside [1, N], an unknown metric, NaN.
    """
    if (k is None) == (keep_ratio is None):
        raise LimitError("divprune_select", "k", k, "given, or keep_ratio, and not both")
    count = k if k is not None else to_count("divprune_select", float(keep_ratio or 0), features.shape[-2])
    if metric not in METRICS:
        raise unknown_name("divprune_select", "metric", metric, METRICS)
    x = as_items("divprune_select", features, count, valid)
    if center:
        weight = torch.ones_like(x[..., :1]) if valid is None else valid[..., None].to(x.dtype)
        x = x - (x * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True)
    similar = Similarity.of(x, metric, stream=stream)
    lonely = -similar.nearest(valid)
    if valid is not None:
        lonely = lonely.masked_fill(~valid, -torch.inf)
    order, at = walk(similar, count, lonely.argmax(-1), torch.neg, valid=valid)
    if not trace:
        return squeeze(features, order)
    distance = (1 if metric == "cosine" else 0) - at
    return squeeze(features, order), squeeze(features, distance)


def divprune_mask(features: Tensor, k: int | None = None, **settings: Any) -> Tensor:
    """The choice of `divprune_select` as a mask, (N,) or (B, N) bool."""
    order = divprune_select(features, k, **settings)
    mask = torch.zeros(features.shape[:-1], dtype=torch.bool, device=features.device)
    return mask.scatter(-1, order, True)


def divprune_exact(features: Tensor, k: int) -> tuple[Tensor, float]:
    """The set of k tokens whose smallest cosine distance is largest, by trying all sets.

    Args:
        features: (N, D) with N <= 20.
        k: at least 2.

    Returns:
        The set, (k,) int64 ascending, and its smallest distance.

    Raises:
        LimitError: more tokens, or k outside [2, N].
    """
    n = len(features)
    if n > 20:
        raise LimitError("divprune_exact", "N", n, "at most 20", "All sets are tried; use divprune_select.")
    if not 2 <= k <= n:
        raise LimitError("divprune_exact", "k", k, f"in [2, N={n}]")
    x = as_items("divprune_exact", features, k)
    distance = 1 - Similarity.of(x).matrix()[0]
    distance.fill_diagonal_(torch.inf)
    best, value = tuple(range(k)), -1.0
    for subset in combinations(range(n), k):
        at = torch.tensor(subset, device=features.device)
        here = float(distance[at][:, at].min())
        if here > value:
            best, value = subset, here
    return torch.tensor(best, device=features.device), value


@dataclass(frozen=True, slots=True, kw_only=True)
class DivPrune(VisualPruner):
    """DivPrune on a vision-language model.

    Attributes:
        keep: share or count of the visual tokens of each picture.
        metric: distance between tokens.
        center: subtract the picture's mean token first (not in the paper).
        positions: "keep" leaves gaps, "compact" renumbers as the authors' code does.
        newline: "compete" treats LLaVA-NeXT's newlines as tokens, "keep" keeps them on top of the budget.
    """

    keep: int | float = 0.098  # section 4.1
    metric: Metric = "cosine"
    center: bool = False
    positions: Positions = "keep"
    newline: Newline = "compete"

    def __post_init__(self) -> None:
        self.check_shared()
        if self.metric not in METRICS:
            raise unknown_name("DivPrune", "metric", self.metric, METRICS)

    def select(self, x: Tensor) -> Tensor:
        """Kept tokens of bare features x (B, N, D): (B, K) int64, ascending."""
        k = min(to_count("DivPrune", self.keep, x.shape[-2]), x.shape[-2])
        return divprune_select(x, k, metric=self.metric, center=self.center).sort(-1).values

    def choose(self, model: PreTrainedModel, visual: Visual) -> Chosen:
        """See `VisualPruner.choose`."""
        del model

        def select(among: Tensor, k: int) -> Tensor:
            return divprune_select(visual.features[among], k, metric=self.metric, center=self.center)

        return pick("DivPrune", visual, self.keep, self.newline, select)


def small() -> DivPrune:
    """Half of the tokens."""
    return DivPrune(keep=0.5)
