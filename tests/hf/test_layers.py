from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

import tokenmill.models as models
from tokenmill import hf
from tokenmill.errors import LimitError, UnsupportedError
from tokenmill.hf.cache import keep_rows, recording

KINDS = ("llama", "qwen2", "gemma3")
IDS = torch.randint(1, 64, (2, 40), generator=torch.Generator().manual_seed(5))


def track(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, *, call: hf.Call, **kw: Any) -> Any:
    """Keeps two numbers of every key and the input of every token; both must stay beside their keys."""
    assert call.hidden_states is not None
    assert call.past_key_values is not None
    visible = key.shape[2]
    layer = hf.token_state(call.past_key_values, call.layer_idx, visible=visible)
    new = layer.missing("tip")
    tip = layer.append_state("tip", key[:, :, visible - new :, :2])
    assert torch.equal(tip, key[..., :2])
    if layer.missing("input") <= call.hidden_states.shape[1]:
        seen = layer.append_state("input", call.hidden_states[:, -layer.missing("input") :], dim=1)
        projected = module.v_proj(seen).view(*seen.shape[:2], -1, value.shape[-1]).transpose(1, 2)
        torch.testing.assert_close(projected, value, atol=1e-4, rtol=1e-4)
        call.state.append(new)
    return call.inner(module, query, key, value, mask, **kw)


@pytest.fixture(scope="module", autouse=True)
def _pairs() -> None:
    hf.register("test-track", track)


def run(model: Any, cache: Any, ids: Tensor) -> Tensor:
    start = cache.get_seq_length()
    positions = torch.arange(start, start + ids.shape[1])[None]
    with torch.no_grad():
        return model(ids, past_key_values=cache, position_ids=positions).logits


def fresh(model: Any, ids: Tensor) -> Any:
    """The cache of a run over ``ids``, token by token from the 11th on, with state."""
    cache = hf.stateful_cache(model)
    with hf.attached(model, "test-track", state=[]):
        run(model, cache, ids[:, :10])
        for at in range(10, ids.shape[1]):
            run(model, cache, ids[:, at : at + 1])
    return cache


def assert_same(found: Any, wanted: Any) -> None:
    for left, right in zip(found.layers, wanted.layers, strict=True):
        assert left.get_seq_length() == right.get_seq_length()
        torch.testing.assert_close(left.keys, right.keys, atol=1e-4, rtol=1e-4)
        for name in ("tip", "input"):
            torch.testing.assert_close(left.state(name), right.state(name), atol=1e-4, rtol=1e-4)
        assert torch.equal(left.state("tip"), left.keys[..., :2])


@pytest.mark.parametrize("kind", KINDS)
def test_the_cache_computes_what_an_ordinary_one_does(kind: str) -> None:
    model: Any = models.tiny(kind)
    ours, plain = hf.stateful_cache(model), DynamicCache(config=model.config)
    for piece in IDS.split([20, 1, 1, 18], dim=1):
        assert torch.equal(run(model, ours, piece), run(model, plain, piece))
    types = [type(layer).__name__ for layer in plain.layers]
    assert [type(layer).__mro__[2].__name__ for layer in ours.layers] == types


@pytest.mark.parametrize("kind", KINDS)
def test_state_grows_with_the_tokens(kind: str) -> None:
    model: Any = models.tiny(kind)
    calls: list[int] = []
    with hf.attached(model, "test-track", state=calls):
        cache = model.generate(IDS, max_new_tokens=20, do_sample=False, return_dict_in_generate=True).past_key_values
    layers = len(cache.layers)
    assert calls == [40] * layers + [1] * 19 * layers  # generate made the cache, and nothing was computed twice
    for layer in cache.layers:
        kept = 15 if layer.is_sliding else 59
        assert layer.state("tip").shape[2] == layer.state("input").shape[1] == layer.keys.shape[2] == kept
        assert layer._columns["tip"].value.shape[2] == kept + layer.is_sliding  # old rows are let go


@pytest.mark.parametrize("kind", KINDS)
def test_crop_equals_a_fresh_run(kind: str) -> None:
    model: Any = models.tiny(kind)
    cache = fresh(model, IDS[:, :20])
    cache.activate_past_recording()
    with hf.attached(model, "test-track", state=[]):
        run(model, cache, IDS[:, 30:36])
        cache.crop(-6)
        run(model, cache, IDS[:, 20:24])
        cache.crop(-1)
    assert_same(cache, fresh(model, IDS[:, :23]))
    with hf.attached(model, "test-track", state=[]):
        run(model, cache, IDS[:, 23:30])
        cache.crop(0)
    assert_same(cache, fresh(model, IDS[:, :30]))


