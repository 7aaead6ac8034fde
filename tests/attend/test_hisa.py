"""HISA: the pure selection against a loop, and the replaced indexer in tiny DeepSeek-V3.2 and GLM-5 models."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import tokenmill as tm
from tokenmill.attend import _block_attention
from tokenmill.attend.hisa import HISA, BlockKeys, hisa_select
from tokenmill.errors import LimitError, UnsupportedError

TYPES = ("deepseek_v32", "glm_moe_dsa")
TOP_K = 6


def made(seed: int, *, batch: int = 2, queries: int = 20, keys: int = 20, heads: int = 3, width: int = 5) -> Any:
    g = torch.Generator().manual_seed(seed)
    q, k = torch.randn(batch, queries, heads, width, generator=g), torch.randn(batch, keys, width, generator=g)
    # One head is never cut off by the relu, or keys that all heads turn away would tie at zero.
    k[..., -1] = k[..., -1].abs() + 0.1
    q[:, :, 0] = torch.tensor([0.0] * (width - 1) + [1.0])
    return q, k, torch.randn(batch, queries, heads, generator=g)


def flat(q: Tensor, k: Tensor, w: Tensor, valid: Tensor | None = None) -> Tensor:
    """DSA's scores (B, Sq, Sk), -inf at what a query may not see."""
    scores = torch.einsum("bqh,bqhk->bqk", w, torch.einsum("bqhd,bkd->bqhk", q, k).relu())
    seen = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
    return scores.masked_fill(~(seen if valid is None else seen & valid), -torch.inf)


def sets(index: Tensor, seen: Tensor) -> list[list[set[int]]]:
    """Chosen keys of each row and query, without those that only fill up."""
    return [
        [{i for i in row.tolist() if see[i]} for row, see in zip(rows, sees, strict=True)]
        for rows, sees in zip(index, seen, strict=True)
    ]


def wanted(scores: Tensor, k: int) -> list[list[set[int]]]:
    best = scores.topk(min(k, scores.shape[-1]), dim=-1).indices
    return sets(best, scores > -torch.inf)


def by_hand(
    q: Tensor, k: Tensor, w: Tensor, first: int, size: int, blocks: int, top_k: int, forced: str
) -> list[tuple[set[int], set[int]]]:
    """(candidates, chosen) of each query of one row, by loops over queries, blocks and tokens."""
    found = []
    total, offset = len(k), len(k) - len(q)
    for t in range(len(q)):
        own = offset + t
        if own < first:
            found.append((set(), set()))
            continue
        count = (own - first) // size + 1
        spans = [range(first + b * size, min(first + (b + 1) * size, total)) for b in range(count)]
        means = [torch.stack([k[s].double() for s in span]).mean(0) for span in spans]
        scores = [sum(float(w[t, h]) * max(0.0, float(q[t, h].double() @ m)) for h in range(q.shape[1])) for m in means]
        order = sorted(range(count), key=lambda b: -scores[b])
        edges = dict.fromkeys([0, count - 1])
        if forced == "inside":
            kept = [*edges, *(b for b in order if b not in edges)][:blocks]
        else:
            # The newest block is not ranked: its mean knows tokens behind the query.
            best = [b for b in order if b != count - 1][:blocks]
            kept = [*best, *(b for b in edges if b not in best)]
        tokens = [s for b in kept for s in spans[b] if s <= own]
        value = {
            s: sum(float(w[t, h]) * max(0.0, float(q[t, h].double() @ k[s].double())) for h in range(q.shape[1]))
            for s in tokens
        }
        found.append((set(tokens), set(sorted(tokens, key=lambda s: -value[s])[:top_k])))
    return found


def causal(batch: int, queries: int, keys: int, first: Tensor | None = None) -> Tensor:
    seen = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries).expand(batch, -1, -1)
    return seen if first is None else seen & (torch.arange(keys) >= first[:, None, None])


# -- the pure selection ------------------------------------------------------------------------------------------


