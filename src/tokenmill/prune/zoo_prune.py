"""ZOO-Prune: keep diverse visual tokens, weighted by how strongly the projector answers to a small push.

Kim et al., "Training-Free Token Pruning via Zeroth-Order Gradient Estimation in Vision-Language Models" (arXiv
2509.24837). Each token before the projector is pushed along random directions; the mean size of the answer is its
sensitivity. A greedy walk multiplies it with one minus the largest cosine to the chosen tokens.

Use it where plain diversity wastes its budget on background. The published estimator costs 2 m projector calls a token
(`estimator="fd"`); for a projector of two linear layers ``"frobenius"`` gives the same ranking in closed form for a
hundredth of that. Compare with the norm of the token, which on some models ranks as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from tokenmill.catalog import Card, Paper, Reported
from tokenmill.errors import LimitError, UnsupportedError
from tokenmill.hf.tower import projector as projector_of
from tokenmill.prune._baselines import check_choices
from tokenmill.prune._greedy import Similarity, as_items, check_finite, check_weights, squeeze, walk
from tokenmill.prune._pruner import Chosen, Newline, Positions, VisualPruner, pick

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tokenmill.hf.vision import Visual

ESTIMATORS = ("fd", "jvp", "frobenius")
COMBINE = ("mul", "sum", "sens", "div")
DIRECTIONS = ("shared", "independent")
Estimator = Literal["fd", "jvp", "frobenius"]
Combine = Literal["mul", "sum", "sens", "div"]

CARD = Card(
    name="ZOO-Prune",
    kind="selector",
    paper=Paper(
        title="Training-Free Token Pruning via Zeroth-Order Gradient Estimation in Vision-Language Models",
        date="2025-09-29",
        arxiv="2509.24837",
        code="https://github.com/AIM-SKKU/ZOO-Prune",
    ),
    summary=(
        "A token's sensitivity is how far the projector's output moves when its input is pushed. "
        "A greedy walk keeps tokens that are both sensitive and unlike the ones already kept."
    ),
    claim="LLaVA-NeXT keeps 95 % of its accuracy at a eighteenth of its visual tokens, 2.3 times as fast.",
    api=("ZOOPrune", "zoo_sensitivity", "zoo_select"),
    exact=False,
    trains=False,
    task="vqa",
    needs=frozenset({"vision_tokens", "projector"}),
    works_with=("llava", "llava_next", "llava_onevision", "internvl", "qwen2_5_vl"),
    differs=(
        "the default estimator on a model is the closed Frobenius form where the projector has one, else jvp",
        "the projector always runs in float32; the authors' perturbations are lost in half precision",
        "a tile's unused budget goes to the other tiles, and newlines are told by their value",
    ),
    reported=Reported(table="", setting="LLaVA-1.5-7B, 64 of 576 tokens", metric="mean share of accuracy", value=95.20),
)


def zoo_sensitivity(
    x: Tensor,
    projector: Callable[[Tensor], Tensor],
    m: int = 64,
    h: float = 1e-2,
    *,
    estimator: Estimator = "fd",
    directions: Literal["shared", "independent"] = "shared",
    generator: torch.Generator | None = None,
    chunk: int = 4,
) -> Tensor:
    """Sensitivity of the projector's output to each token: E_u |J(x) u| over unit directions u (Prop. 3.1).

    Args:
        x: (N, d_v), or (N, p, d_v) when a token is merged from p patches; the same push goes to each of them.
        projector: in eval mode, maps (*, d_v) -> (*, d_l); with patches (n, p, d_v) -> (n, d_l).
        m: how many directions.
        h: length of a push, for ``"fd"``.
        estimator: ``"fd"`` central differences as published, ``"jvp"`` exact directional derivatives,
            ``"frobenius"`` sqrt(|J|_F^2 / d_v) in closed form, an upper bound that needs Linear - activation - Linear.
        directions: one set for all tokens, or one for each.
        generator: for the directions; ``None`` draws from a fixed seed.
        chunk: directions in one call of the projector.

    Returns:
        (N,) float32 (float64 for float64 input).

    Raises:
        LimitError: bad m, h or chunk, NaN in ``x``, a projector in train mode.
        UnsupportedError: ``"frobenius"`` on another projector.
    """
    check_choices("zoo_sensitivity", estimator=(estimator, ESTIMATORS), directions=(directions, DIRECTIONS))
    _check_sensitivity(x, projector, m=m, chunk=chunk, h=h)
    wide = x if x.dtype == torch.float64 else x.float()
    run = _widened(projector, wide.dtype)
    with torch.no_grad():
        if estimator == "frobenius":
            if x.dim() != 2:
                raise UnsupportedError("zoo_sensitivity", "estimator='frobenius' of merged patches", "Use 'jvp'.")
            return _frobenius(wide, run)
        if generator is None:
            generator = torch.Generator(device=x.device).manual_seed(0)
        total = wide.new_zeros(len(wide))
        for start in range(0, m, chunk):
            count = min(chunk, m - start)
            shape = (1 if directions == "shared" else len(wide), wide.shape[-1])
            # One draw a direction, so that the size of a chunk changes nothing.
            u = torch.stack(
                [torch.randn(shape, generator=generator, dtype=wide.dtype, device=wide.device) for _ in range(count)]
            )
            u = (u / torch.linalg.vector_norm(u, dim=-1, keepdim=True)).expand(count, len(wide), -1)  # (c, N, d_v)
            push = u if wide.dim() == 2 else u[:, :, None].expand(-1, -1, wide.shape[1], -1)
            total += _answers(run, wide, push, h, estimator).sum(0)
        return total / m


def _check_sensitivity(x: Tensor, projector: Any, *, m: int, chunk: int, h: float) -> None:
    """Refuse bad arguments of `zoo_sensitivity`."""
    for name, value in (("m", m), ("chunk", chunk)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise LimitError("zoo_sensitivity", name, value, "an int of at least 1")
    if not h > 0:
        raise LimitError("zoo_sensitivity", "h", h, "above 0")
    if x.dim() not in (2, 3):
        raise LimitError("zoo_sensitivity", "x", tuple(x.shape), "(N, d_v) or (N, patches, d_v)")
    check_finite("zoo_sensitivity", "x", x)
    if isinstance(projector, nn.Module) and projector.training:
        raise LimitError("zoo_sensitivity", "projector", "in train mode", "in eval mode", "Call projector.eval().")


def _answers(run: Callable[[Tensor], Tensor], x: Tensor, push: Tensor, h: float, estimator: Estimator) -> Tensor:
    """Sizes (c, N) of the projector's answers to c pushes of every token."""
    parts = _two_linears(run) if estimator == "jvp" and x.dim() == 2 else None
    if parts is not None:
        # J u = W2 (act'(W1 x + b1) * W1 u); a direction that all tokens share is mapped once.
        first, act, second = parts
        inner = first(x)
        slope: Any = torch.func.jvp(act, (inner,), (torch.ones_like(inner),))[1]
        mapped = (push[:, :1] if push.stride(1) == 0 else push) @ first.weight.T  # (c, 1 or N, d_l)
        return torch.linalg.vector_norm((slope * mapped) @ second.weight.T, dim=-1)
    # The projector takes tokens as one list: with patches its first axis is tokens. Expanded views are no primals.
    flat, moved = x.expand(len(push), *x.shape).flatten(0, 1).clone(), push.flatten(0, 1).clone()
    if estimator == "jvp":
        answer: Any = torch.func.jvp(run, (flat,), (moved,))[1]
    else:
        answer = (run(flat + h * moved) - run(flat - h * moved)) / (2 * h)
    return torch.linalg.vector_norm(answer, dim=-1).view(len(push), -1)