@pytest.mark.parametrize("kind", KINDS)
def test_selected_rows_equal_a_fresh_run(kind: str) -> None:
    model: Any = models.tiny(kind)
    cache = fresh(model, IDS[:, :20])
    cache.activate_past_recording()
    with hf.attached(model, "test-track", state=[]):
        # Two drafts of the same place; the second is kept.
        draft = torch.cat([IDS[:, 33:34], IDS[:, 20:22]], dim=1)
        mask = torch.ones(2, 1, 3, 23, dtype=torch.bool).tril(20)
        mask[:, :, 1:, 20] = False
        window = torch.ones(3, 23).triu(20 - 15 + 1).bool()  # row 23 stands at position 22
        masks: Any = {"full_attention": mask, "sliding_attention": (mask & window)[..., -18:]}
        positions = torch.tensor([[20, 20, 21]])
        given = masks if kind == "gemma3" else mask
        with torch.no_grad():
            model(draft, past_key_values=cache, position_ids=positions, attention_mask=given)
        for layer in cache.layers:
            layer.select_rows(torch.tensor([*range(20), 21, 22]))
    for left, right in zip(cache.layers, fresh(model, IDS[:, :22]).layers, strict=True):
        assert isinstance(left, hf.StatefulLayer | hf.StatefulSlidingLayer)
        assert left.get_seq_length() == 22
        assert left.keys is not None
        assert torch.equal(left.state("tip"), left.keys[..., :2])
        assert left.keys.shape == right.keys.shape
        assert left.state("input").shape == right.state("input").shape
    if kind != "gemma3":
        assert_same(cache, fresh(model, IDS[:, :22]))


@pytest.mark.parametrize("keep", [[0, 1], [1, 4], []])
@pytest.mark.parametrize("kind", KINDS)
def test_a_decoder_drops_its_drafts_from_both_caches_alike(kind: str, keep: list[int]) -> None:
    model: Any = models.tiny(kind)
    ours, plain = hf.stateful_cache(model), DynamicCache(config=model.config)
    with hf.attached(model, "test-track", state=[]):
        for cache in (ours, plain):
            run(model, cache, IDS[:, :20])
            with recording(cache):
                run(model, cache, IDS[:, 20:25])
                keep_rows(cache, 5, torch.tensor(keep, dtype=torch.long))
    for left, right in zip(ours.layers, plain.layers, strict=True):
        assert isinstance(left, hf.StatefulLayer | hf.StatefulSlidingLayer)
        assert left.get_seq_length() == 20 + len(keep)
        assert torch.equal(left.keys, right.keys)  # type: ignore[arg-type]
        assert torch.equal(left.state("tip"), left.keys[..., :2])  # type: ignore[index]
    assert torch.equal(run(model, ours, IDS[:, 30:32]), run(model, plain, IDS[:, 30:32]))


def test_rows_selected_by_item() -> None:
    layer = hf.StatefulLayer()
    keys = torch.arange(2 * 1 * 5 * 2.0).view(2, 1, 5, 2)
    layer.update(keys, keys)
    layer.append_state("place", torch.arange(10).view(2, 5), dim=1)
    layer.append_state("flat", keys[:, 0], dim=1)
    layer.select_rows(torch.tensor([[0, 2, 3], [1, 2, 4]]))
    assert layer.state("place").tolist() == [[0, 2, 3], [6, 7, 9]]
    assert torch.equal(layer.state("flat"), layer.keys[:, 0])  # type: ignore[index]
    assert layer.get_seq_length() == 3


@pytest.mark.parametrize("kind", KINDS)
def test_batch_changes_take_the_state_along(kind: str) -> None:
    model: Any = models.tiny(kind)
    cache = fresh(model, IDS[:, :18])
    cache.reorder_cache(torch.tensor([1, 1]))
    assert_same(cache, fresh(model, IDS[[1, 1], :18]))
    cache = fresh(model, IDS[:, :18])
    cache.batch_repeat_interleave(2)
    assert_same(cache, fresh(model, IDS[[0, 0, 1, 1], :18]))
    cache.batch_select_indices(torch.tensor([3, 0]))
    assert_same(cache, fresh(model, IDS[[1, 0], :18]))
    for layer in cache.layers:
        layer.offload()
        layer.prefetch()
    cache.reset()
    assert all(layer.get_seq_length() == 0 and layer.missing("tip") == 0 for layer in cache.layers)
    with hf.attached(model, "test-track", state=[]):
        run(model, cache, IDS[:, :9])
    assert cache.layers[-1].state("tip").shape[2] == 9


