"""EntropyPrune: inside the decoder, keep the visual tokens whose queries have the highest matrix entropy.

Wang et al., "EntropyPrune: Matrix Entropy Guided Visual Token Pruning for Multimodal LLMs" (arXiv 2602.17196). Before
layer K each visual token is scored by the spectrum of its own heads-by-width query matrix; the small Gram matrix over
heads has the same spectrum as the covariance. Where to prune is read off the model: the first layer at which the
entropy of all visual tokens together collapses (`entropy_profile`, `find_ecl`).

Use it when nothing before the decoder may be dropped and attention maps are not to be had. The published score is not
normalised, so on large activations it mostly prefers small ones; ``score="trace"`` is the textbook entropy and
``score="neg_trace"`` the magnitude alone. Measure them beside each other before trusting the entropy.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from tokenmill.budget import to_count
from tokenmill.catalog import Card, Paper, Reported
from tokenmill.errors import LimitError
from tokenmill.hf.layout import attention_shape, decoder
from tokenmill.hf.shortened import Stage, StageView, check_stages
from tokenmill.hf.vision import visual_mask
from tokenmill.prune._attention import LayerProbe
from tokenmill.prune._baselines import check_choices, top_share
from tokenmill.prune._greedy import check_finite
from tokenmill.prune._pruner import PrunedInputs, VisualPruner, checked

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SCORES = ("raw", "trace", "neg_trace")
SOURCES = ("query", "key", "value", "hidden")
Score = Literal["raw", "trace", "neg_trace"]
_CHUNK = 256  # tokens whose float64 copies are held at once

CARD = Card(
    name="EntropyPrune",
    kind="selector",
    paper=Paper(
        title="EntropyPrune: Matrix Entropy Guided Visual Token Pruning for Multimodal Large Language Models",
        date="2026-02-19",
        arxiv="2602.17196",
        code="https://github.com/YahongWang1/EntropyPrune",
    ),
    summary=(
        "Visual tokens are dropped before one early decoder layer, by the matrix entropy of their query heads. "
        "The layer is where the entropy of the visual tokens collapses."
    ),
    claim="LLaVA-1.5-7B keeps 96 % of its accuracy with 68 % fewer operations.",
    api=("EntropyPrune", "token_matrix_entropy", "layer_matrix_entropy", "entropy_profile", "find_ecl", "ECL"),
    exact=False,
    trains=False,
    task="vqa",
    needs=frozenset({"vision_tokens"}),
    works_with=("llava", "llava_next", "llava_onevision", "internvl", "qwen2_5_vl"),
    differs=(
        "queries are taken before rotation, which leaves the score as it is",
        "any head width works, where the authors' code wants multiples of 128",
        "the rule that finds the collapse layer is reconstructed from the abstract",
    ),
    reported=Reported(
        table="", setting="LLaVA-1.5-7B, 68.2 % fewer FLOPs", metric="mean share of accuracy", value=96.0
    ),
)


def token_matrix_entropy(
    q: Tensor,
    *,
    center: bool = True,
    score: Score = "raw",
    eps: float = 1e-10,
    dual: bool = True,
) -> Tensor:
    """Matrix entropy of each token's (H, d) matrix.

    With R the matrix minus its mean over heads and lambda the eigenvalues of R R^T / H: ``"raw"`` is
    ``-sum lambda log lambda / log H`` as published, ``"trace"`` the same of eigenvalues that sum to 1, ``"neg_trace"``
    minus their sum.

    Args:
        q: (B, N, H, d) or (N, H, d), any float dtype; computed in float64.
        center: subtract the mean over heads.
        score: which of the three.
        eps: floor of the eigenvalues.
        dual: work on the (H, H) Gram matrix; otherwise on the (d, d) covariance.

    Returns:
        (B, N) or (N,) float64.

    Raises:
        LimitError: fewer than 2 heads, another rank, NaN (with the token's index).
    """
    check_choices("token_matrix_entropy", score=(score, SCORES))
    if q.dim() not in (3, 4):
        raise LimitError("token_matrix_entropy", "q", tuple(q.shape), "(B, N, H, d) or (N, H, d)")
    heads = q.shape[-2]
    if heads < 2:
        raise LimitError("token_matrix_entropy", "H", heads, "at least 2 heads", "One head has no matrix.")
    check_finite("token_matrix_entropy", "q", q.flatten(0, -3))
    flat = q.flatten(0, -3)
    parts = [_entropies(part, center, score, eps, dual) for part in flat.split(_CHUNK)]
    return torch.cat(parts).view(q.shape[:-2])


def _entropies(q: Tensor, center: bool, score: Score, eps: float, dual: bool) -> Tensor:
    """Scores (n,) of n tokens (n, H, d)."""
    r, heads = q.double(), q.shape[-2]
    if center:
        r = r - r.mean(-2, keepdim=True)
    if score == "neg_trace":
        return -(r * r).sum((-1, -2)) / heads
    gram = (r @ r.transpose(-1, -2) if dual else r.transpose(-1, -2) @ r) / heads
    values = torch.linalg.eigvalsh(gram)
    if score == "trace":
        total = values.clamp_min(0).sum(-1, keepdim=True)
        values = torch.where(total > 0, values / total.clamp_min(1e-300), 0.0)
    values = values.clamp_min(eps)
    return -(values * values.log()).sum(-1) / math.log(heads)


def layer_matrix_entropy(x: Tensor, *, center: bool = True, row_normalize: bool = True) -> float:
    """Von Neumann entropy of tokens (N, D) over log D, in [0, log min(N, D) / log D]; 0 when all are alike."""
    if x.dim() != 2 or x.shape[1] < 2:
        raise LimitError("layer_matrix_entropy", "x", tuple(x.shape), "(N, D) with D >= 2")
    wide = x.double()
    if center:
        wide = wide - wide.mean(0)
    if row_normalize:
        norm = torch.linalg.vector_norm(wide, dim=1, keepdim=True)
        wide = torch.where(norm > 1e-12, wide / norm.clamp_min(1e-300), 0.0)
    gram = wide @ wide.T if len(wide) <= wide.shape[1] else wide.T @ wide
    values = torch.linalg.eigvalsh(gram / len(wide)).clamp_min(0)
    total = values.sum()
    if float(total) == 0:
        return 0.0
    values = values / total
    return float(-torch.special.xlogy(values, values).sum() / math.log(x.shape[1]))


@torch.no_grad()
def entropy_profile(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Tensor:
    """`layer_matrix_entropy` of the visual tokens in front of each decoder layer and behind the last, (T + 1,) float64.

    Args:
        model: the model.
        inputs: a prompt with pictures; rows and pictures count together.

    Raises:
        LimitError: no pictures.
    """
    given = checked("entropy_profile", model, inputs)
    visual = visual_mask(model, given["input_ids"])
    found: list[float] = []
    layers = decoder(model).layers

    def note(hidden: Tensor) -> None:
        found.append(layer_matrix_entropy(hidden[visual.to(hidden.device)]))

    def before(_module: nn.Module, args: tuple[Any, ...]) -> None:
        note(args[0])

    def behind(_module: nn.Module, _args: Any, out: Any) -> None:
        note(out[0] if isinstance(out, tuple) else out)

    handles = [layer.register_forward_pre_hook(before) for layer in layers]
    handles.append(layers[-1].register_forward_hook(behind))
    try:
        model(**given, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return torch.tensor(found, dtype=torch.float64)


@dataclass(frozen=True, slots=True)
class ECL:
    """The entropy collapse layer: where to prune, the drop there, and the share of pictures that agree."""

    layer: int | None
    drop: float
    agreement: float


def find_ecl(profiles: Tensor | Iterable[Tensor], max_layer: int | None = None, *, least_drop: float = 0.01) -> ECL:
    """The layer l >= 1 with the largest fall of entropy from l - 1 to l, in the first quarter of the stack.

    Args:
        profiles: (T + 1,) of one prompt, or several.
        max_layer: last layer to look at; ``None``: a quarter of T, at least 1.
        least_drop: a smaller fall of the mean profile is none; the layer is ``None`` then.

    Raises:
        LimitError: profiles of fewer than two layers, or a bad ``max_layer``.
    """
    stack = profiles[None] if isinstance(profiles, Tensor) and profiles.dim() == 1 else torch.stack(list(profiles))
    depth = stack.shape[1] - 1
    if depth < 1:
        raise LimitError("find_ecl", "profiles", tuple(stack.shape), "at least 2 values each")
    last = max_layer if max_layer is not None else max(1, depth // 4)
    if not 1 <= last <= depth:
        raise LimitError("find_ecl", "max_layer", last, f"in [1, {depth}]")
    falls = (stack[:, :-1] - stack[:, 1:])[:, :last]  # (images, last)
    mean = falls.mean(0)
    at = int(mean.argmax())
    votes = Counter(falls.argmax(1).tolist())
    if float(mean[at]) < least_drop:
        return ECL(None, float(mean[at]), votes[at] / len(stack))
    return ECL(at + 1, float(mean[at]), votes[at] / len(stack))


def average_keep(average: float, tokens: int, layer: int, depth: int) -> int:
    """Tokens to keep from ``layer`` on, so that the layers hold ``average`` of them in the mean (section on budgets).

    Raises:
        LimitError: the first layers alone hold more.
    """
    floor = layer * tokens / depth
    keep = int((depth * average - layer * tokens) / (depth - layer))
    if average <= floor or keep < 1:
        raise LimitError(
            "EntropyPrune",
            "keep",
            average,
            f"an average above {floor:g}, with K={layer}, N={tokens}, T={depth}",
            "Lower the layer or raise the budget.",
        )
    return min(keep, tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class EntropyPrune(VisualPruner):
    """EntropyPrune inside a vision-language model.

    Attributes:
        keep: share or count of each row's visual tokens.
        layer: K, the first layer that sees fewer; its scores come from layer K - 1.
        source: what of layer K - 1 is scored: "query", "key", "value", or the "hidden" state cut into heads.
        score: "raw" as published, "trace" for the normalised entropy, "neg_trace" for the magnitude alone.
        budget: "exact": that many stay; "average": that many in the mean over all layers.
    """

    keep: int | float = 0.25
    layer: int = 2  # the released value for LLaVA-1.5
    source: Literal["query", "key", "value", "hidden"] = "query"
    score: Score = "raw"
    budget: Literal["exact", "average"] = "exact"

    def __post_init__(self) -> None:
        self.check_shared()
        if isinstance(self.layer, bool) or self.layer < 1:
            raise LimitError(
                "EntropyPrune",
                "layer",
                self.layer,
                "at least 1 (it scores queries of the layer before)",
                "Use divprune to prune before the decoder.",
            )
        check_choices(
            "EntropyPrune",
            source=(self.source, SOURCES),
            score=(self.score, SCORES),
            budget=(self.budget, ("exact", "average")),
        )

    def select(self, x: Tensor, *, heads: int = 2) -> Tensor:
        """Kept tokens of bare states x (B, N, H, d), or (B, N, D) cut into ``heads``: (B, K) int64, ascending."""
        q = x if x.dim() == 4 else x.unflatten(-1, (heads, -1))
        k = min(to_count("EntropyPrune", self.keep, q.shape[1]), q.shape[1])
        order = token_matrix_entropy(q, score=self.score).sort(dim=-1, descending=True, stable=True).indices
        return order[:, :k].sort(-1).values

    def check(self, model: PreTrainedModel) -> None:
        """Refuse a model without this layer, or with a single head."""
        depth = check_stages("EntropyPrune", model, [self.layer])
        if self.layer == depth:
            raise LimitError("EntropyPrune", "layer", self.layer, f"below the model's {depth} layers")
        shape = attention_shape(model)
        heads = shape.kv_heads if self.source in ("key", "value") else shape.heads
        if heads < 2:
            raise LimitError("EntropyPrune", "source", self.source, f"one with at least 2 heads, and it has {heads}")

    def prunes_inputs(self) -> bool:
        """Nothing is dropped before the decoder."""
        return False

    def stages(self, model: PreTrainedModel, pruned: PrunedInputs | None) -> Sequence[Stage]:
        """One stage, before layer K."""
        del pruned
        probe = LayerProbe(model, self.layer - 1)
        shape = attention_shape(model)

        def choose(view: StageView) -> Tensor:
            if self.source == "hidden":
                states = probe.hidden().unflatten(-1, (shape.heads, -1))
            else:
                states = probe.heads(self.source[0])
            scores = token_matrix_entropy(states, score=self.score)
            keep: float = self.keep
            if self.budget == "average":
                tokens = int(view.visual.sum(1).max())
                keep = average_keep(to_count("EntropyPrune", keep, tokens), tokens, self.layer, shape.layers)
            return top_share(scores, view.visual, keep)

        return (Stage(self.layer, choose, probe.watch),)


def small() -> EntropyPrune:
    """Half of the tokens, before the second layer."""
    return EntropyPrune(keep=0.5, layer=1)
