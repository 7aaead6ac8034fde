"""Tiny random vision-language models of every class that can be pruned, with prompts made by hand."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)

KINDS = ("llava", "llava_next", "llava_onevision", "internvl", "qwen2_5_vl")
WITH_CLS = ("llava", "llava_next", "internvl")
IMAGE, VIDEO, START, END, PAD = 60, 59, 61, 62, 0
LAYERS = 4
TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": PAD,
    "bos_token_id": None,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}


def model(kind: str, attn: str = "sdpa", seed: int = 3) -> Any:
    """A random model of four decoder layers, 4 heads on 2, in eval mode, with no end token."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = {
            "llava": _llava,
            "llava_next": _llava_next,
            "llava_onevision": _onevision,
            "internvl": _internvl,
            "qwen2_5_vl": _qwen,
        }[kind](attn)
        with torch.no_grad():
            for name, weight in made.named_parameters():
                if weight.dim() >= 2:
                    weight.normal_(std=weight[0].numel() ** -0.5)
                elif "newline" in name or "class" in name:
                    weight.normal_()
    return made.eval()


def _llava(attn: str) -> Any:
    make: Any = LlavaConfig
    config = make(text_config=LlamaConfig(**TEXT), vision_config=CLIPVisionConfig(**VISION), image_token_id=IMAGE)
    config._attn_implementation = attn
    return LlavaForConditionalGeneration(config)


def _llava_next(attn: str) -> Any:
    make: Any = LlavaNextConfig
    config = make(
        text_config=LlamaConfig(**TEXT),
        vision_config=CLIPVisionConfig(**VISION),
        image_token_id=IMAGE,
        image_grid_pinpoints=[[16, 32], [32, 16], [32, 32]],
    )
    config._attn_implementation = attn
    return LlavaNextForConditionalGeneration(config)


def _onevision(attn: str) -> Any:
    make: Any = LlavaOnevisionConfig
    config = make(
        text_config=Qwen2Config(**TEXT),
        vision_config=SiglipVisionConfig(**VISION, vision_use_head=False),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_grid_pinpoints=[[16, 32], [32, 16], [32, 32]],
    )
    config._attn_implementation = attn
    return LlavaOnevisionForConditionalGeneration(config)


def _internvl(attn: str) -> Any:
    vision = {**VISION, "image_size": [16, 16], "patch_size": [4, 4], "use_qk_norm": False}
    config: Any = InternVLConfig(
        text_config=Qwen2Config(**TEXT).to_dict(),
        vision_config={**vision, "model_type": "internvl_vision"},
        image_token_id=IMAGE,
        downsample_ratio=0.5,
        image_seq_length=4,
    )
    config._attn_implementation = attn
    return InternVLForConditionalGeneration(config)


def _qwen(attn: str) -> Any:
    text = {**TEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 1, 1]}}
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": 32,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "fullatt_block_indexes": [1],
        "window_size": 16,
        "tokens_per_second": 2,
    }
    config: Any = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    config._attn_implementation = attn
    return Qwen2_5_VLForConditionalGeneration(config)


def inputs(kind: str, *, rows: int = 3, seed: int = 0, images: tuple[int, ...] = (1, 2, 1), video: bool = False) -> Any:
    """A left-padded batch of prompts of different lengths, row r with ``images[r]`` pictures of several shapes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made: dict[str, list[Any]] = {"pixels": [], "sizes": [], "grids": [], "videos": [], "video_grids": []}
        texts = []
        for row in range(rows):
            tokens = torch.randint(1, 58, (2 + row,)).tolist()
            for number in range(images[row]):
                tokens += [START, *[IMAGE] * _picture(kind, made, row + number), END]
                tokens += torch.randint(1, 58, (2,)).tolist()
            if video and row == 0:
                made["video_grids"].append([2, 4, 4])
                made["videos"].append(torch.randn(2 * 16, 96))
                tokens += [START, *[VIDEO] * 8, END]
            tokens += torch.randint(1, 58, (3 + 2 * row,)).tolist()
            texts.append(tokens)
        width = max(map(len, texts))
        ids = torch.tensor([[PAD] * (width - len(t)) + t for t in texts])
        mask = torch.tensor([[0] * (width - len(t)) + [1] * len(t) for t in texts])
    found: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if kind in ("llava", "internvl"):
        found["pixel_values"] = torch.cat(made["pixels"])
    elif kind in ("llava_next", "llava_onevision"):
        most = max(len(p) for p in made["pixels"])
        found["pixel_values"] = torch.stack(
            [torch.nn.functional.pad(p, (0,) * 7 + (most - len(p),)) for p in made["pixels"]]
        )
        found["image_sizes"] = torch.tensor(made["sizes"])
        if kind == "llava_onevision":
            # What the processor gives: several pictures in one prompt are not cut into tiles.
            found["batch_num_images"] = torch.tensor([1] * len(made["sizes"]))
    else:
        found["pixel_values"] = torch.cat(made["pixels"])
        found["image_grid_thw"] = torch.tensor(made["grids"])
        found["mm_token_type_ids"] = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
        if video:
            found["pixel_values_videos"] = torch.cat(made["videos"])
            found["video_grid_thw"] = torch.tensor(made["video_grids"])
    return found


def _picture(kind: str, made: dict[str, list[Any]], at: int) -> int:
    """Add one picture, return the number of its tokens."""
    if kind == "llava":
        made["pixels"].append(torch.randn(1, 3, 16, 16))
        return 16
    if kind == "internvl":
        made["pixels"].append(torch.randn(1, 3, 16, 16))
        return 4
    if kind == "qwen2_5_vl":
        grid = ([1, 8, 8], [1, 4, 8], [1, 8, 4])[at % 3]
        made["grids"].append(grid)
        made["pixels"].append(torch.randn(grid[1] * grid[2], 96))
        return grid[1] * grid[2] // 4
    size = ([24, 30], [14, 30], [30, 16])[at % 3]
    tiles, rows, columns = {(24, 30): (5, 6, 8), (14, 30): (3, 4, 8), (30, 16): (3, 8, 4)}[size[0], size[1]]
    made["sizes"].append(size)
    made["pixels"].append(torch.randn(tiles, 3, 16, 16))
    return 16 + rows * (columns + 1)