@pytest.mark.parametrize("kind", KINDS)
def test_beam_search(kind: str) -> None:
    model: Any = models.tiny(kind)
    beams = {"num_beams": 2, "num_return_sequences": 2, "max_new_tokens": 12, "do_sample": False}
    plain = model.generate(IDS, **beams)
    cache = hf.stateful_cache(model)
    calls: list[int] = []
    with hf.attached(model, "test-track", state=calls):  # it compares state and keys after every reorder
        found = model.generate(IDS, past_key_values=cache, **beams)
    assert torch.equal(found, plain)
    assert calls[-1] == 1
    assert len(calls) == 12 * len(cache.layers)


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_state_that_starts_late_is_asked_for_as_a_whole(kind: str) -> None:
    model: Any = models.tiny(kind)
    cache = DynamicCache(config=model.config)
    run(model, cache, IDS[:, :20])
    wanted = 20 if kind == "llama" else 15
    layer = hf.token_state(cache, 0)
    assert layer.missing("tip") == wanted
    run(model, cache, IDS[:, 20:22])
    assert layer.missing("tip") == wanted + 2
    layer.append_state("tip", torch.zeros(2, 4 if kind == "llama" else 1, wanted + 2, 3))
    run(model, cache, IDS[:, 22:25])  # a forward that nobody watched
    assert layer.missing("tip") == 3
    with pytest.raises(LimitError, match="3 rows have none"):
        layer.state("tip")
    if kind == "gemma3":
        with pytest.raises(UnsupportedError, match="15 of the 24 rows, and 14 are left"):
            layer.select_rows(torch.arange(24))
    cache.activate_past_recording()
    run(model, cache, IDS[:, 25:26])
    layer.select_rows(torch.arange(25))
    assert layer.missing("tip") == layer.keys.shape[2] == (25 if kind == "llama" else 15)  # type: ignore[union-attr]


def test_state_may_be_read_again_in_the_same_forward() -> None:
    layer = hf.StatefulSlidingLayer(sliding_window=4)
    keys = torch.arange(6.0).view(1, 1, 6, 1)
    for piece in keys.split([5, 1], dim=2):
        seen, _ = layer.update(piece, piece)
        new = layer.missing("a")
        assert torch.equal(layer.append_state("a", seen[:, :, seen.shape[2] - new :]), seen)
        assert layer.missing("a") == 0
        assert torch.equal(layer.append_state("a", seen[:, :, :0]), seen)
        assert layer.state("a").flatten().tolist() == layer.keys.flatten().tolist()  # type: ignore[union-attr]
    assert layer.state("a").flatten().tolist() == [3, 4, 5]


def test_a_deep_crop_brings_back_rows_without_state() -> None:
    layer = hf.StatefulSlidingLayer(sliding_window=4)
    layer.activate_past_recording()
    keys = torch.arange(9.0).view(1, 1, 9, 1)
    layer.update(keys[:, :, :6], keys[:, :, :6])
    seen, _ = layer.update(keys[:, :, 6:], keys[:, :, 6:])
    assert seen.flatten().tolist() == [3, 4, 5, 6, 7, 8]
    layer.append_state("a", seen)
    layer.crop(-5)
    with pytest.raises(LimitError, match="2 rows have none"):
        layer.state("a")
    seen, _ = layer.update(keys[:, :, 4:5], keys[:, :, 4:5])
    assert seen.flatten().tolist() == [1, 2, 3, 4]
    assert layer.missing("a") == 4


def test_bad_arguments() -> None:
    layer = hf.StatefulLayer()
    layer.update(torch.zeros(2, 1, 4, 2), torch.zeros(2, 1, 4, 2))
    with pytest.raises(LimitError, match="4, the rows without state"):
        layer.append_state("a", torch.zeros(2, 1, 3, 2))
    with pytest.raises(LimitError, match="batch size 2"):
        layer.append_state("a", torch.zeros(1, 1, 4, 2))
    with pytest.raises(LimitError, match="dim = 0"):
        layer.append_state("a", torch.zeros(4, 2), dim=0)
    with pytest.raises(LimitError, match=r"in \[0, 3\]"):
        layer.select_rows(torch.tensor([4]))
    with pytest.raises(LimitError, match=r"index\.dim"):
        layer.select_rows(torch.zeros(1, 1, 1, dtype=torch.long))
    with pytest.raises(LimitError, match="'b'"):
        layer.state("b")
    model: Any = models.tiny("llama")
    with pytest.raises(UnsupportedError, match="StaticLayer"):
        hf.token_state(StaticCache(config=model.config, max_cache_len=8), 0)


def test_appending_writes_in_place_and_never_into_what_others_hold() -> None:
    layer = hf.StatefulLayer()
    rows = torch.randn(2, 1, 40, 4, generator=torch.Generator().manual_seed(0))

    def put(start: int, stop: int, source: Tensor = rows) -> Tensor:
        layer.update(source[:, :, start:stop], source[:, :, start:stop])
        return layer.append_state("x", source[:, :, start:stop])

    put(0, 20)
    first = put(20, 21)
    assert put(21, 22).data_ptr() == first.data_ptr()
    assert torch.equal(first, rows[:, :, :21])
    layer.crop(-2)
    assert torch.equal(put(30, 31), torch.cat([rows[:, :, :20], rows[:, :, 30:31]], 2))
    layer.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(layer.state("x")[0], layer.keys[0])
    with torch.inference_mode():
        put(31, 32)
    assert torch.equal(put(32, 33)[:, :, -2:], rows[:, :, 31:33])
    weight = torch.ones((), requires_grad=True)
    put(33, 34, rows * weight).sum().backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, rows[:, :, 33].sum())
