from __future__ import annotations

import copy
from typing import Any

import pytest
from torch import nn
from transformers import MistralConfig, MistralForCausalLM, T5Config, T5ForConditionalGeneration

import tokenmill.models as models
from tests.hf import vlms
from tokenmill import hf
from tokenmill.errors import UnsupportedError


@pytest.mark.parametrize(("kind", "kv_heads"), [("llama", 4), ("qwen2", 2), ("gemma3", 1)])
def test_shape_of_a_text_model(kind: str, kv_heads: int) -> None:
    model = models.tiny(kind)
    shape = hf.attention_shape(model)
    layers = hf.attention_layers(model)
    assert [layer.layer_idx for layer in layers] == list(range(shape.layers))
    assert (shape.heads, shape.kv_heads, shape.head_dim) == (4, kv_heads, 8)
    for layer in layers:
        assert layer.q_proj.out_features == shape.heads * shape.head_dim
        assert layer.k_proj.out_features == shape.kv_heads * shape.head_dim
    assert hf.decoder(model) is model.model
    assert hf.text_config(model) is model.config


def test_layer_types_and_window() -> None:
    gemma = models.tiny("gemma3")
    assert hf.layer_types(gemma) == ("sliding_attention", "sliding_attention", "full_attention") * 2
    assert hf.sliding_window(gemma) == 16
    llama = models.tiny("llama")
    assert hf.layer_types(llama) == ("full_attention",) * 2
    assert hf.sliding_window(llama) is None


def test_all_layers_slide_when_the_config_names_only_a_window() -> None:
    sizes: dict[str, Any] = {"vocab_size": 8, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    model = MistralForCausalLM(MistralConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, sliding_window=5))
    assert hf.layer_types(model) == ("sliding_attention",) * 2
    assert hf.sliding_window(model) == 5


@pytest.mark.parametrize("kind", vlms.KINDS)
def test_the_text_decoder_of_a_multimodal_model(kind: str) -> None:
    model, _ = vlms.build(kind)
    inner = hf.decoder(model)
    assert inner is model.model.language_model
    assert hf.decoder(inner) is inner
    assert hf.text_config(model) is model.config.text_config
    layers = hf.attention_layers(model)
    assert len(layers) == 3
    assert all(layer is block.self_attn for layer, block in zip(layers, inner.layers, strict=True))


def test_models_without_a_place_for_our_attention_are_refused() -> None:
    sizes: dict[str, Any] = {"vocab_size": 8, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    with pytest.raises(UnsupportedError, match="encoder-decoder"):
        hf.decoder(T5ForConditionalGeneration(T5Config(**sizes)))
    model: Any = models.tiny("llama")
    model.model.layers[0].second = copy.deepcopy(model.model.layers[0].self_attn)
    with pytest.raises(UnsupportedError, match="two attention modules in layer 0"):
        hf.attention_layers(model)
    del model.model.layers[0].second
    for block in model.model.layers:
        block.self_attn = nn.Identity()
    with pytest.raises(UnsupportedError, match="AttentionInterface"):
        hf.attention_layers(model)