@pytest.mark.prop("hisa", 4)
@pytest.mark.prop("hisa", 5)
@pytest.mark.parametrize("forced", ["inside", "extra"])
def test_selection_equals_loops(forced: Any) -> None:
    for seed in range(40):
        g = torch.Generator().manual_seed(seed)
        keys = int(torch.randint(6, 40, (), generator=g))
        queries = int(torch.randint(1, keys + 1, (), generator=g))
        size, blocks = int(torch.randint(1, 7, (), generator=g)), int(torch.randint(2, 5, (), generator=g))
        top_k = int(torch.randint(1, size * blocks + 1, (), generator=g))
        first = torch.randint(0, 4, (2,), generator=g)
        q, k, w = made(seed, queries=queries, keys=keys)
        valid = causal(2, queries, keys, first)
        chosen = hisa_select(
            q, k, w, valid, block_size=size, top_blocks=blocks, top_k=top_k, forced=forced, first=first, tile=3
        )
        ours = sets(chosen, valid)
        for row in range(2):
            loops = by_hand(q[row], k[row], w[row], int(first[row]), size, blocks, top_k, forced)
            for t, (candidates, best) in enumerate(loops):
                own = keys - queries + t
                if own < int(first[row]):
                    continue
                assert ours[row][t] - {own} <= best, (seed, row, t)
                assert best <= ours[row][t] | {own}
                assert ours[row][t] <= candidates
                assert own in candidates
                assert int(first[row]) in candidates


@pytest.mark.prop("hisa", 1)
@pytest.mark.parametrize(("size", "blocks"), [(3, 99), (4, 5), (64, 2)])
def test_all_blocks_give_the_flat_indexers_set(size: int, blocks: int) -> None:
    q, k, w = made(0)
    valid = causal(2, 20, 20)
    ours = hisa_select(q, k, w, block_size=size, top_blocks=blocks, top_k=5)
    assert sets(ours, valid) == wanted(flat(q, k, w), 5)


@pytest.mark.prop("hisa", 3)
def test_blocks_of_one_token_are_the_flat_indexer() -> None:
    q, k, w = made(1)
    ours = hisa_select(q, k, w, block_size=1, top_blocks=7, top_k=5)
    assert sets(ours, causal(2, 20, 20)) == wanted(flat(q, k, w), 5)


@pytest.mark.prop("hisa", 6)
def test_recall_never_falls_as_blocks_grow() -> None:
    q, k, w = made(2, queries=60, keys=60)
    valid = causal(2, 60, 60)
    target = wanted(flat(q, k, w), 6)
    before, ours = [[-1] * 60 for _ in range(2)], target
    for blocks in range(2, 17):
        ours = sets(hisa_select(q, k, w, block_size=4, top_blocks=blocks, top_k=6), valid)
        now = [[len(a & b) for a, b in zip(*rows, strict=True)] for rows in zip(ours, target, strict=True)]
        assert all(a >= b for rows in zip(now, before, strict=True) for a, b in zip(*rows, strict=True))
        before = now
    assert ours == target


@pytest.mark.prop("hisa", 7)
def test_scaling_changes_nothing_and_repeated_keys_pool_exactly() -> None:
    q, k, w = made(3)
    settings: dict[str, Any] = {"block_size": 4, "top_blocks": 2, "top_k": 5}
    plain = hisa_select(q, k, w, **settings)
    assert torch.equal(plain, hisa_select(q, 4 * k, w, **settings))
    assert torch.equal(plain, hisa_select(q, k, 8 * w, **settings))
    repeated = k.repeat_interleave(4, 1)
    index = BlockKeys.empty(torch.zeros(2, dtype=torch.long), 5, 4)
    index.append(repeated)
    assert torch.allclose(index.keys, k, atol=1e-6)


@pytest.mark.prop("hisa", 8)
def test_equal_keys_inside_blocks_give_the_flat_indexers_scores() -> None:
    q, k, w = made(4, keys=10, queries=1)
    repeated = k.repeat_interleave(4, 1)
    ours = hisa_select(q, repeated, w, block_size=4, top_blocks=4, top_k=8)
    scores = flat(q, repeated, w)
    assert torch.equal(scores.gather(-1, ours.long()).sort(-1).values, scores.topk(8, dim=-1).values.sort(-1).values)


