"""IDPruner: maximal marginal relevance over visual tokens, important ones that do not repeat each other.

Tan et al., "IDPruner: Harmonizing Importance and Diversity in Visual Token Pruning for MLLMs" (arXiv 2602.13315).
Tokens are added one after another by lambda times importance minus (1 - lambda) times the largest cosine to those kept
so far. The importance comes from a small scorer that is trained on the frozen model (`train_scorer`), so no attention
map is needed; other sources work as well and are not the paper's.

Use it with a trained scorer when the same model serves many pictures: most of its gain is the scorer's. Without one
(``importance="norm"``) it is a cheap mix that loses most of that gain.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from tokenmill.budget import to_count
from tokenmill.catalog import Card, Paper, Reported
from tokenmill.errors import LimitError
from tokenmill.hf.tower import tower_depth
from tokenmill.prune._attention import cls_attention
from tokenmill.prune._baselines import check_choices
from tokenmill.prune._greedy import Similarity, as_items, check_weights, squeeze, walk
from tokenmill.prune._pruner import Chosen, Newline, Positions, VisualPruner, pick
from tokenmill.prune._scorer import VisionSelectorScorer, soft_topk, train_scorer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tokenmill.hf.vision import Visual

__all__ = [
    "CARD",
    "IDPruner",
    "VisionSelectorScorer",
    "greedy_dpp",
    "hopkins",
    "importance_retention",
    "mmr_select",
    "soft_topk",
    "train_scorer",
]

SOURCES = ("scorer", "cls_attention", "norm", "zoo", "random")
FLAT = 1e-5  # below this spread importance is noise

CARD = Card(
    name="IDPruner",
    kind="selector",
    paper=Paper(
        title="IDPruner: Harmonizing Importance and Diversity in Visual Token Pruning for MLLMs",
        date="2026-02-10",
        arxiv="2602.13315",
        code="https://github.com/Tencent/AngelSlim",
    ),
    summary=(
        "Visual tokens are re-ranked by maximal marginal relevance: each new one is important and unlike those kept. "
        "Importance comes from a small trained scorer on the projected tokens."
    ),
    claim="Qwen2.5-VL-7B keeps 95 % of its accuracy at a quarter of its visual tokens, and 86 % at a tenth.",
    api=(
        "IDPruner",
        "mmr_select",
        "VisionSelectorScorer",
        "train_scorer",
        "soft_topk",
        "hopkins",
        "importance_retention",
        "greedy_dpp",
    ),
    exact=False,
    trains=True,
    task="vqa",
    needs=frozenset({"vision_tokens", "scorer"}),
    works_with=("llava", "llava_next", "llava_onevision", "internvl", "qwen2_5_vl"),
    differs=(
        "decoding goes on behind the prompt's last position, where the authors' LLaVA port shifts it before its end",
        "importance from the class token, the norm or ZOO-Prune is ours, for models without a trained scorer",
    ),
    reported=Reported(table="1", setting="Qwen2.5-VL-7B, 25 % of tokens", metric="mean share of accuracy", value=95.18),
)


def mmr_select(
    features: Tensor,
    importance: Tensor,
    k: int,
    lam: float = 0.5,
    *,
    parallel_k: int = 1,
    similarity: Tensor | None = None,
    normalize: Literal["minmax", "none"] = "minmax",
    clip_negative_similarity: bool = False,
    stream: bool | None = None,
) -> Tensor:
    """Greedy maximal marginal relevance (Algorithm 1 of the paper).

    Args:
        features: (N, D) or (B, N, D).
        importance: (N,) or (B, N), any finite numbers.
        k: how many, in [1, N].
        lam: weight of importance against similarity, in [0, 1].
        parallel_k: how many candidates join in one round; 1 is exact.
        similarity: (N, N) or (B, N, N) to use instead of cosines of the features.
        normalize: ``"minmax"`` scales importance to [0, 1] for each item.
        clip_negative_similarity: count a negative cosine as 0.
        stream: see `divprune_select`.

    Returns:
        (k,) or (B, k) int64 in the order of choice; the first index wins a tie.

    Raises:
        LimitError: bad k, lam, parallel_k or shapes, NaN.
    """
    items = as_items("mmr_select", features, k)
    weights = check_weights("mmr_select", "importance", importance, items)
    if not 0 <= lam <= 1:
        raise LimitError("mmr_select", "lam", lam, "in [0, 1]")
    if isinstance(parallel_k, bool) or not isinstance(parallel_k, int) or parallel_k < 1:
        raise LimitError("mmr_select", "parallel_k", parallel_k, "an int of at least 1")
    check_choices("mmr_select", normalize=(normalize, ("minmax", "none")))
    if normalize == "minmax":
        low, high = weights.amin(-1, keepdim=True), weights.amax(-1, keepdim=True)
        if bool(((high - low) < FLAT).any()) and bool((high > low).any()):
            warnings.warn("mmr_select: importance is flat, so noise decides", stacklevel=2)
        weights = (weights - low) / (high - low + 1e-6)
    if similarity is not None:
        whole = similarity.to(items.dtype).expand(len(items), -1, -1) if similarity.dim() == 2 else similarity
        if whole.shape[-2:] != (items.shape[1],) * 2:
            raise LimitError("mmr_select", "similarity", tuple(similarity.shape), f"({items.shape[1]},) * 2")
        similar = Similarity(items, "cosine", torch.ones_like(weights), whole)
    else:
        similar = Similarity.of(items, stream=stream)

    def value(running: Tensor) -> Tensor:
        return lam * weights - (1 - lam) * (running.clamp_min(0) if clip_negative_similarity else running)

    first = weights.argmax(-1)
    if parallel_k == 1:
        order, _ = walk(similar, k, first, value)
        return squeeze(features, order)
    return squeeze(features, _rounds(similar, weights, k, parallel_k, value))


def _rounds(similar: Similarity, weights: Tensor, k: int, width: int, value: Callable[[Tensor], Tensor]) -> Tensor:
    """The best ``width`` candidates of one stale score join together; the first round goes by importance."""
    batch = len(weights)
    chosen = torch.zeros_like(weights, dtype=torch.bool)
    order: list[Tensor] = []
    running, taken = None, 0
    while taken < k:
        now = weights if running is None else value(running)
        count = min(width, k - taken)
        best = now.masked_fill(chosen, -torch.inf).sort(dim=-1, descending=True, stable=True).indices[:, :count]
        order.append(best)
        chosen.scatter_(1, best, True)
        taken += count
        for at in best.unbind(1):
            row = similar.row(at)
            running = row.clone() if running is None else running.maximum(row)
    return torch.cat(order, 1).view(batch, k)


def greedy_dpp(features: Tensor, importance: Tensor, k: int) -> Tensor:
    """Greedy MAP of the determinantal process with kernel diag(w) S diag(w): the paper's other baseline.

    Args:
        features: (N, D).
        importance: (N,), not negative.
        k: how many.

    Returns:
        (k,) int64 in the order of choice. Cholesky rows are updated, O(N k^2).
    """
    items = as_items("greedy_dpp", features, k)
    weights = check_weights("greedy_dpp", "importance", importance, items)[0]
    kernel = Similarity.of(items).matrix()[0] * weights[:, None] * weights
    left = kernel.diagonal().clone() + 1e-6
    rows = kernel.new_zeros(k, len(weights))
    order = []
    for step in range(k):
        at = int(left.argmax())
        order.append(at)
        row = (kernel[at] - rows[:step, at] @ rows[:step]) / left[at].clamp_min(1e-12).sqrt()
        rows[step] = row
        left = left - row * row
        left[order] = -torch.inf
    return torch.tensor(order, device=features.device)


def importance_retention(importance: Tensor, subset: Tensor) -> float:
    """Share of all importance (N,) that the subset (k,) holds."""
    return float(importance[subset].double().sum() / importance.double().sum())


def hopkins(features: Tensor, subset: Tensor, *, generator: torch.Generator) -> float:
    """How clustered a subset is among all tokens, in [0, 1]: near 1 clustered, 0.5 as if drawn, near 0 spread out.

    As many tokens as the subset has are drawn from all; their distances to the nearest member are compared with the
    members' own distances to each other.

    Args:
        features: (N, D).
        subset: (k,) int64 with k >= 2.
        generator: for the draw.
    """
    if len(subset) < 2:
        raise LimitError("hopkins", "subset", len(subset), "at least 2 tokens")
    distance = 1 - Similarity.of(as_items("hopkins", features, 1)).matrix()[0]
    drawn = torch.randperm(len(features), generator=generator)[: len(subset)].to(features.device)
    outside = distance[drawn][:, subset].amin(1).sum()
    among = distance[subset][:, subset].fill_diagonal_(torch.inf).amin(1).sum()
    total = outside + among
    return float(outside / total) if float(total) > 0 else 0.5


@dataclass(frozen=True, slots=True)
class IDPruner(VisualPruner):
    """IDPruner on a vision-language model.

    Attributes:
        scorer: a trained `VisionSelectorScorer`, or the folder of one; needed for importance "scorer".
        keep: share or count of each picture's tokens.
        lam: weight of importance against similarity.
        importance: "scorer" is the paper's; "cls_attention", "norm", "zoo" and "random" need no training.
        importance_mode: "raw" scores as in the authors' code, or "soft_topk" as in the paper's text.
        parallel_k: candidates that join in one round.
        clip_negative_similarity: count a negative cosine as 0.
        seed: of random importance.
        positions: see `DivPrune`.
        newline: see `DivPrune`.
    """

    scorer: VisionSelectorScorer | Path | None = None
    _: KW_ONLY
    keep: int | float = 0.25  # table 1
    lam: float = 0.5  # section 4.1
    importance: Literal["scorer", "cls_attention", "norm", "zoo", "random"] = "scorer"
    importance_mode: Literal["raw", "soft_topk"] = "raw"
    parallel_k: int = 1
    clip_negative_similarity: bool = False
    seed: int = 0
    positions: Positions = "keep"
    newline: Newline = "compete"

    def __post_init__(self) -> None:
        self.check_shared()
        check_choices(
            "IDPruner",
            importance=(self.importance, SOURCES),
            importance_mode=(self.importance_mode, ("raw", "soft_topk")),
        )
        if not 0 <= self.lam <= 1:
            raise LimitError("IDPruner", "lam", self.lam, "in [0, 1]")
        if self.parallel_k < 1:
            raise LimitError("IDPruner", "parallel_k", self.parallel_k, "at least 1")
        if isinstance(self.scorer, str | Path):
            object.__setattr__(self, "scorer", VisionSelectorScorer.load(Path(self.scorer)))

    def select(self, x: Tensor) -> Tensor:
        """Kept tokens of bare features x (B, N, D), by the scorer or by norms: (B, K) int64, ascending."""
        k = min(to_count("IDPruner", self.keep, x.shape[-2]), x.shape[-2])
        weights = torch.linalg.vector_norm(x.float(), dim=-1)
        if isinstance(self.scorer, VisionSelectorScorer):
            weights = self._scored(self.scorer, x, k)
        return self._order(x, weights, k).sort(-1).values

    def check(self, model: PreTrainedModel) -> None:
        """Refuse a missing scorer, or one of another width."""
        VisualPruner.check(self, model)
        if self.importance != "scorer":
            return
        if not isinstance(self.scorer, VisionSelectorScorer):
            raise LimitError(
                "IDPruner",
                "scorer",
                self.scorer,
                "a trained VisionSelectorScorer for importance='scorer'",
                "Pass scorer=..., or importance='norm', 'cls_attention' or 'zoo' (not the paper's setting).",
            )
        width = model.config.get_text_config().hidden_size
        if self.scorer.in_features != width:
            raise LimitError("IDPruner", "scorer.in_features", self.scorer.in_features, f"{width}, the model's width")

    def tower_layers(self, model: PreTrainedModel) -> Sequence[int]:
        """The tower's last layer for the class token's attention."""
        return (tower_depth(model) - 1,) if self.importance == "cls_attention" else ()

    def needs_projector_input(self) -> bool:
        """For ZOO-Prune's sensitivity."""
        return self.importance == "zoo"

    def choose(self, model: PreTrainedModel, visual: Visual) -> Chosen:
        """See `VisualPruner.choose`."""
        k = min(to_count("IDPruner", self.keep, len(visual)), len(visual))
        weights = self._weights(model, visual, k)
        if bool(visual.newline.any()):
            real = ~visual.newline
            weights = torch.where(real, weights, weights[real].amin())

        def select(among: Tensor, count: int) -> Tensor:
            return self._order(visual.features[among], weights[among], count)

        return pick("IDPruner", visual, self.keep, self.newline, select)

    def _weights(self, model: PreTrainedModel, visual: Visual, k: int) -> Tensor:
        if isinstance(self.scorer, VisionSelectorScorer) and self.importance == "scorer":
            return self._scored(self.scorer, visual.features[None], k)[0]
        if self.importance == "cls_attention":
            (layer,) = visual.tower.values()
            return visual.pack(cls_attention(layer))
        if self.importance == "zoo":
            from tokenmill.prune.zoo_prune import ZOOPrune

            return ZOOPrune(seed=self.seed).sensitivity(model, visual)
        if self.importance == "random":
            return torch.rand(len(visual), generator=torch.Generator().manual_seed(self.seed)).to(visual.features)
        return torch.linalg.vector_norm(visual.features.float(), dim=-1)

    def _scored(self, scorer: VisionSelectorScorer, x: Tensor, k: int) -> Tensor:
        with torch.no_grad():
            raw = scorer(x.float())
            return raw if self.importance_mode == "raw" or k >= x.shape[1] else soft_topk(raw, k)

    def _order(self, x: Tensor, weights: Tensor, k: int) -> Tensor:
        return mmr_select(
            x,
            weights,
            k,
            self.lam,
            parallel_k=self.parallel_k,
            clip_negative_similarity=self.clip_negative_similarity,
        )


def drop_count(tokens: int, drop_ratio: Any) -> int:
    """Tokens that stay when a share is dropped: round(N (1 - ratio)), at least 1 unless all are dropped.

    Raises:
        LimitError: no share in [0, 1].
    """
    number = isinstance(drop_ratio, int | float) and not isinstance(drop_ratio, bool)
    if not number or not 0 <= drop_ratio <= 1:
        raise LimitError("IDPruner", "drop_ratio", drop_ratio, "a share in [0, 1]")
    if drop_ratio == 1:
        return 0
    return max(1, round(tokens * (1 - drop_ratio)))


def small() -> IDPruner:
    """Half of the tokens, by norms."""
    return IDPruner(keep=0.5, importance="norm")
