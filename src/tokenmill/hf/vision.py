"""Where pictures are in a model and its prompt: features as the decoder takes them, and what the tower computed.

One adapter for the classes of transformers whose forward takes ``mm_encoder_outputs``: Llava, LlavaNext,
LlavaOnevision, InternVL and Qwen2.5-VL.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from tokenmill.errors import LimitError, UnsupportedError
from tokenmill.hf.packing import flat, is_exact, places, pooled, shuffled, stitched
from tokenmill.hf.tower import Seen, TowerLayer, merged_layer, tower_layer, watching

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IMAGE, VIDEO = "image", "video"
# What describes the pictures in a prompt: gone once they are encoded.
PICTURE_INPUTS = (
    "pixel_values",
    "pixel_values_videos",
    "image_sizes",
    "image_sizes_videos",
    "image_grid_thw",
    "video_grid_thw",
    "second_per_grid_ts",
    "batch_num_images",
    "vision_feature_layer",
    "vision_feature_select_strategy",
    "vision_aspect_ratio",
)
TYPES = ("llava", "llava_next", "llava_onevision", "internvl", "qwen2_5_vl")


@dataclass(frozen=True, slots=True)
class Visual:
    """One picture or video of a prompt.

    Attributes:
        row: of the batch.
        columns: (N,) int64, ascending, where its tokens stand in the row.
        kind: ``"image"`` or ``"video"``.
        features: (N, D) as the decoder takes them.
        newline: (N,) bool, true at LLaVA-NeXT's row ends.
        group: (N,) int64: tile (0 is the whole picture), or frame of a video; -1 at newlines.
        place: (N, 3) int64: view (0 whole picture, 1 stitched tiles, or the frame), row, column.
        before: (N, m, d) what goes into the projector for each token, in m patches; ``None`` unless asked for, and
            where tiles are resized after the projector.
        tower: asked-for layers of the tower, by index.
        pack: per-patch values (tiles, P) or (tiles, P, C) -> (N,) or (N, C) in token order, by the model's own
            stitching; NaN at newlines.
        pixels: (tiles, 3, H, W), as they went into the tower; ``None`` for towers that take patches.
    """

    row: int
    columns: Tensor
    kind: str
    features: Tensor
    newline: Tensor
    group: Tensor
    place: Tensor
    before: Tensor | None
    tower: Mapping[int, TowerLayer]
    pack: Callable[[Tensor], Tensor]
    pixels: Tensor | None = None

    def __len__(self) -> int:
        return self.features.shape[0]


@dataclass(frozen=True, slots=True)
class Encoded:
    """All pictures of a prompt, and how to hand other features back to the model.

    Attributes:
        visuals: images in the order of the prompt, then videos.
        listed: for each kind, whether the model wants a list of features (or one tensor).
    """

    visuals: tuple[Visual, ...]
    listed: Mapping[str, bool]

    def outputs(self, features: Sequence[Tensor]) -> dict[str, BaseModelOutputWithPooling]:
        """``mm_encoder_outputs`` that hold ``features`` (k_i, D), one for each of the visuals."""
        made: dict[str, BaseModelOutputWithPooling] = {}
        for kind in dict.fromkeys(v.kind for v in self.visuals):
            mine: Any = [f for f, v in zip(features, self.visuals, strict=True) if v.kind == kind]
            made[kind] = BaseModelOutputWithPooling(pooler_output=mine if self.listed[kind] else torch.cat(mine))
        return made


def check_type(where: str, model: PreTrainedModel) -> str:
    """The model's type, one of `TYPES`.

    Raises:
        UnsupportedError: another one, or the bare model without its output layer.
    """
    kind = str(getattr(model.config, "model_type", ""))
    if kind not in TYPES or not hasattr(model, "model") or "mm_encoder_outputs" not in _parameters(model):
        raise UnsupportedError(
            where,
            f"{type(model).__name__} is none of the vision-language classes that can be pruned",
            f"Use a ...ForConditionalGeneration of type {', '.join(TYPES)}.",
        )
    return kind


def placeholder_ids(model: PreTrainedModel) -> dict[str, int]:
    """Token ids that stand for pictures in a prompt, by kind."""
    config: Any = model.config
    ids = {IMAGE: config.image_token_id, VIDEO: getattr(config, "video_token_id", None)}
    return {kind: number for kind, number in ids.items() if number is not None}


def visual_mask(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """(B, T) bool, true at placeholders of images and videos."""
    known = torch.tensor(list(placeholder_ids(model).values()), device=input_ids.device)
    return torch.isin(input_ids, known)


def encode(
    where: str,
    model: PreTrainedModel,
    inputs: Mapping[str, Any],
    *,
    tower_layers: Sequence[int] = (),
    with_projector_input: bool = False,
) -> Encoded:
    """Run the vision tower on the pictures of a prompt and say where each picture's tokens stand.

    Args:
        where: who asks, for messages.
        model: see `check_type`.
        inputs: arguments of its forward with ``input_ids`` (B, T).
        tower_layers: layers (negative counts from the end) whose queries and keys are wanted.
        with_projector_input: also give what goes into the projector.

    Raises:
        LimitError: no picture, another number of placeholders than of features, NaN or infinite features.
        UnsupportedError: a class of model, or a layer, that this cannot look into.
    """
    kind = check_type(where, model)
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        shape = tuple(ids.shape) if isinstance(ids, Tensor) else ids
        raise LimitError(where, "input_ids", shape, "token ids (B, T)", "The placeholders say where pictures stand.")
    found = {IMAGE: inputs.get("pixel_values") is not None, VIDEO: inputs.get("pixel_values_videos") is not None}
    if not any(found.values()):
        count = int(visual_mask(model, ids).sum())
        raise LimitError(
            where,
            "pixel_values",
            None,
            f"the pictures of the prompt's {count} placeholders",
            "A text-only prompt has nothing to prune: call the model itself.",
        )
    if found[VIDEO] and kind != "qwen2_5_vl":
        raise UnsupportedError(where, f"videos of {type(model).__name__}", "Videos work for Qwen2.5-VL.")
    if kind == "qwen2_5_vl":
        _check_grids(where, model, inputs)
    visuals: list[Visual] = []
    listed: dict[str, bool] = {}
    for modality in (IMAGE, VIDEO):
        if found[modality]:
            with watching(model, tower_layers, with_projector_input) as seen:
                out = _run_encoder(model, inputs, modality)
            listed[modality] = not isinstance(out.pooler_output, Tensor)
            visuals += _visuals(where, model, inputs, modality, list(out.pooler_output), seen)
    return Encoded(tuple(visuals), listed)


def _check_grids(where: str, model: Any, inputs: Mapping[str, Any]) -> None:
    """Placeholders against grids, before the tower runs: ids that were pruned already no longer fit."""
    unit = model.config.vision_config.spatial_merge_size**2
    for kind, name in ((IMAGE, "image_grid_thw"), (VIDEO, "video_grid_thw")):
        grid = inputs.get(name)
        count = int((inputs["input_ids"] == placeholder_ids(model)[kind]).sum())
        wanted = 0 if grid is None else int(grid.prod(-1).sum()) // unit
        if count != wanted:
            raise LimitError(
                where,
                "input_ids",
                f"{count} {kind} placeholders",
                f"{wanted}, the merged patches of {name}",
                "Write the prompt with the model's processor; pruned ids go without grids.",
            )


def _parameters(model: PreTrainedModel) -> set[str]:
    return set(inspect.signature(model.forward).parameters)


def _run_encoder(model: Any, inputs: Mapping[str, Any], modality: str) -> Any:
    encoder = model.get_image_features if modality == IMAGE else model.get_video_features
    known = set(inspect.signature(encoder).parameters) - {"self", "kwargs"}
    return encoder(**{k: v for k, v in inputs.items() if k in known and v is not None}, return_dict=True)


def _visuals(
    where: str, model: Any, inputs: Mapping[str, Any], modality: str, features: list[Tensor], seen: Seen
) -> list[Visual]:
    ids: Tensor = inputs["input_ids"]
    here = ids == placeholder_ids(model)[modality]
    sizes = [len(f) for f in features]
    total = int(here.sum())
    if total != sum(sizes):
        raise LimitError(
            where,
            "input_ids",
            f"{total} {modality} placeholders",
            f"{sum(sizes)}, the features of {len(sizes)} {modality}s",
            "Write the prompt with the model's processor, which repeats the placeholder for each feature.",
        )
    for number, feature in enumerate(features):
        bad = ~torch.isfinite(feature).all(-1)
        if bool(bad.any()):
            first = int(bad.nonzero()[0])
            raise LimitError(where, f"{modality} {number}", f"NaN or infinity at token {first}", "finite features")
    rows, columns = here.nonzero(as_tuple=True)
    parts = _tiles(where, model, inputs, modality, sizes, seen)
    visuals = []
    for feature, row, column, part in zip(features, rows.split(sizes), columns.split(sizes), parts, strict=True):
        if bool((row != row[0]).any()):
            raise LimitError(
                where, "input_ids", f"{int((row == row[0]).sum())} placeholders in row {int(row[0])}", f"{len(feature)}"
            )
        visuals.append(Visual(int(row[0]), column, modality, feature, **part))
    return visuals


# -- what differs by model ---------------------------------------------------------------------------------------


def _tiles(
    where: str, model: Any, inputs: Mapping[str, Any], modality: str, sizes: list[int], seen: Seen
) -> list[dict[str, Any]]:
    kind = check_type(where, model)
    if kind == "qwen2_5_vl":
        return _qwen_parts(model, inputs, modality, seen)
    pixels: Any = inputs["pixel_values"]
    if kind in ("llava", "internvl"):
        # LLaVA's picture and InternVL's tile are one square each.
        stacked = torch.cat(list(pixels)) if isinstance(pixels, list) else pixels
        counts = [1] * len(sizes)
        pack = shuffled if kind == "internvl" else flat
        packs = [pack(model)] * len(sizes)
    else:
        counts = _tile_counts(model, inputs)
        stacked = torch.cat([p[:n] for p, n in zip(pixels, counts, strict=True)]) if pixels[0].dim() == 4 else pixels
        packs = [stitched(model, kind, inputs, at, n) for at, n in enumerate(counts)]
    parts = []
    start = 0
    for count, size, pack in zip(counts, sizes, packs, strict=True):
        tiles = slice(start, start + count)
        start += count
        parts.append(_square_part(model, kind, pack, size, tiles, stacked, seen))
    return parts


def _square_part(
    model: Any, kind: str, pack: Callable[[Tensor], Tensor], size: int, tiles: slice, pixels: Tensor, seen: Seen
) -> dict[str, Any]:
    """Facts of a picture whose tiles are squares of one size."""
    device, count = pixels.device, tiles.stop - tiles.start
    tower = {at: tower_layer(seen.layers[at], tiles) for at in seen.layers}
    patches = (model.config.vision_config.image_size, model.config.vision_config.patch_size)
    image, patch = (x[0] if isinstance(x, list | tuple) else x for x in patches)
    side = image // patch
    tile = torch.arange(count, device=device, dtype=torch.float32)[:, None].expand(count, side * side)
    packed = pack(tile)  # (N,), NaN at newlines
    newline = packed.isnan()
    group = torch.where(newline, -1, packed.nan_to_num(0).round()).long()
    place = places(newline, size, _token_side(side, kind, model))
    before = None
    if seen.before:
        given = seen.before[0]
        given = given.flatten(0, -3) if given.dim() > 3 else given
        mine = given[tiles]
        if mine.shape[1] * count == size:  # one row a token already, also behind a pixel shuffle
            before = mine.flatten(0, 1)[:, None]
        elif is_exact(pack, count, mine.shape[1], mine.device):
            source = pack(torch.arange(count * mine.shape[1], device=device, dtype=torch.float64).view(count, -1))
            rows = mine.flatten(0, 1)[source.nan_to_num(0).long()]
            before = rows[:, None]
    return {
        "newline": newline,
        "group": group,
        "place": place,
        "before": before,
        "tower": tower,
        "pack": pack,
        "pixels": pixels[tiles],
    }


def _token_side(side: int, kind: str, model: Any) -> int:
    """Tokens a side of one tile."""
    return int(side * model.config.downsample_ratio) if kind == "internvl" else side


def _tile_counts(model: Any, inputs: Mapping[str, Any]) -> list[int]:
    """How many tiles each picture of LLaVA-NeXT or OneVision has."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    config = model.config
    numbers = inputs.get("batch_num_images")
    whole = [] if numbers is None else [n == 1 for n in torch.as_tensor(numbers).tolist() for _ in range(n)]
    counts = []
    for at, size in enumerate(torch.as_tensor(inputs["image_sizes"])):
        tiled = whole[at] if whole else True
        side = config.vision_config.image_size
        counts.append(
            image_size_to_num_patches(image_size=size, grid_pinpoints=config.image_grid_pinpoints, patch_size=side)
            if tiled
            else 1
        )
    return counts


