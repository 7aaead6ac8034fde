"""Tiny random models, made from a config and a seed: what tests and laws run on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import (
    DeepseekV32Config,
    DeepseekV32ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GlmMoeDsaConfig,
    GlmMoeDsaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from tokenmill.errors import LimitError, unknown_name

if TYPE_CHECKING:
    from tokenmill.models._causal import CausalModel

KINDS = ("deepseek_v32", "gemma3", "glm_moe_dsa", "llama", "qwen2")
BIDIRECTIONAL = ("llama", "qwen2", "gemma3")
SLIDING_WINDOW = 16
_GAIN = 2.0  # weights of std gain / sqrt(fan in): large enough that greedy output wanders over the vocabulary
_TIED_EMBEDDING = 0.2


def tiny(
    kind: str,
    *,
    seed: int = 0,
    vocab: int = 64,
    attn: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    layers: int | None = None,
    bidirectional: bool = False,
) -> CausalModel:
    """Build a random causal language model of hidden size 32, 512 positions and no end token.

    Args:
        kind: ``"llama"`` (4 heads, separate output layer), ``"qwen2"`` (4 query heads on 2 key heads, biases,
            separate output layer), ``"gemma3"`` (4 query heads on 1 key head, sliding layers with a window of 16
            and full layers, tied output layer), ``"deepseek_v32"`` or ``"glm_moe_dsa"`` (latent attention, an indexer
            of 16 heads that chooses 6 keys, no experts).
        seed: seeds the weights; the global random state is left as it was.
        vocab: number of tokens.
        attn: name of the attention implementation.
        dtype: dtype of the weights (drawn in float32, then cast).
        layers: number of layers; ``None`` means 6 for ``"gemma3"`` and 2 for the others. Every third layer and
            the last one of ``"gemma3"`` attend fully.
        bidirectional: tokens see each other in both directions, and the last id is the mask: a masked diffusion
            model. ``"llama"``, ``"qwen2"`` and ``"gemma3"`` (whose window is 9 then) can.

    Raises:
        LimitError: unknown ``kind``, fewer than 2 tokens, fewer than 1 layer, or a kind that is always causal.
    """
    if kind not in KINDS:
        raise unknown_name("models.tiny", "kind", kind, KINDS)
    if vocab < 2:
        raise LimitError("models.tiny", "vocab", vocab, "at least 2")
    if layers is not None and layers < 1:
        raise LimitError("models.tiny", "layers", layers, "at least 1")
    if bidirectional and kind not in BIDIRECTIONAL:
        limit = f"one of {', '.join(BIDIRECTIONAL)} with bidirectional=True"
        raise LimitError("models.tiny", "kind", kind, limit)
    depth = layers if layers is not None else (6 if kind == "gemma3" else 2)
    with torch.random.fork_rng(devices=[]):
        model = _build(kind, vocab, depth, attn, bidirectional)
    _draw_weights(model, seed)
    model.to(dtype=dtype)  # pyright: ignore[reportCallIssue]
    return cast("CausalModel", model.eval())


def _build(kind: str, vocab: int, depth: int, attn: str, bidirectional: bool) -> PreTrainedModel:
    shared: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": depth,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
        "attn_implementation": attn,
    }
    if bidirectional:
        flag = {"use_bidirectional_attention": True} if kind == "gemma3" else {"is_causal": False}
        shared |= {"mask_token_id": vocab - 1, **flag}
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(num_key_value_heads=4, **shared))
    if kind == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(num_key_value_heads=2, tie_word_embeddings=False, **shared))
    if kind in ("deepseek_v32", "glm_moe_dsa"):
        return _indexed(kind, depth, shared)
    full = [(i + 1) % 3 == 0 or i == depth - 1 for i in range(depth)]
    return Gemma3ForCausalLM(
        Gemma3TextConfig(
            num_key_value_heads=1,
            head_dim=8,
            query_pre_attn_scalar=8,
            sliding_window=SLIDING_WINDOW,
            layer_types=["full_attention" if f else "sliding_attention" for f in full],
            tie_word_embeddings=True,
            **shared,
        )
    )


def _indexed(kind: str, depth: int, shared: dict[str, Any]) -> PreTrainedModel:
    """A model with DeepSeek sparse attention."""
    settings: dict[str, Any] = {
        "num_key_value_heads": 4,
        "first_k_dense_replace": depth,
        "moe_intermediate_size": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "index_n_heads": 16,  # with few, keys that every head turns away tie at zero
        "index_head_dim": 16,
        "index_topk": 6,
    }
    if kind == "deepseek_v32":
        return DeepseekV32ForCausalLM(DeepseekV32Config(**settings, **shared))
    return GlmMoeDsaForCausalLM(GlmMoeDsaConfig(**settings, **shared))


@torch.no_grad()
def _draw_weights(model: PreTrainedModel, seed: int) -> None:
    """Matrices of std gain / sqrt(fan in), biases of std 0.3, norms of std 0.2 around their neutral value."""
    generator = torch.Generator().manual_seed(seed)
    tied = model.config.tie_word_embeddings
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if weight.dim() == 2:
            # A tied output layer makes a token predict itself, so there its own share of the stream is kept small
            # (and the last norm, below, gives the logits back their size).
            gain = _TIED_EMBEDDING if tied and "embed_tokens" in name else _GAIN
            weight.copy_(noise * gain * weight.shape[1] ** -0.5)
        elif name.endswith("bias"):
            weight.copy_(noise * 0.3)
        else:
            weight.add_(noise * 0.2)
            if tied and name == "model.norm.weight":
                weight.add_(1 / _TIED_EMBEDDING)