@pytest.mark.prop("hisa", 9)
def test_portions_of_any_size_choose_the_same_keys() -> None:
    q, k, w = made(5, queries=30, keys=30)
    settings: dict[str, Any] = {"block_size": 4, "top_blocks": 3, "top_k": 6}
    once = hisa_select(q, k, w, **settings)
    for portions in ([1] * 30, [7, 7, 7, 9], [29, 1]):
        index = BlockKeys.empty(torch.zeros(2, dtype=torch.long), 5, 4)
        at, found = 0, []
        for n in portions:
            index.append(k[:, at : at + n])
            part = slice(at, at + n)
            found.append(hisa_select(q[:, part], k[:, : at + n], w[:, part], index=index, **settings))
            at += n
        valid = causal(2, 30, 30)
        together = sets(torch.cat([torch.nn.functional.pad(f, (0, 6 - f.shape[-1])) for f in found], 1), valid)
        assert together == sets(once, valid)


@pytest.mark.prop("hisa", 10)
def test_keys_of_the_future_change_nothing() -> None:
    q, k, w = made(6, queries=30, keys=30)
    settings: dict[str, Any] = {"block_size": 4, "top_blocks": 3, "top_k": 6}
    before = hisa_select(q, k, w, **settings)
    for t in (0, 5, 13, 28):
        other = k.clone()
        other[:, t + 1 :] = 50 * torch.randn(2, 29 - t, 5)
        assert torch.equal(before[:, : t + 1], hisa_select(q, other, w, **settings)[:, : t + 1])


def test_keys_that_a_mask_hides_are_never_chosen() -> None:
    q, k, w = made(10)
    holes = torch.rand(2, 1, 20, generator=torch.Generator().manual_seed(0)) > 0.4
    valid = causal(2, 20, 20) & (holes | torch.eye(20, dtype=torch.bool))
    settings: dict[str, Any] = {"block_size": 4, "top_k": 5, "first": torch.zeros(2, dtype=torch.long)}
    ours = hisa_select(q, k, w, valid, top_blocks=99, **settings)
    assert sets(ours, valid) == wanted(flat(q, k, w, valid), 5)
    few = hisa_select(q, k, w, valid, top_blocks=2, **settings)
    assert valid.gather(-1, few.long()).all()


@pytest.mark.prop("hisa", 11)
def test_left_padding_shifts_the_keys_and_changes_nothing_else() -> None:
    q, k, w = made(7, batch=1)
    settings: dict[str, Any] = {"block_size": 4, "top_blocks": 2, "top_k": 5}
    alone = sets(hisa_select(q, k, w, **settings), causal(1, 20, 20))
    pad = 3
    longer = [torch.cat([torch.randn(1, pad, *x.shape[2:]), x], 1) for x in (q, k, w)]
    first = torch.tensor([pad])
    valid = causal(1, 23, 23, first)
    padded = sets(hisa_select(*longer, valid=valid, first=first, **settings), valid)
    assert [{i - pad for i in one} for one in padded[0][pad:]] == alone[0]
    both = [torch.cat([a, torch.randn_like(a)]) for a in (q, k, w)]
    assert sets(hisa_select(*both, **settings), causal(2, 20, 20))[0] == alone[0]


@pytest.mark.prop("hisa", 12)
def test_a_head_with_gate_zero_is_no_head() -> None:
    q, k, w = made(8)
    w[..., 1] = 0
    without = [x[:, :, [0, 2]] for x in (q, w)]
    settings: dict[str, Any] = {"block_size": 4, "top_blocks": 2, "top_k": 5}
    assert torch.equal(hisa_select(q, k, w, **settings), hisa_select(without[0], k, without[1], **settings))


def test_dot_scores_are_attentions_own() -> None:
    q, k, _ = made(9, heads=1)
    ours = hisa_select(q, k, None, block_size=4, top_blocks=99, top_k=5, score_fn="dot")
    scores = torch.einsum("bqd,bkd->bqk", q[:, :, 0], k).masked_fill(~causal(2, 20, 20), -torch.inf)
    assert sets(ours, causal(2, 20, 20)) == wanted(scores, 5)


