from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from tokenmill import hf
from tokenmill.errors import UnsupportedError
from tokenmill.models import tiny

WINDOW = 16
# The root, two children, and two children of the second one.
ANCESTORS = torch.tensor(
    [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [1, 0, 1, 1, 0], [1, 0, 1, 0, 1]], dtype=torch.bool
)
DEPTH = torch.tensor([0, 1, 1, 2, 2])


def masks(model: Any, past: int, *, form: str = "bool", padding: Tensor | None = None) -> Any:
    cache = DynamicCache(config=model.config)
    if past:
        with torch.no_grad():
            model(input_ids=torch.ones(1, past, dtype=torch.long), past_key_values=cache)
    kinds = hf.layer_kinds("t", model)
    return hf.tree_masks(model, cache, ANCESTORS, DEPTH, kinds=kinds, form=form, past=padding)


@pytest.mark.prop("token-recycling", 2)
@pytest.mark.parametrize("past", [0, 1, 7, 40])
def test_each_node_sees_the_past_and_its_own_ancestors(past: int) -> None:
    mask = masks(tiny("llama", layers=1), past)
    assert mask.shape == (1, 1, 5, past + 5)
    assert bool(mask[..., :past].all())
    assert torch.equal(mask[0, 0, :, past:], ANCESTORS)


@pytest.mark.prop("token-recycling", 2)
@pytest.mark.parametrize("past", [0, 5, 13, 14, 15, 16, 17, 40])
def test_sliding_layers_see_as_far_back_as_their_window(past: int) -> None:
    both = masks(tiny("gemma3"), past)
    assert set(both) == {"full_attention", "sliding_attention"}
    assert torch.equal(both["full_attention"], masks(tiny("llama", layers=1), past))
    sliding = both["sliding_attention"][0, 0]
    kept = min(past, WINDOW - 1)  # what a full window leaves in the cache
    assert sliding.shape == (5, kept + 5)
    for node in range(5):
        for column in range(kept):
            position = past - kept + column
            assert bool(sliding[node, column]) == (past + int(DEPTH[node]) - position < WINDOW)
    assert torch.equal(sliding[:, kept:], ANCESTORS)


def test_a_path_longer_than_the_window_loses_its_own_beginning() -> None:
    model, n = tiny("gemma3"), WINDOW + 4
    chain = torch.ones(n, n, dtype=torch.bool).tril()
    cache = DynamicCache(config=model.config)
    both = hf.tree_masks(model, cache, chain, torch.arange(n), kinds=hf.layer_kinds("t", model), form="bool")
    assert isinstance(both, dict)
    assert torch.equal(both["full_attention"][0, 0], chain)
    assert torch.equal(both["sliding_attention"][0, 0], chain.triu(-(WINDOW - 1)))


def test_padding_is_hidden_in_every_layer() -> None:
    padding = torch.arange(6) >= 2
    both = masks(tiny("gemma3"), 6, padding=padding)
    for mask in both.values():
        assert not bool(mask[..., :2].any())
        assert bool(mask[..., 2:6].all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_additive_form_says_the_same(dtype: torch.dtype) -> None:
    model = tiny("gemma3", dtype=dtype)
    allowed, added = masks(model, 20), masks(model, 20, form="float")
    for kind, mask in added.items():
        assert mask.dtype == dtype
        assert torch.equal(mask == 0, allowed[kind])
        assert bool((mask[~allowed[kind]] == torch.finfo(dtype).min).all())


def test_the_form_follows_the_attention() -> None:
    assert hf.mask_form("t", tiny("llama", layers=1, attn="eager")) == "float"
    assert hf.mask_form("t", tiny("llama", layers=1, attn="sdpa")) == "bool"
    for name in ("flash_attention_2", "flash_attention_3", "flex_attention", "paged|sdpa"):
        model = tiny("llama", layers=1)
        model.config._attn_implementation = name
        with pytest.raises(UnsupportedError, match="tree mask") as refused:
            hf.mask_form("TheMethod", model)
        assert name in str(refused.value)
        assert "set_attn_implementation('sdpa')" in str(refused.value)


def test_kinds_of_layers() -> None:
    assert hf.layer_kinds("t", tiny("llama")) == ["full_attention"] * 2
    assert set(hf.layer_kinds("t", tiny("gemma3"))) == {"full_attention", "sliding_attention"}
    model = tiny("llama")
    model.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(UnsupportedError, match="linear_attention"):
        hf.layer_kinds("t", model)
