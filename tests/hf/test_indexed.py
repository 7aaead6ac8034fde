from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.cache_utils import DynamicLayer

import tokenmill.models as models
from tests.hf import vlms
from tokenmill import hf
from tokenmill.errors import LimitError

KINDS = ("llama", "qwen2", "gemma3")
IDS = torch.randint(1, 64, (2, 40), generator=torch.Generator().manual_seed(7))


def states(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, rows, 4, generator=generator), torch.randn(2, 3, rows, 5, generator=generator)


def forward(model: Any, ids: Tensor, cache: Any, positions: Tensor | None = None, mask: Any = None) -> Tensor:
    if positions is not None and positions.dim() == 1:
        positions = positions[None]
    with torch.no_grad():
        return model(ids, past_key_values=cache, position_ids=positions, attention_mask=mask).logits


def bidirectional(kind: str, attn: str) -> Any:
    settings: dict[str, Any] = {**vlms.TEXT, "is_causal": False, "attn_implementation": attn, "initializer_range": 0.3}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        if kind == "llama":
            return LlamaForCausalLM(LlamaConfig(**settings)).eval()
        return Qwen2ForCausalLM(Qwen2Config(**settings)).eval()


@pytest.mark.parametrize("capacity", [None, 30])
def test_appending_and_reading_all_is_a_dynamic_layer(capacity: int | None) -> None:
    ours, plain = hf.IndexedLayer(capacity), DynamicLayer()
    for seed, rows in enumerate([4, 1, 1, 9, 1]):
        assert ours.get_mask_sizes(rows) == plain.get_mask_sizes(rows)
        for left, right in zip(ours.update(*states(rows, seed)), plain.update(*states(rows, seed)), strict=True):
            assert torch.equal(left, right)
        assert ours.get_seq_length() == plain.get_seq_length()
    changes: list[Any] = [
        lambda layer: layer.crop(-3),
        lambda layer: layer.reorder_cache(torch.tensor([1, 0])),
        lambda layer: layer.batch_repeat_interleave(2),
        lambda layer: layer.batch_select_indices(torch.tensor([3, 0])),
        lambda layer: layer.update(*states(2, 9)),
        lambda layer: layer.crop(0),
    ]
    for change in changes:
        change(ours)
        change(plain)
        assert torch.equal(ours.keys, plain.keys)  # type: ignore[arg-type]
        assert torch.equal(ours.values, plain.values)  # type: ignore[arg-type]
    ours.reset()
    assert ours.get_seq_length() == 0
    assert torch.equal(ours.update(*states(3, 1))[0], states(3, 1)[0])


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_without_a_plan_the_model_sees_an_ordinary_cache(kind: str, attn: str) -> None:
    model: Any = models.tiny(kind, attn=attn)
    ours, plain = hf.IndexedCache(model), DynamicCache()
    for piece in IDS.split([20, 1, 1, 18], dim=1):
        assert torch.equal(forward(model, piece, ours), forward(model, piece, plain))
    for settings in ({}, {"num_beams": 2}):
        cache = hf.IndexedCache(model, capacity=60)
        found = model.generate(IDS, past_key_values=cache, max_new_tokens=10, do_sample=False, **settings)
        assert torch.equal(found, model.generate(IDS, max_new_tokens=10, do_sample=False, **settings))
        assert cache.get_seq_length() == 49


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_recomputing_any_rows_gives_the_full_pass(kind: str, attn: str) -> None:
    model = bidirectional(kind, attn)
    cache = hf.IndexedCache(model)
    everything = torch.arange(40)
    full = forward(model, IDS, None, everything)
    torch.testing.assert_close(forward(model, IDS, cache, everything), full)
    for rows in (torch.tensor([3, 17, 39]), torch.tensor([25]), everything.flip(0)):
        cache.plan(write=rows)
        mask = cache.mask(len(rows), causal=False)
        for given in (mask, None):
            # Eager attention takes additive masks only.
            if given is not None and attn == "eager":
                continue
            found = forward(model, IDS[:, rows], cache, rows, given)
            torch.testing.assert_close(found, full[:, rows], atol=1e-4, rtol=1e-4)
    assert cache.get_seq_length() == 40


