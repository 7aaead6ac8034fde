"""Tiny multimodal models with their inputs, made from configs: a model, then keyword arguments of its forward."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

KINDS = ("gemma3", "llava", "qwen2_5_vl")
IMAGE = 60
TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}


def build(kind: str, attn: str = "sdpa") -> tuple[PreTrainedModel, dict[str, Any]]:
    """A random model of three decoder layers and a prompt of 20 tokens with one image; no end token."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = {"gemma3": _gemma3, "llava": _llava, "qwen2_5_vl": _qwen}[kind](attn)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.dim() >= 2:
                    weight.normal_(std=1.5 * weight[0].numel() ** -0.5)
        return model.eval(), _inputs(kind)


def _inputs(kind: str) -> dict[str, Any]:
    ids = torch.randint(1, 58, (1, 20))
    pixels = torch.randn(1, 3, 16, 16)
    if kind == "llava":
        ids[0, 3:19] = IMAGE
        return {"input_ids": ids, "pixel_values": pixels}
    ids[0, 3:7] = IMAGE
    kinds = (ids == IMAGE).long()
    if kind == "gemma3":
        return {"input_ids": ids, "pixel_values": pixels, "token_type_ids": kinds}
    ids[0, 2], ids[0, 7] = 61, 62
    patches = torch.randn(16, 3 * 2 * 4 * 4)
    grid = torch.tensor([[1, 4, 4]])
    return {"input_ids": ids, "pixel_values": patches, "image_grid_thw": grid, "mm_token_type_ids": kinds}


def _gemma3(attn: str) -> PreTrainedModel:
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    text = {**TEXT, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 12, "layer_types": types}
    tokens = {"mm_tokens_per_image": 4, "image_token_id": IMAGE, "boi_token_index": 61, "eoi_token_index": 62}
    tokens["tie_word_embeddings"] = False
    parts: dict[str, Any] = {"text_config": text, "vision_config": VISION, "attn_implementation": attn, **tokens}
    config = Gemma3Config(**parts)
    return Gemma3ForConditionalGeneration(config)


def _llava(attn: str) -> PreTrainedModel:
    vision = CLIPVisionConfig(**VISION)
    tokens = {"image_token_id": IMAGE, "attn_implementation": attn}
    parts: dict[str, Any] = {"text_config": LlamaConfig(**TEXT), "vision_config": vision, **tokens}
    config = LlavaConfig(**parts)
    return LlavaForConditionalGeneration(config)


def _qwen(attn: str) -> PreTrainedModel:
    text = {**TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]}}
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
    }
    tokens = {"image_token_id": IMAGE, "video_token_id": 59, "vision_start_token_id": 61, "vision_end_token_id": 62}
    parts: dict[str, Any] = {"text_config": text, "vision_config": vision, "attn_implementation": attn, **tokens}
    config = Qwen2_5_VLConfig(**parts)
    return Qwen2_5_VLForConditionalGeneration(config)