@pytest.mark.parametrize("pool", ["mean", "max"])
def test_pooled_keys_follow_crops_and_rows(pool: Any) -> None:
    first = torch.tensor([0, 3])
    k = torch.randn(2, 23, 4)
    for left in (22, 16, 9, 4):
        index = BlockKeys.empty(first, 4, 4, pool)
        index.append(k)
        index.crop(k[:, :left])
        fresh = BlockKeys.empty(first, 4, 4, pool)
        fresh.append(k[:, :left])
        m = fresh.total.shape[1]
        assert torch.allclose(index.keys[:, :m], fresh.keys)
        assert not index.count[:, m:].any()
        index.append(k[:, left:])
        whole = BlockKeys.empty(first, 4, 4, pool)
        whole.append(k)
        assert torch.allclose(index.keys, whole.keys)
    whole.rows(torch.tensor([1, 1, 0]))
    assert whole.first.tolist() == [3, 3, 0]
    assert torch.equal(whole.total[0], whole.total[1])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"top_blocks": 2, "block_size": 2, "top_k": 5}, "top_blocks \\* block_size = 4"),
        ({"top_blocks": 1}, "top_blocks = 1"),
        ({"block_size": 0}, "block_size = 0"),
        ({"top_k": 0}, "top_k = 0"),
        ({"forced": "off"}, "forced"),
        ({"pool": "sum"}, "pool"),
        ({"score_fn": "cos"}, "score_fn"),
    ],
)
def test_bad_budgets_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(LimitError, match=words):
        hisa_select(*made(0), **settings)


def test_shapes_that_do_not_fit_are_refused_and_no_queries_give_no_keys() -> None:
    q, k, w = made(0)
    with pytest.raises(LimitError, match="q and k"):
        hisa_select(q, k[..., :4], w)
    with pytest.raises(LimitError, match="Sq = 20"):
        hisa_select(q, k[:, :10], w)
    assert hisa_select(q[:, :0], k, w[:, :0]).shape == (2, 0, 20)


# -- in a model --------------------------------------------------------------------------------------------------


@cache
def model_of(kind: str, attn: str = "sdpa") -> Any:
    return tm.models.tiny(kind, attn=attn, layers=3)


