from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicSlidingWindowLayer, StaticCache

from tokenmill import hf
from tokenmill.errors import UnsupportedError
from tokenmill.models import tiny

KINDS = ("llama", "qwen2", "gemma3")
WINDOW = 16


def tokens(n: int, seed: int = 0) -> Tensor:
    return torch.randint(1, 64, (1, n), generator=torch.Generator().manual_seed(seed))


def prefilled(model: Any, ids: Tensor) -> Any:
    cache = DynamicCache(config=model.config)
    model(input_ids=ids, past_key_values=cache)
    return cache


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("past", [3, 14, 16, 40])
@pytest.mark.parametrize(
    "keep", [[], [0], [0, 1, 2], [0, 1, 2, 3, 4, 5], [2], [0, 2, 5], [1, 3, 4]], ids=lambda k: "-".join(map(str, k))
)
@torch.no_grad()
def test_kept_rows_are_those_of_a_forward_over_them_alone(kind: str, past: int, keep: list[int]) -> None:
    """Six siblings behind one past: each sees the past and itself, so any of them stand alone as well."""
    model, ids, new = tiny(kind), tokens(past), tokens(6, seed=1)
    cache: Any = prefilled(model, ids)
    with hf.recording(cache):
        siblings = torch.eye(6, dtype=torch.bool)
        mask = hf.tree_masks(
            model, cache, siblings, torch.zeros(6, dtype=torch.long), kinds=hf.layer_kinds("t", model), form="bool"
        )
        model(
            input_ids=new,
            attention_mask=mask,
            position_ids=torch.full((1, 6), past),
            past_key_values=cache,
        )
        hf.keep_rows(cache, 6, torch.tensor(keep, dtype=torch.long))
        assert cache.get_seq_length() == past + len(keep)
    layers: list[Any] = cache.layers
    for i, layer in enumerate(layers):
        rows = layer.keys.shape[-2]
        assert layer.get_seq_length() == past + len(keep)
        if layer.is_sliding:
            assert rows == min(past + len(keep), WINDOW - 1)
        else:
            assert rows == past + len(keep)
        for place, node in enumerate(keep):
            alone = prefilled(model, ids)
            model(input_ids=new[:, node : node + 1], position_ids=torch.tensor([[past]]), past_key_values=alone)
            at = rows - len(keep) + place
            for ours, theirs in ((layer.keys, alone.layers[i].keys), (layer.values, alone.layers[i].values)):
                assert torch.allclose(ours[:, :, at], theirs[:, :, -1], atol=1e-4)
    old: Any = prefilled(model, ids)
    for layer, before in zip(layers, old.layers, strict=True):
        kept_past = layer.keys.shape[-2] - len(keep)
        assert torch.equal(layer.keys[:, :, :kept_past], before.keys[:, :, before.keys.shape[-2] - kept_past :])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_next_token_after_a_rejected_draft_is_that_of_plain_decoding(kind: str) -> None:
    model = tiny(kind)
    for past in (4, 15, 16, 30):
        ids, wrong = tokens(past), tokens(5, seed=2)
        cache = prefilled(model, ids)
        with hf.recording(cache):
            for kept in (0, 2, 1):
                model(input_ids=wrong, past_key_values=cache)
                hf.keep_rows(cache, 5, torch.arange(kept))
                ids = torch.cat([ids, wrong[:, :kept]], dim=1)
        # Outside `recording` the cache goes on as an ordinary one.
        for step in range(3):
            token = tokens(1, seed=step)
            ids = torch.cat([ids, token], dim=1)
            ours = model(input_ids=token, past_key_values=cache).logits[0, -1]
            assert torch.allclose(ours, model(input_ids=ids).logits[0, -1], atol=1e-3)


@torch.no_grad()
def test_recording_is_given_back_also_after_an_error() -> None:
    model = tiny("gemma3")
    cache = prefilled(model, tokens(20))
    sliding = [layer for layer in cache.layers if isinstance(layer, DynamicSlidingWindowLayer)]
    assert len(sliding) >= 2
    sliding[0].activate_past_recording()  # the caller's own wish stays

    def fails() -> None:
        with hf.recording(cache):
            assert all(layer.record_past for layer in sliding)
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert [layer.record_past for layer in sliding] == [True] + [False] * (len(sliding) - 1)


def test_ordinary_caches_pass() -> None:
    for kind in KINDS:
        model = tiny(kind)
        for cache in (DynamicCache(), DynamicCache(config=model.config), prefilled(model, tokens(3))):
            assert hf.check_cache("t", cache) is cache


def test_other_caches_are_refused_by_name() -> None:
    model = tiny("llama")
    offloaded = DynamicCache(config=model.config)
    offloaded.offloading = True
    odd: Any = DynamicCache(config=model.config)
    odd.layers[1] = type("QuantizedLayer", (type(odd.layers[1]),), {})()
    static = StaticCache(config=model.config, max_cache_len=8)
    for cache, word in (
        (None, "NoneType"),
        (((torch.zeros(1),),), "tuple"),
        (static, "StaticCache"),
        (odd, "QuantizedLayer"),
        (offloaded, "offloading"),
    ):
        with pytest.raises(UnsupportedError, match=word) as refused:
            hf.check_cache("TheMethod", cache)
        assert "TheMethod" in str(refused.value)
        assert "cache_implementation=None" in str(refused.value)