def _qwen_parts(model: Any, inputs: Mapping[str, Any], modality: str, seen: Seen) -> list[dict[str, Any]]:
    """Facts of Qwen's pictures: patches in window order, four to a token, frames as groups."""
    visual = model.model.visual
    grids = inputs["image_grid_thw" if modality == IMAGE else "video_grid_thw"]
    module = sys.modules[type(visual).__module__]
    windows, _ = module.get_vision_window_index(
        grids,
        spatial_merge_size=visual.spatial_merge_size,
        window_size=visual.window_size,
        patch_size=visual.patch_size,
        kwargs={},
    )
    back = torch.argsort(torch.as_tensor(windows, device=grids.device))  # raster order of merged tokens
    unit, parts, start = visual.spatial_merge_unit, [], 0
    tower = {at: merged_layer(seen.layers[at]) for at in seen.layers}  # (H, 4N, d) in window order
    for grid in grids.tolist():
        frames, height, width = grid[0], grid[1] // visual.spatial_merge_size, grid[2] // visual.spatial_merge_size
        count = frames * height * width
        mine = back[start : start + count]  # merged tokens of this picture, as rows of window order
        patches = (mine[:, None] * unit + torch.arange(unit, device=mine.device)).flatten()
        start += count
        at = torch.arange(count, device=grids.device)
        place = torch.stack([at // (height * width), at // width % height, at % width], dim=1)
        before = None
        if seen.before:
            before = seen.before[0][patches].view(count, unit, -1)
        parts.append(
            {
                "newline": torch.zeros(count, dtype=torch.bool, device=grids.device),
                "group": place[:, 0],
                "place": place,
                "before": before,
                "tower": {
                    number: TowerLayer(q[None, :, patches], k[None, :, patches], None, scale)
                    for number, (q, k, scale) in tower.items()
                },
                "pack": pooled(unit),
                "pixels": None,
            }
        )
    return parts
