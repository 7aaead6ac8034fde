"""Token-level correlation-guided compression: how many visual tokens a page needs, and which, by the tower's own keys.

Zhang et al., "Token-level Correlation-guided Compression for Efficient Multimodal Document Understanding" (arXiv
2407.14439). Keys of a low layer that look like many others mark blank paper: their share tells how many tokens a crop
gets. The class token's attention at that layer tells which, its outliers at a deep layer are added, and features are
always the last layer's. Each crop is compressed alone, so a dense page keeps nearly all and an empty one nearly none.

Use it on scans, slides and forms, with a tower that has a class token. ``calibrate`` sets the threshold for a tower by
a blank and a full page. On photographs, where little repeats, it prunes little. It has no hard budget: give
``max_tokens``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from tokenmill.catalog import Card, Paper
from tokenmill.errors import LimitError
from tokenmill.hf.tower import tower_depth
from tokenmill.prune._attention import cls_attention, query_attention
from tokenmill.prune._baselines import check_choices
from tokenmill.prune._pruner import Chosen, Newline, Positions, VisualPruner
from tokenmill.prune._token_correlations import (
    MODES,
    Mode,
    information_density,
    iqr_outliers,
    patch_similarity,
    sample_local,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tokenmill.hf.tower import TowerLayer
    from tokenmill.hf.vision import Visual

__all__ = [
    "CARD",
    "Compressed",
    "TokenCorrelationCompressor",
    "calibrate",
    "information_density",
    "iqr_outliers",
    "patch_similarity",
    "sample_local",
]

CARD = Card(
    name="Token-level correlation-guided compression",
    kind="policy",
    paper=Paper(
        title="Token-level Correlation-guided Compression for Efficient Multimodal Document Understanding",
        date="2024-07-19",
        arxiv="2407.14439",
        code="https://github.com/JiuTian-VL/TokenCorrCompressor",
    ),
    summary=(
        "How repetitive a crop's keys are sets its number of tokens; the class token's attention says which ones stay. "
        "It needs no parameters and no training."
    ),
    claim="Documents are read about as well with fewer tokens, and each crop gets as many as its content needs.",
    api=(
        "TokenCorrelationCompressor",
        "Compressed",
        "patch_similarity",
        "information_density",
        "iqr_outliers",
        "sample_local",
        "calibrate",
    ),
    exact=False,
    trains=False,
    task="vqa",
    needs=frozenset({"vision_tokens", "vision_attention"}),
    works_with=("llava", "llava_next", "llava_onevision", "internvl", "qwen2_5_vl"),
    differs=(
        "thresholds and layers are reconstructed; the paper's code was never published",
        "topk is the default, since sampling makes answers differ from call to call",
        "a tower without a class token lets the mean query vote",
        "max_tokens and max_global are ours",
    ),
)


@dataclass(frozen=True, slots=True)
class Compressed:
    """What is left of B crops.

    Attributes:
        items: for each crop, indices (k,) int64 ascending and features (k, d).
        density: (B,) d.
        counts: (B,) tokens kept.
        ratio: kept share of all tokens.
    """

    items: tuple[tuple[Tensor, Tensor], ...]
    density: Tensor
    counts: Tensor
    ratio: float

    def as_padded(self) -> tuple[Tensor, Tensor]:
        """Features (B, most, d), zeros behind a crop's last, and (B, most) bool."""
        most = int(self.counts.max())
        width = self.items[0][1].shape[-1]
        features = self.items[0][1].new_zeros(len(self.items), most, width)
        mask = torch.zeros(len(self.items), most, dtype=torch.bool, device=features.device)
        for row, (_, x) in enumerate(self.items):
            features[row, : len(x)] = x
            mask[row, : len(x)] = True
        return features, mask


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenCorrelationCompressor(VisualPruner):
    """Compression of each crop by its own density.

    Attributes:
        low_layer: the tower's layer whose keys and class token tell density and local detail; None: a quarter.
        deep_layer: the layer whose outliers are added; None: the last but one.
        alpha: cosine from which two keys look alike.
        beta: share of look-alikes that makes a token redundant.
        iqr_factor: how far an outlier lies out.
        mode: "topk", "multinomial" or "systematic".
        min_tokens: fewest local tokens of a crop.
        max_tokens: most tokens of a crop; None: no limit.
        max_global: most outliers of a crop; None: no limit.
        bypass_global: leave the whole picture, the first view of several, as it is.
        cls: who votes: the class "token", the "mean" query, or "auto": the mean where there is no class token.
        seed: of drawing; a crop's draws depend on the seed and its number alone.
        positions: see `DivPrune`.
        newline: see `DivPrune`; the newlines stay by default.
    """

    low_layer: int | None = None
    deep_layer: int | None = None
    alpha: float = 0.7
    beta: float = 0.1
    iqr_factor: float = 1.5
    mode: Mode = "topk"
    min_tokens: int = 1
    max_tokens: int | None = None
    max_global: int | None = None
    bypass_global: bool = True
    cls: Literal["auto", "token", "mean"] = "auto"
    seed: int = 0
    positions: Positions = "keep"
    newline: Newline = "keep"

    def __post_init__(self) -> None:
        where = "TokenCorrelationCompressor"
        self.check_shared()
        if not 0 < self.alpha <= 1:
            raise LimitError(where, "alpha", self.alpha, "in (0, 1]")
        if not 0 <= self.beta < 1:
            raise LimitError(where, "beta", self.beta, "in [0, 1)")
        if not self.iqr_factor > 0:
            raise LimitError(where, "iqr_factor", self.iqr_factor, "above 0")
        if self.min_tokens < 1:
            raise LimitError(where, "min_tokens", self.min_tokens, "at least 1")
        for name in ("max_tokens", "max_global"):
            value = getattr(self, name)
            if value is not None and value < (self.min_tokens if name == "max_tokens" else 0):
                raise LimitError(where, name, value, f"at least min_tokens={self.min_tokens}, and not negative")
        check_choices(
            where,
            mode=(self.mode, MODES),
            cls=(self.cls, ("auto", "token", "mean")),
        )

    def __call__(self, x: Tensor, low: TowerLayer, deep: TowerLayer, *, first: int = 0) -> Compressed:
        """Compress bare features x (B, N, d) with queries and keys of two layers of the tower.

        ``first`` is the number of the first crop, so that parts of a batch draw as the whole does.
        """
        keep, density = self.masks(low, deep, first=first)
        items = tuple((at := row.nonzero()[:, 0], x[number, at]) for number, row in enumerate(keep))
        counts = keep.sum(-1)
        return Compressed(items, density, counts, float(counts.sum() / keep.numel()))

    def masks(self, low: TowerLayer, deep: TowerLayer, *, first: int = 0, pool: Any = None) -> tuple[Tensor, Tensor]:
        """(B, N) bool tokens that stay and the densities (B,), one crop after another to hold one N x N at a time.

        ``pool`` maps per-patch values (1, P) of one crop to those of merged cells, for towers that merge patches.
        """
        kept, found = [], []
        for crop in range(len(low.keys)):
            keys = low.keys[crop : crop + 1]
            density, redundant = information_density(patch_similarity(keys), self.alpha, self.beta)
            local, far = (self._votes(layer, crop) for layer in (low, deep))
            outlier = iqr_outliers(far, self.iqr_factor)
            if pool is not None:
                redundant = pool(redundant.float(), "min") > 0.5  # a cell is redundant when all its patches are
                outlier = pool(outlier.float(), "max") > 0.5
                local, far = pool(local, "max"), pool(far, "max")
                density = 1 - redundant.float().mean(-1)
            n = local.shape[1]
            number = (density * n).round().long().clamp(min(self.min_tokens, n), n)
            if self.max_tokens is not None:
                number = number.clamp_max(self.max_tokens)
            # A crop's own seed: its draws do not depend on how many crops come with it.
            generator = torch.Generator().manual_seed(hash((self.seed, first + crop)) % 2**62)
            keep = sample_local(local, number, self.mode, generator)
            extra = outlier & ~keep
            most = self.max_global if self.max_global is not None else n
            if self.max_tokens is not None:
                most = min(most, self.max_tokens - int(keep.sum()))
            rank = far.masked_fill(~extra, -torch.inf).sort(dim=-1, descending=True, stable=True).indices.argsort(-1)
            kept.append(keep | (extra & (rank < most)))
            found.append(density)
        return torch.cat(kept), torch.cat(found)

    def _votes(self, layer: TowerLayer, crop: int) -> Tensor:
        """Attention (1, P) of the class token, or of the mean query."""
        cls = None if layer.cls_query is None else layer.cls_query[crop : crop + 1]
        one = replace(layer, queries=layer.queries[crop : crop + 1], keys=layer.keys[crop : crop + 1], cls_query=cls)
        if self.cls == "mean" or (self.cls == "auto" and cls is None):
            return query_attention(one.queries.float().mean(2), one)
        return cls_attention(one)

    def layers_of(self, model: PreTrainedModel) -> tuple[int, int]:
        """Indices of the low and the deep layer."""
        depth = tower_depth(model)
        low = self.low_layer if self.low_layer is not None else round(0.25 * depth)
        deep = self.deep_layer if self.deep_layer is not None else max(0, depth - 2)
        return low % depth, deep % depth

    def check(self, model: PreTrainedModel) -> None:
        """Refuse layers that the tower does not have, and a vote of a class token that it does not have."""
        VisualPruner.check(self, model)
        depth = tower_depth(model)
        for name in ("low_layer", "deep_layer"):
            value = getattr(self, name)
            if value is not None and not -depth <= value < depth:
                raise LimitError("TokenCorrelationCompressor", name, value, f"in [{-depth}, {depth - 1}]")

    def tower_layers(self, model: PreTrainedModel) -> Sequence[int]:
        """Both layers."""
        return tuple(dict.fromkeys(self.layers_of(model)))

    def choose(self, model: PreTrainedModel, visual: Visual) -> Chosen:
        """See `VisualPruner.choose`."""
        low, deep = (visual.tower[at] for at in self.layers_of(model))
        kind = str(model.config.model_type)
        if kind in ("qwen2_5_vl", "internvl"):

            def pool(values: Tensor, how: str) -> Tensor:
                return _cells(visual, values, how)

            keep, _ = self.masks(low, deep, pool=pool)
            return Chosen(keep[0].nonzero()[:, 0])
        keep, _ = self.masks(low, deep)  # (tiles, P)
        if self.bypass_global and len(keep) > 1:
            keep[0] = True
        tokens = visual.pack(keep.float())
        stays = torch.where(tokens.isnan(), self.newline == "keep", tokens.nan_to_num(0) > 0.5)
        if not bool(stays.any()):
            stays[0] = True
        return Chosen(stays.nonzero()[:, 0])


