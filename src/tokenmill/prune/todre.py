"""ToDRE: keep diverse visual tokens before the decoder, and drop them all where the text stops looking at them.

Li et al., "Effective Visual Token Pruning via Token Diversity and Task Relevance" (arXiv 2505.18757). Stage 1 starts at
one pivot token and adds, again and again, the token whose similarity to the chosen ones is smallest in sum. Stage 2
measures at one late layer how much attention passes between text and visual tokens; when both shares are small, the
visual tokens are gone from the next layer on, and from its KV cache.

Use it where prefill dominates and answers are short. Stage 2 reads one layer's attention once; it saves little when the
decoder is shallow. On clustered tokens the sum rule covers no better than chance: take ``objective="k_center"`` there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from tokenmill.budget import to_count
from tokenmill.catalog import Card, Paper, Reported
from tokenmill.errors import LimitError
from tokenmill.hf.layout import decoder
from tokenmill.hf.shortened import Stage, StageView
from tokenmill.hf.tower import tower_depth
from tokenmill.prune._attention import LayerProbe, cls_attention
from tokenmill.prune._baselines import check_choices
from tokenmill.prune._greedy import Similarity, as_items, check_weights, squeeze, walk
from tokenmill.prune._pruner import Chosen, Newline, Positions, PrunedInputs, VisualPruner, pick

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tokenmill.hf.vision import Visual

OBJECTIVES = ("max_sum", "k_center")
PIVOTS = ("cls", "random", "center", "farthest")
Pivot = Literal["cls", "random", "center", "farthest"]

CARD = Card(
    name="ToDRE",
    kind="selector",
    paper=Paper(
        title="ToDRE: Visual Token Pruning via Diversity and Task Awareness", date="2025-05", arxiv="2505.18757"
    ),
    summary=(
        "Before the decoder a greedy walk keeps visual tokens that are unlike in sum; inside it, all of them go once "
        "text and picture no longer attend to each other. Both parts are free of training."
    ),
    claim="LLaVA-NeXT keeps 95 % of its accuracy at a tenth of its visual tokens, at 2.6 times the speed.",
    api=("ToDRE", "select_diverse", "cross_modal_ratios", "should_drop_visual"),
    exact=False,
    trains=False,
    task="vqa",
    needs=frozenset({"vision_tokens"}),
    works_with=("llava", "llava_next", "llava_onevision", "internvl", "qwen2_5_vl"),
    differs=(
        "objective='k_center' is the first version's rule, as far as its abstract tells",
        "the pivot is the class token's favourite where the tower has a class token, and random elsewhere",
        "a batch drops its visual tokens row by row",
    ),
    reported=Reported(table="1", setting="LLaVA-NeXT-7B, 10 % of tokens", metric="mean share of accuracy", value=95.0),
)


def select_diverse(
    x: Tensor,
    k: int,
    *,
    pivot: int | Tensor | Pivot | None = None,
    scores: Tensor | None = None,
    objective: Literal["max_sum", "k_center"] = "max_sum",
    mask: Tensor | None = None,
    generator: torch.Generator | None = None,
    stream: bool | None = None,
) -> Tensor:
    """Greedy diverse selection from one pivot (section 3.2 of the paper).

    Args:
        x: (N, D) or (B, N, D), any float dtype; computed in float32 or wider.
        k: how many, in [1, N].
        pivot: the first choice: an index, (B,) indices, ``"cls"`` (largest ``scores``), ``"random"``, ``"center"``
            (nearest to the mean) or ``"farthest"`` from it. ``None``: ``"cls"`` with scores, else ``"random"``.
        scores: (N,) or (B, N), for the pivot ``"cls"``.
        objective: ``"max_sum"`` adds the smallest summed similarity, ``"k_center"`` the smallest largest one.
        mask: (B, N) bool, true at real tokens.
        generator: for a random pivot.
        stream: see `divprune_select`.

    Returns:
        (k,) or (B, k) int64 in the order of choice; the first index wins a tie. A token of norm zero counts as like
        everything, so it comes last.

    Raises:
        LimitError: k outside [1, N], an unknown pivot or objective, NaN.
    """
    check_choices("select_diverse", objective=(objective, OBJECTIVES))
    items = as_items("select_diverse", x, k, mask)
    first = _pivot(items, pivot, scores, mask, generator)
    similar = Similarity.of(items, stream=stream)
    empty = (items == 0).all(-1)

    def value(running: Tensor) -> Tensor:
        return torch.where(empty, -float(items.shape[1]) - 1, -running)

    order, _ = walk(similar, k, first, value, join="sum" if objective == "max_sum" else "max", valid=mask)
    return squeeze(x, order)


def _pivot(
    items: Tensor,
    pivot: int | Tensor | Pivot | None,
    scores: Tensor | None,
    mask: Tensor | None,
    generator: torch.Generator | None,
) -> Tensor:
    """(B,) int64, the first choice of each item."""
    batch, tokens = items.shape[:2]
    if pivot is None:
        pivot = "cls" if scores is not None else "random"
    if isinstance(pivot, Tensor) or (isinstance(pivot, int) and not isinstance(pivot, bool)):
        first = torch.as_tensor(pivot, device=items.device).expand(batch)
        if int(first.min()) < 0 or int(first.max()) >= tokens:
            raise LimitError("select_diverse", "pivot", first.tolist(), f"in [0, N={tokens})")
        return first
    check_choices("select_diverse", pivot=(str(pivot), PIVOTS))
    if pivot == "cls":
        if scores is None:
            raise LimitError("select_diverse", "scores", None, "given for pivot='cls'", "Or use pivot='random'.")
        worth = check_weights("select_diverse", "scores", scores, items)
    elif pivot == "random":
        worth = torch.rand(batch, tokens, generator=generator).to(items.device)
    else:
        unit = torch.nn.functional.normalize(items, dim=-1)
        real = torch.ones_like(unit[..., :1]) if mask is None else mask[..., None].to(unit.dtype)
        mean = (unit * real).sum(1, keepdim=True) / real.sum(1, keepdim=True)
        worth = torch.nn.functional.cosine_similarity(unit, mean, dim=-1)
        worth = worth if pivot == "center" else -worth
    return (worth if mask is None else worth.masked_fill(~mask, -torch.inf)).argmax(-1)


def cross_modal_ratios(attn: Tensor, sys_idx: Tensor, vis_idx: Tensor, txt_idx: Tensor) -> tuple[Tensor, Tensor]:
    """How much of the text's attention goes to visual tokens, and of theirs to the text (section 3.3).

    Args:
        attn: (B, H, T, T) after the softmax.
        sys_idx: (S,) int64, tokens before the picture.
        vis_idx: (V,) int64, visual tokens.
        txt_idx: (X,) int64, tokens behind it.

    Returns:
        Two (B,) in [0, 1]. A visual token cannot see text behind it, so the second is 0 for the usual order.
    """
    mean = attn.float().mean(1)  # (B, T, T)
    every = torch.cat([sys_idx, vis_idx, txt_idx])

    def share(rows: Tensor, columns: Tensor) -> Tensor:
        part = mean[:, rows]
        total = part[:, :, every].sum((1, 2))
        return torch.where(total > 0, part[:, :, columns].sum((1, 2)) / total, 0.0)

    return share(txt_idx, vis_idx), share(vis_idx, txt_idx)


def should_drop_visual(alpha_t2v: Tensor, alpha_v2t: Tensor, tau: float = 0.1) -> Tensor:
    """(B,) bool: both shares are below ``tau``."""
    return (alpha_t2v < tau) & (alpha_v2t < tau)


@dataclass(frozen=True, slots=True, kw_only=True)
class ToDRE(VisualPruner):
    """ToDRE on a vision-language model.

    Attributes:
        keep: share or count of each picture's tokens after stage 1.
        objective: "max_sum" or "k_center".
        pivot: where stage 1 starts; None takes the class token's favourite, or a random token without a class token.
        tau: stage 2 drops when both shares of attention are below it; 0 never drops.
        depth: the share of the decoder's layers behind which stage 2 may drop.
        seed: of a random pivot.
        positions: see `DivPrune`.
        newline: see `DivPrune`; the newlines stay by default.
    """

    keep: int | float = 0.1  # table 1
    objective: Literal["max_sum", "k_center"] = "max_sum"
    pivot: Literal["cls", "random", "center", "farthest"] | None = None
    tau: float = 0.1  # section 4.1
    depth: float = 0.875  # 7 L / 8
    seed: int = 0
    positions: Positions = "keep"
    newline: Newline = "keep"

    def __post_init__(self) -> None:
        self.check_shared()
        check_choices(
            "ToDRE",
            objective=(self.objective, OBJECTIVES),
        )
        if self.pivot is not None:
            check_choices("ToDRE", pivot=(self.pivot, PIVOTS))
        if not self.tau >= 0:
            raise LimitError("ToDRE", "tau", self.tau, "at least 0")
        if not 0 < self.depth <= 1:
            raise LimitError("ToDRE", "depth", self.depth, "in (0, 1]")

    def select(self, x: Tensor) -> Tensor:
        """Kept tokens of bare features x (B, N, D): (B, K) int64, ascending; a random pivot for each item."""
        k = min(to_count("ToDRE", self.keep, x.shape[-2]), x.shape[-2])
        pivot = "random" if self.pivot in (None, "cls") else self.pivot
        # One draw an item, so that an item alone starts where it starts in a batch.
        rows = [
            select_diverse(
                row, k, pivot=pivot, objective=self.objective, generator=torch.Generator().manual_seed(self.seed)
            )
            for row in x
        ]
        return torch.stack(rows).sort(-1).values

    def tower_layers(self, model: PreTrainedModel) -> Sequence[int]:
        """The tower's last layer, where it has a class token."""
        wanted = self.pivot in (None, "cls") and model.config.model_type != "qwen2_5_vl"
        return (tower_depth(model) - 1,) if wanted else ()

    def choose(self, model: PreTrainedModel, visual: Visual) -> Chosen:
        """See `VisualPruner.choose`."""
        del model
        scores = None
        for layer in visual.tower.values():
            if layer.cls_query is not None:
                # Tiles repeat the picture; the pivot is a token of the whole picture, which comes first.
                attention = cls_attention(layer)
                attention[1:] = -1
                scores = visual.pack(attention).nan_to_num(-1)
        if self.pivot == "cls" and scores is None:
            from tokenmill.errors import UnsupportedError

            raise UnsupportedError("ToDRE", "pivot='cls' needs a tower with a class token", "Use pivot='random'.")
        generator = torch.Generator().manual_seed(self.seed)

        def select(among: Tensor, k: int) -> Tensor:
            return select_diverse(
                visual.features[among],
                k,
                pivot=self.pivot,
                scores=None if scores is None else scores[among],
                objective=self.objective,
                generator=generator,
            )

        return pick("ToDRE", visual, self.keep, self.newline, select)

    def stages(self, model: PreTrainedModel, pruned: PrunedInputs | None) -> Sequence[Stage]:
        """One stage behind layer floor(depth L): measured there, dropped from the next layer on."""
        del pruned
        total = len(decoder(model).layers)
        layer = min(int(self.depth * total), total - 1)
        if self.tau == 0 or layer + 1 >= total:
            return ()
        probe = LayerProbe(model, layer)

        def choose(view: StageView) -> Tensor:
            weights = probe.attention(slice(None))  # (B, H, L, L)
            gone = [
                bool(should_drop_visual(t2v, v2t, self.tau))
                for t2v, v2t in (_row_ratios(*row) for row in zip(weights, view.visual, view.real, strict=True))
            ]
            return view.visual & ~torch.tensor(gone, device=view.visual.device)[:, None]

        return (Stage(layer + 1, choose, probe.watch),)


def _row_ratios(weights: Tensor, visual: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """`cross_modal_ratios` of one row: the text in front of its first visual token is the system's."""
    at = torch.arange(len(visual), device=visual.device)
    vis = at[visual]
    if not len(vis):
        zero = torch.zeros((), device=visual.device)
        return zero, zero
    text = real & ~visual
    ratios = cross_modal_ratios(weights[None], at[text & (at < vis[0])], vis, at[text & (at > vis[0])])
    return ratios[0][0], ratios[1][0]


def small() -> ToDRE:
    """Half of the tokens."""
    return ToDRE(keep=0.5)
