"""What visual tokens tell about an answer, layer by layer: probabilities with some of them, and without all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokenmill.errors import LimitError
from tokenmill.hf.layout import decoder
from tokenmill.hf.vision import visual_mask
from tokenmill.prune._pruner import checked

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class TokenInformation:
    """What groups of visual tokens tell about an answer.

    Attributes:
        layers: (n,) the layers.
        information: (n, G) p_group - p_text.
        p_full: probability of the answer with all visual tokens.
        p_text: (n,) with none from that layer on.
        groups: for each group, its columns in the prompt.
    """

    layers: tuple[int, ...]
    information: Tensor
    p_full: float
    p_text: Tensor
    groups: tuple[Tensor, ...]


@torch.no_grad()
def token_information(
    model: PreTrainedModel,
    inputs: Mapping[str, Any],
    target_id: int,
    layers: Sequence[int],
    window: int = 2,
    *,
    batch: int = 64,
) -> TokenInformation:
    """Information of groups of visual tokens at some layers: what the answer's probability gains when only this group
    is there from the layer on (section 3 of the paper).

    Hidden states in front of the layer are computed once; then every group is one short row: text, the group, text,
    with their own positions.

    Args:
        model: the model.
        inputs: one prompt with one picture on a square grid or any picture (groups are windows where the picture's
            tokens form a grid, else runs of ``window ** 2`` tokens).
        target_id: first token of the true answer.
        layers: in [1, T]; at T the information is 0.
        window: side of a group.
        batch: groups in one forward.

    Raises:
        LimitError: more than one row, no picture, bad layers.
    """
    given = checked("token_information", model, inputs)
    ids = given["input_ids"]
    if len(ids) != 1:
        raise LimitError("token_information", "input_ids", tuple(ids.shape), "one prompt (1, T)")
    depth = len(decoder(model).layers)
    for layer in layers:
        if not 1 <= layer <= depth:
            raise LimitError("token_information", "layers", layer, f"in [1, {depth}]")
    columns = visual_mask(model, ids)[0].nonzero()[:, 0]
    groups = _windows(columns, window)
    states = _states(model, given)
    p_full = float(_probability(model, states, torch.arange(ids.shape[1])[None], depth, target_id)[0])
    text = (~visual_mask(model, ids)[0]).nonzero()[:, 0]
    p_text, information = [], []
    for layer in layers:
        base = float(_probability(model, states, text[None], layer, target_id)[0]) if layer < depth else p_full
        p_text.append(base)
        if layer == depth:
            information.append(torch.zeros(len(groups)))
            continue
        found = torch.zeros(len(groups))
        for size in {len(g) for g in groups}:
            mine = [at for at, g in enumerate(groups) if len(g) == size]
            for start in range(0, len(mine), batch):
                part = mine[start : start + batch]
                rows = torch.stack([torch.cat([text, groups[at]]).sort().values for at in part])
                found[part] = _probability(model, states, rows, layer, target_id) - base
        information.append(found)
    return TokenInformation(tuple(layers), torch.stack(information), p_full, torch.tensor(p_text), groups)


def _windows(columns: Tensor, window: int) -> tuple[Tensor, ...]:
    """Groups of columns: windows of a square grid, else runs."""
    side = round(len(columns) ** 0.5)
    if side * side != len(columns):
        return tuple(columns.split(window * window))
    grid = columns.view(side, side)
    return tuple(
        grid[r : r + window, c : c + window].flatten().sort().values
        for r in range(0, side, window)
        for c in range(0, side, window)
    )


@dataclass(slots=True)
class _States:
    """What went into each layer of one prompt: hidden (L, D) for each, and its rotary phases."""

    hidden: list[Tensor]
    phases: tuple[Tensor, Tensor]


def _states(model: PreTrainedModel, given: Mapping[str, Any]) -> _States:
    hidden: list[Tensor] = []
    phases: list[Any] = []

    def note(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden.append(args[0][0])
        phases.append(kwargs["position_embeddings"])

    def end(_module: Any, args: tuple[Any, ...]) -> None:
        hidden.append(args[0][0])

    text = decoder(model)
    handles = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in text.layers]
    handles.append(text.norm.register_forward_pre_hook(end))
    try:
        model(**given, use_cache=False)  # pyright: ignore[reportCallIssue]
    finally:
        for handle in handles:
            handle.remove()
    return _States(hidden, phases[0])


def _probability(model: Any, states: _States, rows: Tensor, layer: int, target: int | None) -> Tensor:
    """Softmax at the last token when only the columns ``rows`` (G, n) go through layers from ``layer`` on.

    Returns (G,) of the target, or (G, V) without one.
    """
    rows = rows.to(states.hidden[0].device)
    text = decoder(model)
    hidden = states.hidden[layer][rows]  # (G, n, D)
    phases = tuple(x[0][rows] for x in states.phases)
    width = rows.shape[1]
    # Rows ascend, so plain causality is right; a mask also keeps positions with gaps from being read as packed texts.
    seen = torch.ones(width, width, dtype=torch.bool, device=hidden.device).tril()[None, None]
    mask = seen
    if text.config._attn_implementation == "eager":
        mask = torch.zeros(seen.shape, dtype=hidden.dtype, device=hidden.device)
        mask = mask.masked_fill(~seen, torch.finfo(hidden.dtype).min)
    for block in text.layers[layer:]:
        out = block(hidden, attention_mask=mask, position_embeddings=phases, past_key_values=None, use_cache=False)
        hidden = out[0] if isinstance(out, tuple) else out
    logits = model.get_output_embeddings()(text.norm(hidden[:, -1])).float()
    chances = logits.softmax(-1)
    return chances if target is None else chances[:, target]


@torch.no_grad()
def kl_curve(model: PreTrainedModel, inputs: Mapping[str, Any], layers: Sequence[int] | None = None) -> Tensor:
    """KL(P_full || P without pictures from the layer on) at the last token, in nats, (n,) float32: no labels needed.

    Args:
        model: the model.
        inputs: one prompt with pictures.
        layers: in [1, T]; ``None``: all of them. At T it is 0.
    """
    given = checked("kl_curve", model, inputs)
    ids = given["input_ids"]
    if len(ids) != 1:
        raise LimitError("kl_curve", "input_ids", tuple(ids.shape), "one prompt (1, T)")
    depth = len(decoder(model).layers)
    states = _states(model, given)
    full = _probability(model, states, torch.arange(ids.shape[1])[None], depth, None)[0]
    text = (~visual_mask(model, ids)[0]).nonzero()[:, 0]
    found = []
    for layer in layers if layers is not None else range(1, depth + 1):
        if not 1 <= layer <= depth:
            raise LimitError("kl_curve", "layers", layer, f"in [1, {depth}]")
        if layer == depth:
            found.append(0.0)
            continue
        bare = _probability(model, states, text[None], layer, None)[0]
        found.append(float((torch.special.xlogy(full, full) - torch.special.xlogy(full, bare)).sum().clamp_min(0)))
    return torch.tensor(found)