def _widened(projector: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """The projector in this dtype; half precision would round the pushes away."""
    if not isinstance(projector, nn.Module):
        return projector
    if all(p.dtype == dtype for p in projector.parameters()):
        return projector
    return deepcopy(projector).to(dtype=dtype)


def _two_linears(projector: Any) -> tuple[nn.Linear, Callable[[Tensor], Tensor], nn.Linear] | None:
    """The parts of a Linear - activation - Linear projector (LLaVA's, or a Sequential)."""
    if isinstance(projector, nn.Sequential) and len(projector) == 3:
        first, act, second = projector
    else:
        names = ("linear_1", "act", "linear_2")
        if not all(hasattr(projector, name) for name in names) or len(list(projector.children())) != 3:
            return None
        first, act, second = (getattr(projector, name) for name in names)
    if not isinstance(first, nn.Linear) or not isinstance(second, nn.Linear):
        return None
    return first, act, second


def _frobenius(x: Tensor, projector: Any) -> Tensor:
    """sqrt(|J|_F^2 / d_v): with g the activation's derivative, |J|_F^2 = g^T ((W2^T W2) * (W1 W1^T)) g."""
    parts = _two_linears(projector)
    if parts is None:
        raise UnsupportedError(
            "zoo_sensitivity",
            f"estimator='frobenius' needs Linear - activation - Linear, not {type(projector).__name__}",
            "Use estimator='jvp'.",
        )
    first, act, second = parts
    gram = (second.weight.T @ second.weight) * (first.weight @ first.weight.T)  # (d_l, d_l)
    inner = first(x)
    slope: Any = torch.func.jvp(act, (inner,), (torch.ones_like(inner),))[1]
    return ((slope @ gram) * slope).sum(-1).clamp_min(0).div(x.shape[-1]).sqrt()


def zoo_select(
    z: Tensor,
    sensitivity: Tensor,
    k: int,
    *,
    combine: Combine = "mul",
    center: bool = False,
    group: Tensor | None = None,
    stream: bool | None = None,
) -> Tensor:
    """Greedy walk by sensitivity times diversity (steps 4 and 5 of the method).

    Args:
        z: (N, D) or (B, N, D), projected features.
        sensitivity: (N,) or (B, N); min-max normalised for each item, all ones when it is flat.
        k: how many, in [1, N].
        combine: ``"mul"`` product, ``"sum"``, ``"sens"`` sensitivity alone, ``"div"`` diversity alone with
            DivPrune's start.
        center: subtract the mean token before cosines (not in the paper).
        group: (N,) int64, one item only: tiles or frames that are normalised and walked each alone; the budget is
            shared equally, what a small group cannot use goes to the others.
        stream: see `divprune_select`.

    Returns:
        (k,) or (B, k) int64 in the order of choice (group after group).

    Raises:
        LimitError: bad k or shapes, NaN, fewer kept tokens than groups.
    """
    check_choices("zoo_select", combine=(combine, COMBINE))
    items = as_items("zoo_select", z, k)
    weights = check_weights("zoo_select", "sensitivity", sensitivity, items)
    if group is not None:
        if z.dim() != 2 or group.shape != z.shape[:1]:
            raise LimitError("zoo_select", "group", tuple(group.shape), f"(N={z.shape[-2]},) with one item")
        members = [(group == g).nonzero()[:, 0] for g in group.unique()]
        counts = share_evenly(k, [len(x) for x in members])
        parts = [
            at[zoo_select(z[at], sensitivity[at], n, combine=combine, center=center, stream=stream)]
            for at, n in zip(members, counts, strict=True)
            if n
        ]
        return torch.cat(parts)
    if combine == "sens":
        return squeeze(z, weights.sort(dim=-1, descending=True, stable=True).indices[:, :k])
    low, high = weights.amin(-1, keepdim=True), weights.amax(-1, keepdim=True)
    scaled = torch.where(high > low, (weights - low) / (high - low + 1e-8), 1.0)
    if center:
        items = items - items.mean(1, keepdim=True)
    similar = Similarity.of(items, stream=stream)
    if combine == "div":
        order, _ = walk(similar, k, (-similar.nearest()).argmax(-1), torch.neg)
        return squeeze(z, order)

    def value(running: Tensor) -> Tensor:
        return scaled * (1 - running) if combine == "mul" else scaled + (1 - running)

    order, _ = walk(similar, k, scaled.argmax(-1), value)
    return squeeze(z, order)


def share_evenly(k: int, sizes: list[int]) -> list[int]:
    """``k`` split over groups as evenly as their sizes allow; the first groups get what is left over.

    Raises:
        LimitError: fewer than one for each group.
    """
    if k < len(sizes):
        raise LimitError("zoo_select", "k", k, f"at least {len(sizes)}, the number of groups", "Or set per_tile=False.")
    counts = [0] * len(sizes)
    left = min(k, sum(sizes))
    while left:
        open_groups = [at for at, size in enumerate(sizes) if counts[at] < size]
        each, extra = divmod(left, len(open_groups))
        for place, at in enumerate(open_groups):
            more = min(each + (place < extra), sizes[at] - counts[at])
            counts[at] += more
            left -= more
    return counts


@dataclass(frozen=True, slots=True, kw_only=True)
class ZOOPrune(VisualPruner):
    """ZOO-Prune on a vision-language model.

    Attributes:
        keep: share or count of each picture's tokens.
        estimator: "fd" as published, "jvp", "frobenius", or "auto": the closed form where the projector has one.
        m: random directions, for "fd" and "jvp".
        h: length of a push, for "fd".
        combine: "mul" as published, "sum", "sens" or "div".
        per_tile: walk each tile (or frame) alone with its share of the budget, as published for LLaVA-NeXT.
        center: subtract the mean token before cosines (not in the paper).
        seed: of the directions.
        positions: see `DivPrune`.
        newline: see `DivPrune`; the newlines stay by default, as published.
    """

    keep: int | float = 0.1112  # 64 of 576, table 1
    estimator: Literal["auto", "fd", "jvp", "frobenius"] = "auto"
    m: int = 64  # section 4.1
    h: float = 0.01
    combine: Combine = "mul"
    per_tile: bool = True
    center: bool = False
    seed: int = 0
    positions: Positions = "keep"
    newline: Newline = "keep"

    def __post_init__(self) -> None:
        self.check_shared()
        check_choices(
            "ZOOPrune",
            estimator=(self.estimator, ("auto", *ESTIMATORS)),
            combine=(self.combine, COMBINE),
        )
        if self.m < 1:
            raise LimitError("ZOOPrune", "m", self.m, "at least 1")
        if not (self.h > 0 and math.isfinite(self.h)):
            raise LimitError("ZOOPrune", "h", self.h, "above 0 and finite")

    def select(self, x: Tensor) -> Tensor:
        """Kept tokens of bare features x (B, N, D), with their norms in place of sensitivities: (B, K) ascending."""
        from tokenmill.budget import to_count

        k = min(to_count("ZOOPrune", self.keep, x.shape[-2]), x.shape[-2])
        norms = torch.linalg.vector_norm(x.float(), dim=-1)
        return zoo_select(x, norms, k, combine=self.combine, center=self.center).sort(-1).values

    def needs_projector_input(self) -> bool:
        """Always: the projector is what is pushed."""
        return True

    def sensitivity(self, model: PreTrainedModel, visual: Visual) -> Tensor:
        """(N,) of one picture; minus infinity at newlines."""
        if visual.before is None:
            raise UnsupportedError(
                "ZOOPrune",
                "tiles that are resized behind the projector have no single input a token",
                "Use pictures that fit the tiles, or another method.",
            )
        module = projector_of(model)
        estimator: Any = self.estimator
        merged = visual.before.shape[1] > 1
        if estimator == "auto":
            estimator = "frobenius" if not merged and _two_linears(module) is not None else "jvp"
        x = visual.before if merged else visual.before[:, 0]
        generator = torch.Generator(device=x.device).manual_seed(self.seed)
        wide = _widened(module, torch.float32)

        def merge(patches: Tensor) -> Tensor:
            return wide(patches.flatten(0, 1))

        run = merge if merged else wide
        found = zoo_sensitivity(x, run, self.m, self.h, estimator=estimator, generator=generator)
        return found.masked_fill(visual.newline, -torch.inf)

    def choose(self, model: PreTrainedModel, visual: Visual) -> Chosen:
        """See `VisualPruner.choose`."""
        scores = self.sensitivity(model, visual)
        low = scores[~visual.newline].amin()
        scores = scores.masked_fill(visual.newline, low)

        def select(among: Tensor, k: int) -> Tensor:
            groups = visual.group[among]
            tiles = len(groups.unique())
            group = groups if self.per_tile and tiles > 1 and k >= tiles and self.newline == "keep" else None
            return zoo_select(
                visual.features[among], scores[among], k, combine=self.combine, center=self.center, group=group
            )

        return pick("ZOOPrune", visual, self.keep, self.newline, select)


def small() -> ZOOPrune:
    """Half of the tokens."""
    return ZOOPrune(keep=0.5)