def prompt(rows: int = 2, length: int = 40) -> dict[str, Tensor]:
    ids = torch.randint(1, 64, (rows, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        ids[row, : 3 * row], mask[row, : 3 * row] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.prop("hisa", 1)
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", TYPES)
def test_all_blocks_leave_the_model_as_it_is(kind: str, attn: str) -> None:
    model, inputs = model_of(kind, attn), prompt()
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "output_logits": True}
    settings |= {"return_dict_in_generate": True}
    with torch.no_grad():
        plain = model.generate(**inputs, **settings)
        with HISA(block_size=4, top_blocks=99).attach(model) as trace:
            ours = model.generate(**inputs, **settings)
    assert torch.equal(plain.sequences, ours.sequences)
    assert torch.allclose(torch.stack(plain.logits), torch.stack(ours.logits), atol=1e-5)
    assert trace.model_calls == 6
    assert trace.keys_flat > 0


@pytest.mark.prop("hisa", 2)
@pytest.mark.parametrize("kind", TYPES)
def test_as_many_keys_as_tokens_are_dense_attention(kind: str) -> None:
    model, inputs = model_of(kind), prompt(length=20)
    with torch.no_grad():
        with HISA(keep=20, block_size=4, top_blocks=5).attach(model):
            ours = model(**inputs).logits
        with HISA(keep=100, block_size=100, top_blocks=2).attach(model):
            dense = model(**inputs).logits
    real = inputs["attention_mask"].bool()
    assert torch.allclose(ours[real], dense[real], atol=1e-5)


@pytest.mark.prop("hisa", 9)
@pytest.mark.parametrize("kind", TYPES)
def test_prefill_in_portions_and_decoding_equal_one_forward(kind: str) -> None:
    model, inputs = model_of(kind), prompt()
    how = HISA(keep=TOP_K, block_size=4, top_blocks=3)
    with torch.no_grad(), how.attach(model):
        whole = model(**inputs, use_cache=False).logits
        for portions in ([40], [1] * 40, [13, 20, 7]):
            cache, at, found = None, 0, []
            for n in portions:
                out = model(
                    input_ids=inputs["input_ids"][:, at : at + n],
                    attention_mask=inputs["attention_mask"][:, : at + n],
                    past_key_values=cache,
                    use_cache=True,
                )
                cache, at = out.past_key_values, at + n
                found.append(out.logits)
            real = inputs["attention_mask"].bool()
            assert torch.allclose(torch.cat(found, 1)[real], whole[real], atol=1e-5, rtol=1e-4)


def test_crop_and_reorder_equal_a_fresh_run() -> None:
    model, inputs = model_of("deepseek_v32"), prompt()
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    how = HISA(keep=TOP_K, block_size=4, top_blocks=3)
    turned = torch.tensor([1, 0])
    with torch.no_grad(), how.attach(model):
        cache = model(**inputs, use_cache=True).past_key_values
        cache.crop(-7)
        cache.reorder_cache(turned)
        after = model(
            input_ids=ids[turned, 33:], attention_mask=mask[turned], past_key_values=cache, use_cache=True
        ).logits
        fresh = model(input_ids=ids[turned], attention_mask=mask[turned], use_cache=False).logits[:, 33:]
        assert torch.allclose(after, fresh, atol=1e-5)
        cache.batch_select_indices(torch.tensor([1]))
        cache.batch_repeat_interleave(2)
        more = model(input_ids=ids[:1, :1].expand(2, -1), past_key_values=cache, use_cache=True).logits
    assert torch.equal(more[0], more[1])


def test_beams_equal_those_of_the_flat_indexer_when_all_blocks_stay() -> None:
    model, inputs = model_of("deepseek_v32"), prompt()
    with torch.no_grad():
        plain = model.generate(**inputs, max_new_tokens=6, num_beams=3, do_sample=False)
        with HISA(block_size=4, top_blocks=99).attach(model):
            ours = model.generate(**inputs, max_new_tokens=6, num_beams=3, do_sample=False)
    assert torch.equal(plain, ours)


def test_a_cache_from_before_is_taken_over() -> None:
    model, inputs = model_of("deepseek_v32"), prompt(rows=1)
    how = HISA(block_size=4, top_blocks=99)
    with torch.no_grad():
        want = model(**inputs).logits[:, 30:]
        cache = model(input_ids=inputs["input_ids"][:, :30], use_cache=True).past_key_values
        with how.attach(model):
            got = model(input_ids=inputs["input_ids"][:, 30:], past_key_values=cache, use_cache=True).logits
    assert torch.allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("kind", TYPES)
def test_the_model_is_left_as_it_was(kind: str) -> None:
    model = model_of(kind)
    before = list(dict(model.named_modules()))
    with pytest.raises(RuntimeError, match="stop"), HISA(block_size=4, top_blocks=2).attach(model):
        raise RuntimeError("stop")
    assert list(dict(model.named_modules())) == before
    with HISA(block_size=4, top_blocks=2).attach(model):
        assert list(dict(model.named_modules())) != before


def test_fewer_keys_are_scored_than_by_the_flat_indexer() -> None:
    model = model_of("deepseek_v32")
    ids = torch.randint(1, 64, (1, 200))
    with torch.no_grad(), HISA(keep=TOP_K, block_size=8, top_blocks=2).attach(model) as trace:
        model(input_ids=ids)
    assert trace.keys_flat == 3 * 200 * 200
    assert 0 < trace.keys_scored < 0.3 * trace.keys_flat
    four = HISA(block_size=8, compression=4)
    assert [four.blocks(n, 16) for n in (8, 64, 512, 4096)] == [2, 2, 16, 128]


def test_what_cannot_work_is_refused() -> None:
    with (
        pytest.raises(LimitError, match="top_blocks \\* block_size = 4"),
        HISA(block_size=2, top_blocks=2).attach(model_of("deepseek_v32")),
    ):
        pass
    with pytest.raises(UnsupportedError, match="index keys"), HISA().attach(tm.models.tiny("llama")):
        pass
    with pytest.raises(LimitError, match="compression"):
        HISA(compression=0.5)
    model, inputs = model_of("deepseek_v32"), prompt(rows=1)
    with HISA(block_size=4, top_blocks=4).attach(model), pytest.raises(UnsupportedError, match="StaticIndexed"):
        model.generate(**inputs, max_new_tokens=2, cache_implementation="static")


# -- ordinary attention ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3"])
def test_dot_reads_the_top_keys_when_all_blocks_are_looked_at(kind: str) -> None:
    tiny = tm.models.tiny(kind)
    ids = torch.randperm(63, generator=torch.Generator().manual_seed(1))[:40][None] + 1
    with torch.no_grad(), tm.attend.OracleTopK(keep=6).attach(tiny):
        want = tiny.generate(ids, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True)
    whole = tm.attend.HISA(keep=6, block_size=4, top_blocks=250, score_fn="dot")
    with torch.no_grad(), whole.attach(tiny) as trace:
        ours = tiny.generate(ids, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True)
    assert torch.equal(ours.sequences, want.sequences)
    assert torch.allclose(torch.stack(ours.logits), torch.stack(want.logits), atol=1e-5)
    assert trace.keys_read < trace.keys_dense


def test_dot_decodes_from_the_blocks_of_the_cache() -> None:
    """After a crop and without one the pooled keys are those of a fresh run, and a step scores a part of the keys."""
    tiny = tm.models.tiny("qwen2")
    ids = torch.randperm(63, generator=torch.Generator().manual_seed(2))[:41][None] + 1
    method = tm.attend.HISA(keep=4, block_size=4, top_blocks=2, score_fn="dot")
    with torch.no_grad(), method.attach(tiny) as trace:
        cache = tiny(ids[:, :40], use_cache=True).past_key_values
        before = trace.keys_scored
        step = tiny(ids[:, 40:], past_key_values=cache, use_cache=True).logits
        # 11 pooled keys, a whole block and the newest one with a single token, for 4 heads in 2 layers.
        assert trace.keys_scored - before == 2 * 4 * (11 + 4 + 1)
        cache.crop(-9)
        again = tiny(ids[:, 32:33], past_key_values=cache, use_cache=True).logits
        fresh = tiny(ids[:, :32], use_cache=True).past_key_values
        want = tiny(ids[:, 32:33], past_key_values=fresh, use_cache=True).logits
    assert torch.allclose(again, want, atol=1e-5)
    assert step.isfinite().all()


def test_dot_reads_a_short_row_of_a_batch_as_it_reads_it_alone() -> None:
    """A row with fewer keys than are chosen has places that name no key; they count for nothing."""
    tiny = tm.models.tiny("llama")
    ids = torch.randperm(63, generator=torch.Generator().manual_seed(3))[:40][None] + 1
    short = torch.cat([ids.new_zeros(1, 36), ids[:, :4]], 1)
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, :36] = 0
    how: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "output_logits": True}
    with torch.no_grad(), tm.attend.HISA(keep=8, block_size=4, top_blocks=2, score_fn="dot").attach(tiny):
        both = tiny.generate(torch.cat([ids, short]), attention_mask=mask, return_dict_in_generate=True, **how)
    with torch.no_grad():
        alone = tiny.generate(ids[:, :4], return_dict_in_generate=True, **how)  # never more than eight keys: dense
    assert torch.allclose(torch.stack(both.logits)[:, 1], torch.stack(alone.logits)[:, 0], atol=1e-5)