def test_changed_rows_change_what_the_others_see() -> None:
    model = bidirectional("llama", "sdpa")
    model.model.layers = model.model.layers[:1]  # with one layer, keys and values depend on their own token only
    cache = hf.IndexedCache(1)
    forward(model, IDS, cache, torch.arange(40))
    changed = IDS.clone()
    changed[:, 30:32] = 5
    rows = torch.arange(28, 36)
    cache.plan(write=rows)
    found = forward(model, changed[:, rows], cache, rows)
    full = forward(model, changed, None, torch.arange(40))
    torch.testing.assert_close(found, full[:, rows], atol=1e-4, rtol=1e-4)


def test_a_read_subset_is_the_pruned_sequence() -> None:
    model = bidirectional("qwen2", "sdpa")
    kept = torch.tensor([0, 1, 5, 8, 20, 21, 22, 33])
    cache = hf.IndexedCache(model)
    cache.plan(write=kept, read=kept)
    pruned = forward(model, IDS[:, kept], cache, kept)
    torch.testing.assert_close(pruned, forward(model, IDS[:, kept], None, kept))
    assert cache.get_seq_length() == 34
    # Now all rows are there, and a pass over some reads the kept ones only.
    cache = hf.IndexedCache(model)
    forward(model, IDS[:, kept], cache, kept)
    assert cache.get_seq_length() == 8
    cache.plan(write=torch.tensor([8, 9]), read=torch.arange(2, 10))
    assert cache.get_mask_sizes(2, 0) == (8, 0)
    cache.plan(write=torch.tensor([8, 9]), read=torch.arange(3, 10))
    assert cache.get_mask_sizes(2, 0) == (7, 0)
    cache.plan(write=torch.tensor([8, 9]), read=torch.arange(2, 10))
    found = forward(model, IDS[:, 34:36], cache, torch.tensor([34, 35]))
    cache.plan(read=torch.arange(2, 10), write=torch.tensor([8, 9]))
    torch.testing.assert_close(forward(model, IDS[:, 34:36], cache, torch.tensor([34, 35])), found)
    cache.plan(write=torch.tensor([8, 9]))
    assert not torch.allclose(forward(model, IDS[:, 34:36], cache, torch.tensor([34, 35])), found)


