"""From patches of a tower to tokens of a prompt: each class's own stitching, run on values instead of features."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def is_exact(pack: Callable[[Tensor], Tensor], count: int, patches: int, device: Any) -> bool:
    """Whether stitching only moves values (no resizing, no pooling): indices come back as indices."""
    probe = torch.arange(count * patches, device=device, dtype=torch.float64).view(count, -1)
    try:
        out = pack(probe)
    except RuntimeError:  # the projector sees another number of patches than the tower
        return False
    out = out[~out.isnan()]
    return bool((out == out.round()).all()) and len(out.unique()) == len(out)


def places(newline: Tensor, size: int, side: int) -> Tensor:
    """(N, 3) view, row, column: the whole picture is a square, stitched tiles come row by row with a newline each."""
    at = torch.arange(size, device=newline.device)
    base = min(side * side, size)
    place = torch.stack([torch.zeros_like(at), at // side, at % side], dim=1)
    if size > base:
        ends = newline[base:].nonzero()
        width = int(ends[0]) + 1 if len(ends) else size - base
        rest = at[base:] - base
        place[base:] = torch.stack([torch.ones_like(rest), rest // width, rest % width], dim=1)
    return place


def flat(_model: Any) -> Callable[[Tensor], Tensor]:
    return lambda values: values.flatten(0, 1)


def shuffled(model: Any) -> Callable[[Tensor], Tensor]:
    """InternVL's pixel shuffle: a token is the mean of the patches that are shuffled into it."""

    def pack(values: Tensor) -> Tensor:
        flat = values if values.dim() == 3 else values[..., None]
        side = round(flat.shape[1] ** 0.5)
        channels = []
        for channel in flat.unbind(-1):
            grid = channel.reshape(-1, side, side, 1)
            merged = model.model.pixel_shuffle(grid, scale_factor=model.config.downsample_ratio)
            channels.append(merged.mean(-1).flatten())
        return torch.stack(channels, -1) if values.dim() == 3 else channels[0]

    return pack


def stitched(model: Any, kind: str, inputs: Mapping[str, Any], at: int, count: int) -> Callable[[Tensor], Tensor]:
    """LLaVA-NeXT's and OneVision's own stitching, run on values instead of features."""

    def pack(values: Tensor) -> Tensor:
        flat = values if values.dim() == 3 else values[..., None]
        newline = flat.new_full((flat.shape[-1],), torch.nan)
        extra: dict[str, Any] = {}
        if kind == "llava_next":
            extra["vision_feature_select_strategy"] = "default"
        else:
            extra["vision_aspect_ratio"] = inputs.get("vision_aspect_ratio") or model.config.vision_aspect_ratio
        sizes = torch.as_tensor(inputs["image_sizes"])[at : at + 1]
        packed, _ = model.model.pack_image_features([flat], sizes, image_newline=newline, **extra)
        return packed[0] if values.dim() == 3 else packed[0][:, 0]

    del count
    return pack


def pooled(unit: int) -> Callable[[Tensor], Tensor]:
    """Patches in the order of `TowerLayer` (four of a token in a row) -> their mean."""

    def pack(values: Tensor) -> Tensor:
        flat = values.flatten(0, 1)
        return flat.view(-1, unit, *flat.shape[1:]).mean(1)

    return pack
