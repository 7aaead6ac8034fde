"""Positions of a pruned prompt: those of the whole prompt with gaps, or closed up."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from tokenmill.hf.inputs import split_model_kwargs, with_positions


def full_positions(model: Any, given: Mapping[str, Any]) -> Tensor:
    """Positions of the whole prompt, (B, T) or (rows, B, T), without a trace on the model."""
    ids = given["input_ids"]
    inputs = split_model_kwargs(model, {k: v for k, v in given.items() if k != "input_ids"})
    inner = model.model
    noted = getattr(inner, "rope_deltas", None)
    try:
        full: Tensor = with_positions(model, ids, inputs).running["position_ids"]
    finally:
        if hasattr(inner, "rope_deltas"):
            inner.rope_deltas = noted
    if full.dim() == 2:
        return full.expand(len(ids), -1)
    return full.expand(-1, len(ids), -1)


def cut_positions(full: Tensor, index: Tensor, real: Tensor) -> Tensor:
    """The positions of the columns ``index`` (B, T'), 0 where ``real`` (B, T') is false."""
    if full.dim() == 2:
        return full.gather(1, index).masked_fill(~real, 0)
    cut = full.gather(2, index.expand(full.shape[0], -1, -1)).masked_fill(~real, 0)
    if full.shape[0] == 4:  # the text row counts tokens and only serves to build masks
        cut[0] = (real.long().cumsum(1) - 1).clamp_min(0)
    return cut


def compact_positions(positions: Tensor, visual: Tensor, real: Tensor) -> Tensor:
    """Positions without gaps.

    Text positions (B, T) become 0, 1, 2, ... With mRoPE each picture's rows keep their layout: times, rows and columns
    that are left are numbered from the picture's first position, and what follows closes up behind the largest.

    Args:
        positions: (B, T), (3, B, T) or (4, B, T), gapped.
        visual: (B, T) bool, visual tokens.
        real: (B, T) bool, false at padding.

    Returns:
        The same shape.
    """
    plain = (real.long().cumsum(1) - 1).clamp_min(0)
    if positions.dim() == 2:
        return plain
    made = positions.clone()
    spatial = made[1:] if len(made) == 4 else made
    for row in range(positions.shape[1]):
        at, columns = 0, real[row].nonzero()[:, 0]
        kinds = visual[row, columns]
        edges = [0, *((kinds[1:] != kinds[:-1]).nonzero()[:, 0] + 1).tolist(), len(columns)]
        for start, end in pairwise(edges):
            block = columns[start:end]
            if not bool(kinds[start]):
                spatial[:, row, block] = at + torch.arange(end - start, device=block.device)
                at += end - start
                continue
            ranks = torch.stack([x.unique(return_inverse=True)[1] for x in spatial[:, row, block]])  # (3, n)
            spatial[:, row, block] = at + ranks
            at += int(ranks.max()) + 1
    if len(made) == 4:
        made[0] = plain
    return made