def _cells(visual: Visual, values: Tensor, how: str) -> Tensor:
    """Per-patch values (1, P) -> per-token values (1, N): the largest or smallest of the patches that it merges."""
    owner = _token_of_patch(visual, values.shape[1])
    out = values.new_full((1, len(visual)), -torch.inf if how == "max" else torch.inf)
    return out.scatter_reduce(1, owner[None], values, "amax" if how == "max" else "amin")


def _token_of_patch(visual: Visual, patches: int) -> Tensor:
    """(P,) int64: the token that each patch goes into, found by packing one-hot columns, some hundred at a time."""
    device = visual.features.device
    owner = torch.zeros(patches, dtype=torch.long, device=device)
    block = 256
    for start in range(0, patches, block):
        width = min(block, patches - start)
        probe = torch.zeros(1, patches, width, device=device)
        probe[0, start + torch.arange(width, device=device), torch.arange(width, device=device)] = 1
        owner[start : start + width] = visual.pack(probe).argmax(0)
    return owner


def calibrate(
    model: PreTrainedModel,
    blank: Any,
    full: Any,
    *,
    compressor: TokenCorrelationCompressor | None = None,
    blank_density: float = 0.02,
    full_density: float = 0.6,
) -> TokenCorrelationCompressor:
    """Set ``alpha`` for a tower: the largest at which a blank page is all redundant.

    Args:
        model: the model.
        blank: inputs with a picture of blank paper.
        full: inputs with a picture full of text.
        compressor: whose other settings are used.
        blank_density: the blank page's density is at most this.
        full_density: the full page's density is at least this.

    Returns:
        The compressor with the new ``alpha``.

    Raises:
        LimitError: no threshold tells the two pages apart; the message holds both densities.
    """
    from tokenmill.hf.vision import encode

    base = compressor if compressor is not None else TokenCorrelationCompressor()
    layer = base.layers_of(model)[0]
    sims = []
    for page in (blank, full):
        with torch.no_grad():
            visuals = encode("calibrate", model, page, tower_layers=(layer,)).visuals
        sims.append(patch_similarity(visuals[0].tower[layer].keys[-1:]))
    for alpha in torch.arange(0.99, 0.0, -0.01).tolist():
        empty, dense = (float(information_density(s, alpha, base.beta)[0]) for s in sims)
        if empty <= blank_density:
            if dense >= full_density:
                return replace(base, alpha=round(alpha, 2))
            break
    else:
        empty, dense, alpha = (*(float(information_density(s, 0.01, base.beta)[0]) for s in sims), 0.01)
    raise LimitError(
        "calibrate",
        "full_density",
        full_density,
        f"reached: at alpha={alpha:.2f} the blank page has density {empty:.3f} and the full one {dense:.3f}",
        "Choose another low_layer, or lower the targets.",
    )


def small() -> TokenCorrelationCompressor:
    """The defaults."""
    return TokenCorrelationCompressor()
