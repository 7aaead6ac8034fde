"""What methods keep beside a cache follows the cache."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from tokenmill import attend, hf
from tokenmill.attend._baselines import Pages
from tokenmill.attend.tokenselect import SelectionCache
from tokenmill.hf.cache import keep_rows, record_past

from .methods import IDS, KINDS, PADDING, SMALL, cases, model, run

CASES = cases()
FILLED = 30  # columns before anything happens to the cache


def filled(tiny: Any, ids: Tensor = IDS, mask: Tensor = PADDING, *, upto: int = FILLED) -> Any:
    """A cache after a prefill of 24 tokens and single steps up to ``upto``."""
    cache = run(tiny, ids[:, :24], mask[:, :24]).past_key_values
    for at in range(24, upto):
        run(tiny, ids[:, at : at + 1], mask[:, : at + 1], cache=cache, at=at)
    return cache


def go_on(tiny: Any, cache: Any, ids: Tensor = IDS, mask: Tensor = PADDING, *, at: int = FILLED) -> Tensor:
    """Logits of six further steps."""
    parts = [
        run(tiny, ids[:, i : i + 1], mask[:, : i + 1], cache=cache, at=i).logits for i in range(at, min(at + 6, 40))
    ]
    return torch.cat(parts, 1)


def assert_same(found: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(found, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_after_a_crop_it_goes_on_like_a_fresh_run(kind: str, name: str) -> None:
    tiny = model(kind)
    for back in (1, 3):
        with CASES[name].attach(tiny):
            cache = filled(tiny)
            record_past(cache)
            other = torch.flip(IDS, [1])
            for at in range(FILLED, FILLED + back):
                run(tiny, other[:, at : at + 1], PADDING[:, : at + 1], cache=cache, at=at)
            cache.crop(-back)
            fresh = filled(tiny)
            forget_what_went(cache, fresh)
            assert_same(go_on(tiny, cache), go_on(tiny, fresh))


def forget_what_went(cropped: Any, fresh: Any) -> None:
    """A selection that a cropped token made is gone, and so is the one it replaced: let the fresh run lack it too."""
    for mine, other in zip(cropped.layers, fresh.layers, strict=True):
        for name, follower in getattr(mine, "_followers", {}).items():
            if isinstance(follower, SelectionCache):
                for key, entry in follower._entries.items():
                    theirs = other._followers[name]._entries[key]
                    theirs.since = theirs.since.masked_fill(entry.since < 0, -1)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_move_go_on_like_fresh_ones(kind: str, name: str) -> None:
    tiny = model(kind)
    swap, both = torch.tensor([1, 0]), torch.tensor([0, 0, 1, 1])
    with CASES[name].attach(tiny):
        want = go_on(tiny, filled(tiny))
        cache = filled(tiny)
        cache.reorder_cache(swap)
        assert_same(go_on(tiny, cache, IDS[swap], PADDING[swap]), want[swap])
        cache = filled(tiny)
        cache.batch_repeat_interleave(2)
        assert_same(go_on(tiny, cache, IDS[both], PADDING[both]), want[both])
        cache = filled(tiny)
        cache.batch_select_indices(torch.tensor([1]))
        # Alone, the rows beside it no longer decide how wide a set is.
        assert_same(go_on(tiny, cache, IDS[1:], PADDING[1:]), want[1:])


@pytest.mark.parametrize("name", CASES)
def test_a_cache_that_is_reset_is_a_new_one(name: str) -> None:
    tiny = model("gemma3")
    with CASES[name].attach(tiny):
        cache = filled(tiny)
        cache.reset()
        other = torch.flip(IDS, [0])
        run(tiny, other[:, :20], cache=cache)
        found = go_on(tiny, cache, other, torch.ones_like(IDS), at=20)
        cache = run(tiny, other[:, :20]).past_key_values
        assert_same(found, go_on(tiny, cache, other, torch.ones_like(IDS), at=20))


@pytest.mark.parametrize("name", ["tokenselect each step", "streaming", "snapkv", "quest"])
def test_rows_of_a_draft_that_are_kept_are_like_fresh_ones(name: str) -> None:
    tiny, ids = model("qwen2", layers=1), IDS[1:]  # one layer, so that keys do not depend on what was read before
    mask = torch.ones_like(ids)
    with CASES[name].attach(tiny), torch.no_grad():
        cache = filled(tiny, ids, mask)
        for at in (35, 30, 31):  # the first of three is rejected
            tiny(input_ids=ids[:, at : at + 1], position_ids=torch.tensor([[at]]), past_key_values=cache)
        keep_rows(cache, 3, torch.tensor([1, 2]))
        assert cache.get_seq_length() == 32
        assert_same(
            go_on(tiny, cache, ids, mask, at=32), go_on(tiny, filled(tiny, ids, mask, upto=32), ids, mask, at=32)
        )


def test_a_selection_that_is_cropped_away_is_made_anew() -> None:
    cache, query = SelectionCache(-1.0), torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    cache.put(0, query, torch.tensor([[1, 4], [2, 5], [3, 9]]), since=torch.tensor([20, 24, 20]))
    cache.crop(22)
    found = cache.get(0, query)
    assert found is not None
    assert found.tolist() == [[1, 4], [-1, -1], [3, 9]]
    cache.crop(9)
    assert cache.get(0, query) is None
    cache.put(0, query, torch.tensor([[1, 4], [2, 5], [3, 9]]))
    cache.crop(9)
    found = cache.get(0, query)
    assert found is not None
    assert found.tolist() == [[1, 4], [2, 5], [-1, -1]]


@pytest.mark.parametrize("theta", [-1.0, 0.3])
def test_a_selection_from_before_the_crop_stays(theta: float) -> None:
    tiny = model("qwen2")
    method = attend.TokenSelect(**SMALL, theta=theta)
    with method.attach(tiny) as trace:
        cache = filled(tiny)
        before = [copy.deepcopy(layer.follower("tokenselect", SelectionCache)._entries) for layer in cache.layers]
        made = trace.selections
        run(tiny, IDS[:, 30:31], PADDING[:, :31], cache=cache, at=30)
        again = trace.selections > made
        cache.crop(-1)
        for layer, entries in zip(cache.layers, before, strict=True):
            (old,), (new,) = entries.values(), layer.follower("tokenselect", SelectionCache)._entries.values()
            kept = new.since >= 0
            assert torch.equal(new.index[kept], old.index[kept])
            assert torch.equal(new.since[kept], old.since[kept])
            assert again or bool(kept.all())


def test_what_a_prompt_left_goes_with_the_prompt() -> None:
    tiny = model("qwen2")
    with attend.SnapKV(keep=9, window=4, pool=3).attach(tiny) as trace:
        cache = filled(tiny)  # the prompt has 24 tokens
        cache.crop(-8)
        sparse = trace.sparse_calls
        run(tiny, IDS[:, 22:23], PADDING[:, :23], cache=cache, at=22)
    assert trace.sparse_calls == sparse, "a part of the prompt is not what it chose from"


def test_pages_are_those_of_a_loop_whatever_happens() -> None:
    generator = torch.Generator().manual_seed(0)
    key = torch.randn(2, 2, 37, 4, generator=generator)
    valid = torch.arange(37).expand(2, -1) >= torch.tensor([0, 9])[:, None]
    pages = Pages(5)

    def check(rows: Tensor, real: Tensor) -> None:
        low, high, some = pages.update(rows, real)
        count = -(-rows.shape[2] // 5)
        assert low.shape[2] == high.shape[2] == some.shape[1] == count
        for b in range(len(rows)):
            for page in range(count):
                at = [s for s in range(5 * page, min(5 * page + 5, rows.shape[2])) if real[b, s]]
                assert bool(some[b, page]) == bool(at)
                if at:
                    assert torch.equal(low[b, :, page], rows[b][:, at].amin(1))
                    assert torch.equal(high[b, :, page], rows[b][:, at].amax(1))

    for length in (3, 4, 18, 19, 20, 21, 37):
        check(key[:, :, :length], valid[:, :length])
    pages.crop(22)
    changed = torch.cat([key[:, :, :22], key[:, :, :9] * 2], 2)
    check(changed, valid[:, :31])
    swap = torch.tensor([1, 0, 0])
    pages.each(lambda x: x[swap])
    check(changed[swap], valid[swap][:, :31])


def test_followers_move_with_their_layer() -> None:
    layer = hf.StatefulLayer()
    key = torch.randn(2, 1, 6, 4, generator=torch.Generator().manual_seed(0))
    layer.update(key, key)
    cache = layer.follower("x", lambda: SelectionCache(-1.0))
    assert layer.follower("x", lambda: SelectionCache(0.0)) is cache
    query = torch.randn(2, 3, generator=torch.Generator().manual_seed(1))
    cache.put(0, query, torch.tensor([[0, 1], [2, 3]]), since=torch.tensor([4, 6]))
    layer.crop(0)
    assert cache.stored(0)[1].tolist() == [4, 6]
    layer.select_rows(torch.tensor([0, 1, 2, 3, 5]))
    assert cache.stored(0)[1].tolist() == [4, -1]
    layer.select_rows(torch.arange(5))
    assert cache.stored(0)[1].tolist() == [4, -1]
    layer.offload()
    layer.prefetch()
    layer.reset()
    assert layer.follower("x", lambda: SelectionCache(0.0)) is not cache
