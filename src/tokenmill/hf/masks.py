"""Attention masks for drafts that branch: every node sees the past and its own ancestors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokenmill.errors import UnsupportedError
from tokenmill.hf.layout import FULL, SLIDING, layer_types, text_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.cache_utils import DynamicCache


def mask_form(where: str, model: PreTrainedModel) -> str:
    """``"float"`` for eager attention, ``"bool"`` for sdpa and attention functions that take its masks.

    Raises:
        UnsupportedError: flash or flex attention, which cannot take a mask of ancestors.
    """
    name = str(text_config(model)._attn_implementation)
    if "flash" in name or "flex" in name or name.startswith("paged"):
        raise UnsupportedError(
            where,
            f"attention {name!r} cannot take a tree mask",
            "Use model.set_attn_implementation('sdpa') or 'eager'.",
        )
    return "float" if name == "eager" else "bool"


def layer_kinds(where: str, model: PreTrainedModel) -> list[str]:
    """``full_attention`` or ``sliding_attention`` for each layer.

    Raises:
        UnsupportedError: another kind of layer (linear attention, chunked attention).
    """
    kinds = list(layer_types(model))
    odd = sorted(set(kinds) - {FULL, SLIDING})
    if odd:
        raise UnsupportedError(
            where, f"layers of type {', '.join(odd)} cannot take a tree mask", "Use a model with ordinary attention."
        )
    return kinds


def tree_masks(
    model: PreTrainedModel,
    cache: DynamicCache,
    ancestors: Tensor,
    depth: Tensor,
    *,
    kinds: list[str],
    form: str,
    past: Tensor | None = None,
) -> Tensor | dict[str, Tensor]:
    """Masks of one forward over a tree of N new tokens behind L cached ones.

    A sliding layer counts distance in tokens (not in positions), as transformers does for plain decoding.

    Args:
        model: gives the window and the dtype.
        cache: says per layer which columns the forward will see.
        ancestors: (N, N) bool, row i true at i and at all its ancestors.
        depth: (N,) int64, 0 for the root.
        kinds: see `layer_kinds`.
        form: see `mask_form`.
        past: (L,) bool, false at padding; ``None`` when all cached tokens are real.

    Returns:
        (1, 1, N, columns), or such a mask for each kind of layer when the model has both.
    """
    n, length = ancestors.shape[0], cache.get_seq_length()
    seen = ancestors.new_ones(n, length) if past is None else past.expand(n, length)
    full = torch.cat([seen, ancestors], dim=1)  # (N, L + N)
    masks: dict[str, Tensor] = {}
    for kind in dict.fromkeys(kinds):
        mask = full
        if kind == SLIDING:
            index = torch.cat([torch.arange(length, device=depth.device), length + depth])  # (L + N,)
            near = (length + depth)[:, None] - index[None, :] < text_config(model).sliding_window
            mask = full & near
        columns, offset = cache.get_mask_sizes(n, kinds.index(kind))
        mask = mask[:, offset : offset + columns][None, None]
        masks[kind] = as_form(mask, form, model.dtype)
    return masks if len(masks) > 1 else next(iter(masks.values()))


def as_form(mask: Tensor, form: str, dtype: torch.dtype) -> Tensor:
    """A mask that is true where visible, in the form (see `mask_form`) that the attention takes."""
    if form == "bool":
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)