def test_dot_pools_the_last_of_several_texts_in_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts before the last one are read in full, the last one as it is read alone."""
    monkeypatch.setattr(_block_attention, "_TILE", 10)  # a tile with queries of two texts is read in full
    tiny = tm.models.tiny("llama")
    ids = torch.randperm(63, generator=torch.Generator().manual_seed(4))[:50][None] + 1
    cut = 30
    own = torch.arange(50) >= cut
    mask = (own[:, None] == own[None]).tril()[None, None]
    places = torch.cat([torch.arange(cut), torch.arange(50 - cut)])[None]
    method = tm.attend.HISA(keep=4, block_size=4, top_blocks=2, score_fn="dot")
    with torch.no_grad():
        dense = tiny(ids[:, :cut]).logits
        with method.attach(tiny):
            packed = tiny(ids, attention_mask=mask, position_ids=places, use_cache=False).logits
            alone = tiny(ids[:, cut:], use_cache=False).logits
    assert torch.allclose(packed[:, :cut], dense, atol=1e-5)
    assert torch.allclose(packed[:, cut:], alone, atol=1e-5)


def test_dot_needs_a_count_and_dsa_has_no_layers() -> None:
    with pytest.raises(LimitError, match=r"keep = None.*score_fn='dot'"):
        tm.attend.HISA(score_fn="dot")
    with pytest.raises(LimitError, match="layers"):
        tm.attend.HISA(layers=(0,))
    with pytest.raises(LimitError, match="score_fn"):
        tm.attend.HISA(score_fn="max")  # type: ignore[arg-type]
