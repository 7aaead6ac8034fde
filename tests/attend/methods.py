"""Every method of the family with settings that choose on tiny models, and runs of those models."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import tokenmill.models as models
from tokenmill import attend, hf

KINDS = ("llama", "qwen2", "gemma3")
# No token twice in a text: without positions the first layer's keys of equal tokens tie, and rounding would decide.
IDS = torch.stack([torch.randperm(63, generator=torch.Generator().manual_seed(s))[:40] + 1 for s in (11, 12)])
PADDING = torch.ones_like(IDS)
PADDING[0, :9] = 0
SMALL: dict[str, Any] = {"keep": 3, "n_init": 2, "n_local": 5, "chunk": 4}


def cases() -> dict[str, Any]:
    """Name -> method that reads about a quarter of 40 tokens."""
    return {
        "tokenselect": attend.TokenSelect(**SMALL),
        "tokenselect original": attend.TokenSelect(**SMALL, positions="original"),
        "tokenselect each step": attend.TokenSelect(**SMALL, theta=None),
        "tokenselect reuses": attend.TokenSelect(**SMALL, theta=-1.0),
        "tokenselect hard": attend.TokenSelect(**SMALL, vote="hard", pool=3, strict=True, theta=0.3),
        "tokenselect topk": attend.TokenSelect(**SMALL, vote="topk", scale="scaling"),
        "oracle": attend.OracleTopK(keep=6),
        "streaming": attend.StreamingLLM(keep=9, n_sink=2),
        "streaming original": attend.StreamingLLM(keep=9, n_sink=2, positions="original"),
        "snapkv": attend.SnapKV(keep=9, window=4, pool=3),
        "quest": attend.Quest(keep=8, page=4, min_pages=2, dense_layers=0),
        "hisa dot": attend.HISA(keep=6, block_size=4, top_blocks=3, score_fn="dot"),
        "hisa dot extra": attend.HISA(keep=6, block_size=4, top_blocks=2, score_fn="dot", forced="extra"),
        "quest any page": attend.Quest(keep=8, page=4, min_pages=2, dense_layers=0, newest=False),
    }


def full(method: Any) -> Any:
    """The method with a budget above every length."""
    return replace(method, keep=1000, **({"top_blocks": 250} if hasattr(method, "top_blocks") else {}))


def model(kind: str, *, attn: str = "sdpa", layers: int | None = None, seed: int = 0) -> Any:
    """A tiny model: 4 heads on 4, 2 or 1 KV heads; Gemma 3 with sliding layers between full ones."""
    return models.tiny(kind, attn=attn, layers=layers, seed=seed)


def positions(mask: Tensor) -> Tensor:
    """Positions (B, T) that start at the first real token."""
    return (mask.cumsum(-1) - 1).clamp_min(0)


@torch.no_grad()
def run(model: Any, ids: Tensor, mask: Tensor | None = None, *, cache: Any = None, at: int = 0) -> Any:
    """One forward over ``ids``, which stand at columns ``at ...`` of the text that ``mask`` (B, T) covers."""
    if mask is None:
        mask = torch.ones(len(ids), at + ids.shape[1], dtype=torch.long)
    place = positions(mask)[:, at : at + ids.shape[1]]
    return model(input_ids=ids, attention_mask=mask, position_ids=place, past_key_values=cache, use_cache=True)


def steps(model: Any, ids: Tensor, mask: Tensor, start: int, cache: Any = None) -> Tensor:
    """Logits (B, T - start, V): a prefill of ``start`` tokens, then the others one by one."""
    out = run(model, ids[:, :start], mask[:, :start], cache=cache)
    parts = []
    for at in range(start, ids.shape[1]):
        out = run(model, ids[:, at : at + 1], mask[:, : at + 1], cache=out.past_key_values, at=at)
        parts.append(out.logits)
    return torch.cat(parts, 1)


def disturb(model: Any, row: int, column: int) -> list[Any]:
    """Hooks that change key and value (not the query) of one token in every layer, while prefills run."""

    def change(_module: nn.Module, _args: Any, output: Tensor) -> Tensor | None:
        if output.shape[1] <= column:
            return None
        noise = torch.randn(output.shape[-1], generator=torch.Generator().manual_seed(column))
        output = output.clone()
        output[row, column] += 3 * noise
        return output

    found = hf.attention_layers(model)
    return [part.register_forward_hook(change) for layer in found for part in (layer.k_proj, layer.v_proj)]