def test_rows_by_item_and_padding() -> None:
    model = bidirectional("llama", "sdpa")
    lengths = [40, 31]
    padding = torch.ones(2, 40, dtype=torch.long)
    padding[1, :9] = 0
    ids = IDS.clone()
    ids[1, 9:] = IDS[1, :31]
    positions = (padding.cumsum(-1) - 1).clamp(min=0)
    alone = [forward(model, IDS[b : b + 1, :n], None, torch.arange(n)) for b, n in enumerate(lengths)]
    cache = hf.IndexedCache(model)
    cache.plan(write=torch.arange(40))
    together = forward(model, ids, cache, positions, cache.mask(40, causal=False, padding=padding))
    torch.testing.assert_close(together[1:, 9:], alone[1], atol=1e-4, rtol=1e-4)
    rows = torch.tensor([[2, 30, 39], [11, 12, 38]])
    read = torch.stack([torch.randperm(40), torch.randperm(40)])
    for seen in (None, read):
        cache.plan(write=rows, read=seen)
        mask = cache.mask(3, causal=False, padding=padding)
        found = forward(model, ids.gather(1, rows), cache, positions.gather(1, rows), mask)
        torch.testing.assert_close(found[0], alone[0][0, rows[0]], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found[1], alone[1][0, rows[1] - 9], atol=1e-4, rtol=1e-4)
    cache.reorder_cache(torch.tensor([1, 0]))
    mask = cache.mask(3, causal=False, padding=padding.flip(0))
    back = rows.flip(0)
    again = forward(model, ids.flip(0).gather(1, back), cache, positions.flip(0).gather(1, back), mask)
    torch.testing.assert_close(again.flip(0), found, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_causal_masks_and_windows(kind: str) -> None:
    model: Any = models.tiny(kind)
    full = forward(model, IDS, None, torch.arange(40))
    cache = hf.IndexedCache(model)
    for rows in (torch.arange(30), torch.tensor([12, 35]), torch.tensor([30, 31, 32, 33, 34]), torch.arange(34, 40)):
        cache.plan(write=rows)
        mask: Any = cache.mask(len(rows), causal=True)
        if kind == "gemma3":
            mask = {"full_attention": mask, "sliding_attention": cache.mask(len(rows), causal=True, window=16)}
        found = forward(model, IDS[:, rows], cache, rows, mask)
        if 35 not in rows.tolist()[:2]:  # row 35 was written before the rows that it follows
            torch.testing.assert_close(found, full[:, rows], atol=2e-4, rtol=1e-4)
    assert cache.mask(6, causal=True).shape == (1, 1, 6, 40)


def test_rows_that_nobody_wrote_are_hidden() -> None:
    cache = hf.IndexedCache(1)
    cache.plan(write=torch.tensor([1, 4]))
    assert cache.mask(2, causal=False)[0, 0].tolist() == [[False, True, False, False, True]] * 2
    cache.update(*states(2, 0), 0)
    with pytest.raises(LimitError, match="read = 2"):
        cache.plan(read=torch.tensor([1, 2]), write=torch.tensor([0]))
    cache.plan()
    cache.crop(-2)
    assert cache.mask(1, causal=True)[0, 0].tolist() == [[False, True, False, True]]
    cache.plan(write=torch.tensor([5]))
    assert cache.mask(1, causal=True)[0, 0].tolist() == [[False, True, False, False, False, True]]


def test_gradients_flow_through_written_rows() -> None:
    layer = hf.IndexedLayer(capacity=9)
    first, second = (states(2, seed)[0].requires_grad_() for seed in (0, 1))
    seen, _ = layer.update(first, first)
    square = (seen * seen).sum()  # its graph holds the rows as they are now
    seen, _ = layer.update(second, second)
    (square + seen.sum()).backward()
    assert first.grad is not None
    torch.testing.assert_close(first.grad, 2 * first.detach() + 1)
    assert torch.equal(second.grad, torch.ones_like(second))  # type: ignore[arg-type]


def test_bad_arguments() -> None:
    cache = hf.IndexedCache(2, capacity=8)
    with pytest.raises(LimitError, match="below the capacity 8"):
        cache.plan(write=torch.tensor([8]))
    with pytest.raises(LimitError, match="free of repeats"):
        cache.plan(write=torch.tensor([3, 1, 3]))
    with pytest.raises(LimitError, match="at least 0"):
        cache.plan(write=torch.tensor([-1]))
    with pytest.raises(LimitError, match="write"):
        cache.plan(write=torch.tensor([], dtype=torch.long))
    with pytest.raises(LimitError, match="read = 3"):
        cache.plan(write=torch.arange(3), read=torch.tensor([3]))
    cache.plan(write=torch.arange(3))
    with pytest.raises(LimitError, match="each of 2 tokens"):
        cache.update(*states(2, 0), 0)
    cache.plan(write=torch.tensor([[0], [1], [2]]))
    with pytest.raises(LimitError, match="each of 2 items"):
        cache.update(*states(1, 0), 0)
    cache.plan()
    with pytest.raises(LimitError, match="at most the capacity 8"):
        cache.update(*states(9, 0), 0)
    with pytest.raises(LimitError, match="at most 0"):
        cache.crop(3)
    for count, capacity in ((0, None), (1, 0)):
        with pytest.raises(LimitError, match="at least 1"):
            hf.IndexedCache(count, capacity=capacity)
