from __future__ import annotations

import itertools
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, GlmConfig, GlmForCausalLM

from tokenmill import attend, hf
from tokenmill.attend import _session, fasa
from tokenmill.attend._frequency import (
    agreement,
    chunk_channels,
    chunk_scores,
    combine_channels,
    dominant_keys,
    rotated_chunks,
    split_channels,
    tip_scores,
)
from tokenmill.attend._gather import grouped, heads, top_indices
from tokenmill.errors import LimitError, UnsupportedError
from tokenmill.hf.cache import record_past

from .methods import IDS, KINDS, PADDING, model, run, steps


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ranking(seed: int = 0, *, chunks: int = 4, layers: int = 6, **settings: Any) -> attend.FCRanking:
    ca = torch.rand(1, layers, chunks, 4, generator=torch.Generator().manual_seed(seed))
    settings = {"layout": "half_split", "head_dim": 8, "rotary_dim": 8, **settings}
    return attend.FCRanking(ca, layers=tuple(range(layers)), k_list=(6,), **settings)


def method(**settings: Any) -> attend.FASA:
    made = settings.pop("ranking", None) or ranking()
    return attend.FASA(made, **{"keep": 6, "n_tip": 2, **settings})


def glm() -> Any:
    """Half of the channels are rotated, in pairs of neighbours."""
    make: Any = GlmConfig  # which takes more than its signature says
    config = make(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        partial_rotary_factor=0.5,
        pad_token_id=0,
    )
    return GlmForCausalLM(config).eval()


@pytest.mark.prop("fasa", 1)
@pytest.mark.parametrize("layout", ["half_split", "interleaved", "adjacent", "channels"])
def test_the_chunks_sum_to_the_dot_product(layout: Any) -> None:
    query, keys = draw(2, 4, 8), draw(2, 2, 20, 8, seed=1)
    for turned in (8, 4, 0):
        channels = chunk_channels(layout, 8, turned)
        assert sorted(channels.flatten().tolist()) == list(range(8))
        whole = grouped(query[:, :, None], keys)[:, :, 0]
        torch.testing.assert_close(chunk_scores(query, keys, channels).sum(2), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.prop("fasa", 2)
@pytest.mark.parametrize("make", [lambda: model("llama"), lambda: model("gemma3"), glm])
def test_a_chunk_depends_on_the_distance_alone(make: Any) -> None:
    tiny = make()
    layer = len(hf.layer_types(tiny)) - 1
    turn = hf.layer_rotary("test", tiny, layer)
    layout, turned = rotated_chunks(turn, 8)
    assert (layout, turned) == (("interleaved", 4) if make is glm else ("half_split", 8))
    query, key = draw(1, 2, 1, 8), draw(1, 2, 1, 8, seed=1)

    def parts(channels: Tensor, shift: int) -> Tensor:
        moved = turn.rotate(query, turn.phases(torch.tensor([[9 + shift]])))
        other = turn.rotate(key, turn.phases(torch.tensor([[2 + shift]])))
        return chunk_scores(moved[:, :, 0], other, channels)

    channels = chunk_channels(layout, 8, turned)
    for shift in (1, 17, 40):
        torch.testing.assert_close(parts(channels, shift), parts(channels, 0), atol=1e-5, rtol=1e-5)
    wrong = chunk_channels("adjacent" if layout == "half_split" else "half_split", 8, turned)
    assert not torch.allclose(parts(wrong, 17), parts(wrong, 0), atol=1e-2)


@pytest.mark.prop("fasa", 3)
@pytest.mark.parametrize("kind", KINDS)
def test_all_chunks_are_the_oracle_and_all_keys_are_dense_attention(kind: str) -> None:
    for attn, mask in itertools.product(("sdpa", "eager"), (torch.ones_like(PADDING), PADDING)):
        tiny = model(kind, attn=attn)
        real = mask.bool()
        want, later = run(tiny, IDS, mask).logits, steps(tiny, IDS, mask, 24)
        for seed, share in itertools.product((0, 1), ("head", "kv_group")):
            full = method(ranking=ranking(seed), keep=1000, share=share)
            with full.attach(tiny) as trace:
                torch.testing.assert_close(run(tiny, IDS, mask).logits[real], want[real], atol=1e-5, rtol=1e-5)
                torch.testing.assert_close(steps(tiny, IDS, mask, 24), later, atol=1e-5, rtol=1e-5)
            assert trace.sparse_calls == 0
        # From one dense prefill on, so that both decode from equal caches.
        outs = []
        for one in (method(n_tip=4), attend.OracleTopK(keep=6)):
            cache = run(tiny, IDS[:, :39], mask[:, :39]).past_key_values
            with one.attach(tiny):
                outs.append(run(tiny, IDS[:, 39:], mask, cache=cache, at=39).logits)
        torch.testing.assert_close(outs[0], outs[1], atol=1e-5, rtol=1e-5)


@pytest.mark.prop("fasa", 4)
def test_agreement_is_a_share_that_ignores_scale_order_and_constants() -> None:
    query, keys = draw(2, 4, 8), draw(2, 2, 50, 8, seed=1)
    channels = chunk_channels("half_split", 8)
    found = agreement(query, keys, channels, 9)
    assert found.shape == (2, 4, 4)
    assert ((found >= 0) & (found <= 1)).all()
    torch.testing.assert_close(agreement(query, keys, torch.arange(8)[None], 9), torch.ones(2, 4, 1))
    assert torch.equal(agreement(7 * query, keys, channels, 9), found)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(2))
    assert torch.equal(agreement(query, keys[:, :, order], channels, 9), found)
    # A constant on all scores: a channel that every key shares.
    asked, given = (torch.cat([x, torch.full((*x.shape[:-1], 2), c)], -1) for x, c in ((query, 3.0), (keys, 1.0)))
    wide = torch.cat([channels, torch.tensor([[8, 9]])])
    assert torch.equal(agreement(asked, given, wide, 9)[..., :4], found)
    # Scores that have nothing to do with each other agree in k / S.
    independent = agreement(draw(200, 4, 64, seed=3), draw(200, 4, 50, 64, seed=4), torch.arange(64)[:, None], 10)
    chance = float(independent.mean())
    own = 0.2
    assert own < chance < own + 0.1  # one channel of 64 is a small part of the whole
    for row in range(2):
        for head in range(4):
            whole = set(top_indices(keys[row, head // 2] @ query[row, head], 9).tolist())
            for c, pair in enumerate(channels.tolist()):
                part = set(top_indices(keys[row, head // 2][:, pair] @ query[row, head, pair], 9).tolist())
                assert float(found[row, head, c]) == pytest.approx(len(whole & part) / 9)


def test_agreement_of_a_padded_row_is_its_own() -> None:
    query, keys = draw(2, 4, 8), draw(2, 2, 50, 8, seed=1)
    valid = torch.arange(50).expand(2, -1) >= torch.tensor([0, 44])[:, None]
    channels = chunk_channels("half_split", 8)
    found = agreement(query, keys, channels, 9, valid=valid)
    assert torch.equal(found[1], torch.ones(4, 4)), "6 keys of which 9 are asked for"
    valid = torch.arange(50).expand(2, -1) >= torch.tensor([0, 20])[:, None]
    found = agreement(query, keys, channels, 9, valid=valid)
    assert torch.equal(found[1:], agreement(query[1:], keys[1:, :, 20:], channels, 9))


@pytest.mark.prop("fasa", 5)
def test_dominant_chunks_are_nested_and_the_best_of_all_sets() -> None:
    made = ranking(chunks=8, layers=2, head_dim=16, rotary_dim=16)
    for n in range(1, 9):
        chosen = made.dominant(n)
        assert chosen.shape == (2, 4, n)
        if n < 8:
            assert torch.equal(made.dominant(n + 1)[..., :n], chosen)
        for layer, head in itertools.product(range(2), range(4)):
            values = made.ca[0, layer, :, head]
            best = max(float(values[list(s)].sum()) for s in itertools.combinations(range(8), n))
            assert float(values[chosen[layer, head]].sum()) == pytest.approx(best)
    dims = made.to_dims(2)
    assert dims.shape == (2, 4, 4)
    first = int(made.dominant(2)[1, 3, 0])
    assert dims[1, 3, :2].tolist() == [first, first + 8]
    assert made.to_dims(2, "adjacent")[1, 3, :2].tolist() == [2 * first, 2 * first + 1]


class Twin(attend.SparseAttention):
    """Compares each answer of a decoding step with dense attention in which other keys are hidden."""

    def __init__(self, inside: attend.FASA) -> None:
        self.inside, self.compared = inside, 0

    def read(self, reading: _session.Reading) -> Any:
        out, weights = self.inside.read(reading)
        if reading.queries > 1:
            return out, weights
        count, groups = reading.query.shape[1], reading.key.shape[1]
        assert isinstance(self.inside.n_tip, int)
        dims = self.inside.ranking.to_dims(self.inside.n_tip)[self.inside.ranking.layers.index(reading.layer)]
        seen = hf.visible(reading.mask, reading.query, reading.key).expand(2, count, -1, -1).clone()
        wide = heads(reading.key, count)
        for row in range(2):
            visible = seen[row, 0, 0].nonzero()[:, 0].tolist()
            score = torch.stack(
                [wide[row, h][:, dims[h]] @ reading.query[row, h, 0, dims[h]] for h in range(count)]
            )  # (H, S)
            if self.inside.share == "kv_group":
                score = score.view(groups, -1, reading.size).sum(1).repeat_interleave(count // groups, 0)
            for head in range(count):
                best = sorted(visible, key=lambda s, of=score[head]: (-float(of[s]), s))[:6]
                assert len(set(best)) == min(6, len(visible))
                seen[row, head] = False
                seen[row, head, 0, best] = True
        want = attend.sparse_attend(reading.query, reading.key, reading.value, scaling=reading.scaling, seen=seen)
        torch.testing.assert_close(out, want.transpose(1, 2), atol=1e-5, rtol=1e-5)
        self.compared += 1
        return out, weights


@pytest.mark.prop("fasa", 6)
@pytest.mark.prop("fasa", 9)
@pytest.mark.parametrize("share", ["head", "kv_group"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_head_attends_to_the_keys_that_its_chunks_rank_first(kind: str, share: Any) -> None:
    tiny = model(kind)
    twin = Twin(method(share=share))
    with twin.attach(tiny) as trace:
        found = steps(tiny, IDS, PADDING, 30)
    assert twin.compared == 20
    assert trace.sparse_calls == 20
    for row, start in ((0, 9), (1, 0)):
        ids = IDS[row : row + 1, start:]
        with method(share=share).attach(tiny):
            alone = steps(tiny, ids, torch.ones_like(ids), 30 - start)
        torch.testing.assert_close(found[row : row + 1], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.prop("fasa", 7)
def test_a_heads_ranking_moves_that_head_alone() -> None:
    tiny, outs = model("qwen2", layers=1), []
    one = ranking()
    other = replace(one, ca=one.ca.clone())
    other.ca[..., 2] = 1 - one.ca[..., 2]

    class Watch(attend.SparseAttention):
        inside: attend.FASA

        def read(self, reading: _session.Reading) -> Any:
            out, _ = self.inside.read(reading)
            outs.append(out)
            return out, None

    for made in (one, other):
        watch = Watch()
        watch.inside = method(ranking=made)
        with watch.attach(tiny):
            steps(tiny, IDS, PADDING, 39)
    first, second = outs[1], outs[3]  # (B, 1, H, D)
    assert torch.equal(first[:, :, [0, 1, 3]], second[:, :, [0, 1, 3]])
    assert not torch.equal(first[:, :, 2], second[:, :, 2])


@pytest.mark.prop("fasa", 8)
@pytest.mark.parametrize("kind", KINDS)
def test_keys_on_the_host_give_the_same_bits(kind: str) -> None:
    tiny = model(kind)
    with method().attach(tiny) as device:
        want = steps(tiny, IDS, PADDING, 24)
    with method().attach(tiny) as host:
        cache = attend.host_cache(tiny)
        record_past(cache)
        found = steps(tiny, IDS, PADDING, 24, cache)
        assert torch.equal(found, want)
        assert host.counts() == device.counts()
        full = [i for i, of in enumerate(hf.layer_types(tiny)) if of == "full_attention"]
        assert all(cache.layers[i].keys.device.type == "cpu" for i in full)
        cache.reorder_cache(torch.tensor([1, 0]))
        cache.batch_select_indices(torch.tensor([0]))
        cache.crop(-1)
        again = run(tiny, IDS[1:, 39:], PADDING[1:], cache=cache, at=39).logits
    torch.testing.assert_close(again, want[1:, -1:], atol=1e-4, rtol=1e-4)


@pytest.mark.prop("fasa", 8)
def test_channels_are_split_and_joined_without_loss() -> None:
    keys = draw(2, 4, 9, 8)
    dims = torch.stack([torch.randperm(8, generator=torch.Generator().manual_seed(h))[:3] for h in range(4)])
    dominant, rest = split_channels(keys, dims)
    assert dominant.shape == (2, 4, 9, 3)
    assert rest.shape == (2, 4, 9, 5)
    assert torch.equal(combine_channels(dominant, rest, dims), keys)


@pytest.mark.prop("fasa", 10)
@pytest.mark.parametrize("kind", KINDS)
def test_prefill_is_the_models_own_and_it_goes_on_without_the_method(kind: str) -> None:
    tiny = model(kind)
    want = run(tiny, IDS[:, :30], PADDING[:, :30])
    with method().attach(tiny) as trace:
        found = run(tiny, IDS[:, :30], PADDING[:, :30])
    assert trace.sparse_calls == 0
    assert torch.equal(found.logits, want.logits)
    for ours, theirs in zip(found.past_key_values.layers, want.past_key_values.layers, strict=True):
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.values, theirs.values)
    caches = [out.past_key_values for out in (found, want)]
    after = [run(tiny, IDS[:, 30:31], PADDING[:, :31], cache=cache, at=30).logits for cache in caches]
    assert torch.equal(after[0], after[1])
    # And back: what was written without the method is read by it.
    with method().attach(tiny) as trace:
        run(tiny, IDS[:, 31:32], PADDING[:, :32], cache=caches[0], at=31)
        run(tiny, IDS[:, 31:32], PADDING[:, :32], cache=caches[1], at=31)
    assert trace.sparse_calls == 4
    for ours, theirs in zip(*(cache.layers for cache in caches), strict=True):
        if hasattr(theirs, "state"):
            assert torch.equal(ours.state("fasa"), theirs.state("fasa"))


@pytest.mark.prop("fasa", 11)
def test_groups_of_one_head_share_with_nobody() -> None:
    tiny = model("llama")
    with method(share="head").attach(tiny):
        want = steps(tiny, IDS, PADDING, 30)
    with method(share="kv_group").attach(tiny):
        assert torch.equal(steps(tiny, IDS, PADDING, 30), want)


@pytest.mark.prop("fasa", 12)
def test_more_keys_hold_more_of_the_mass() -> None:
    query, keys = draw(2, 4, 1, 8), draw(2, 2, 60, 8, seed=1)
    dims = ranking().to_dims(2)[0]
    mass = (grouped(query, keys)[:, :, 0] * 0.35).softmax(-1)
    score = tip_scores(query, keys, dims)
    held = [mass.gather(-1, top_indices(score, n)).sum(-1) for n in range(1, 61)]
    assert all((after >= before).all() for before, after in itertools.pairwise(held))
    torch.testing.assert_close(held[-1], torch.ones(2, 4))


def test_scores_of_a_copy_are_those_of_the_keys() -> None:
    query, keys = draw(2, 4, 1, 8), draw(2, 2, 60, 8, seed=1)
    dims = ranking().to_dims(2)[0]
    found = tip_scores(query, keys, dims)
    assert torch.equal(tip_scores(query, dominant_keys(keys, dims), dims), found)
    masked = torch.zeros(4, 8).scatter(1, dims, 1.0)
    torch.testing.assert_close(found, grouped(query * masked[None, :, None], keys)[:, :, 0])
    everything = torch.arange(8).expand(4, -1)
    torch.testing.assert_close(tip_scores(query, keys, everything), grouped(query, keys)[:, :, 0])


@pytest.mark.parametrize("kind", KINDS)
def test_calibration_is_the_mean_agreement_of_decoding_steps(kind: str, tmp_path: Path) -> None:
    tiny, prompt = model(kind), 24
    made = fasa.calibrate(tiny, IDS[:, :prompt], k=(4, 8), max_new_tokens=5)
    full = tuple(i for i, of in enumerate(hf.layer_types(tiny)) if of == "full_attention")
    assert made.layers == full
    assert made.ca.shape == (2, len(full), 4, 4)
    assert (made.layout, made.rotary_dim, made.queries) == ("half_split", 8, 2 * 4)

    seen: dict[int, list[Tensor]] = {}

    class Watch(attend.SparseAttention):
        def read(self, reading: _session.Reading) -> Any:
            if reading.queries == 1:
                channels = chunk_channels("half_split", 8)
                found = torch.stack([agreement(reading.query[:, :, 0], reading.key, channels, k) for k in (4, 8)])
                seen.setdefault(reading.layer, []).append(found.mean(1))
            return reading.dense()

    text = tiny.generate(input_ids=IDS[:, :prompt], max_new_tokens=5, do_sample=False)
    with Watch().attach(tiny):
        steps(tiny, text[:, :-1], torch.ones_like(text[:, :-1]), prompt)
    for at, layer in enumerate(full):
        want = torch.stack(seen[layer]).mean(0).transpose(1, 2)  # (n_K, C, H)
        torch.testing.assert_close(made.ca[:, at], want, atol=1e-5, rtol=1e-5)

    made.save(tmp_path / "ranking.safetensors")
    again = attend.FCRanking.load(tmp_path / "ranking.safetensors")
    assert torch.equal(again.ca, made.ca)
    for name in ("layers", "k_list", "layout", "head_dim", "rotary_dim", "queries", "made_on"):
        assert getattr(again, name) == getattr(made, name)
    with attend.FASA(again, keep=6, n_tip=2).attach(tiny) as trace:
        steps(tiny, IDS, PADDING, 30)
    assert trace.sparse_calls


def test_calibration_of_padded_rows_leaves_padding_out() -> None:
    tiny = model("qwen2")
    made = fasa.calibrate(tiny, IDS[:1, 9:], k=8, max_new_tokens=4)
    padded = fasa.calibrate(tiny, IDS[:1], PADDING[:1], k=8, max_new_tokens=4)
    torch.testing.assert_close(made.ca, padded.ca, atol=1e-5, rtol=1e-5)


def test_the_nearest_number_of_keys_is_used() -> None:
    ca = torch.zeros(2, 1, 4, 4)
    ca[0, :, 1], ca[1, :, 2] = 1.0, 1.0
    made = attend.FCRanking(ca, layers=(0,), k_list=(128, 1024), layout="half_split", head_dim=8, rotary_dim=8)
    assert made.dominant(1)[0, 0].tolist() == [1]
    assert made.dominant(1, k=300)[0, 0].tolist() == [1]
    assert made.dominant(1, k=2048)[0, 0].tolist() == [2]


@pytest.mark.parametrize("kind", KINDS)
def test_state_follows_the_cache(kind: str) -> None:
    tiny, swap = model(kind), torch.tensor([1, 0])
    with method().attach(tiny):
        want = steps(tiny, IDS, PADDING, 30)[:, -1:]
        cache = run(tiny, IDS[:, :30], PADDING[:, :30]).past_key_values
        record_past(cache)
        for at in range(30, 39):
            run(tiny, IDS[:, at : at + 1], PADDING[:, : at + 1], cache=cache, at=at)
        run(tiny, IDS[:, :1], cache=cache, at=39)
        cache.crop(-1)
        cache.reorder_cache(swap)
        found = run(tiny, IDS[swap, 39:], PADDING[swap], cache=cache, at=39).logits
        torch.testing.assert_close(found, want[swap], atol=1e-4, rtol=1e-4)
        cache.reset()
        torch.testing.assert_close(steps(tiny, IDS, PADDING, 30, cache)[:, -1:], want)
        out = tiny.generate(input_ids=IDS, attention_mask=PADDING, num_beams=3, max_new_tokens=4, do_sample=False)
    assert out.shape == (2, 44)


def test_a_share_of_the_chunks_is_a_number_of_them() -> None:
    tiny = model("qwen2")
    with method(n_tip=0.5).attach(tiny):
        found = steps(tiny, IDS, PADDING, 36)
    with method(n_tip=2).attach(tiny):
        assert torch.equal(steps(tiny, IDS, PADDING, 36), found)


def test_bytes_are_a_share_of_the_cache() -> None:
    tiny = model("llama", layers=1)
    with method().attach(tiny) as trace:
        cache = run(tiny, IDS[:, :39]).past_key_values
        before = trace.counts()
        run(tiny, IDS[:, 39:], cache=cache, at=39)
    read = trace.bytes_read - before["bytes_read"]
    assert read == 2 * 4 * (40 * 4 + 6 * 16) * 4  # rows, heads; 4 of 8 channels of all keys, 6 keys and values
    assert trace.keys_scored - before["keys_scored"] == 2 * 4 * 40


def test_padding_and_other_rows_do_not_reach_a_row() -> None:
    tiny = model("qwen2", layers=1)
    with method().attach(tiny):
        before = steps(tiny, IDS, PADDING, 30)
        cache = run(tiny, IDS[:, :30], PADDING[:, :30]).past_key_values
        layer = cache.layers[0]
        layer.keys[0, :, :9] += 5.0
        layer.values[0, :, :9] += 5.0
        layer.state("fasa")[0, :, :9] += 5.0
        after = run(tiny, IDS[:, 30:31], PADDING[:, :31], cache=cache, at=30).logits
    assert torch.equal(after, before[:, :1])


def test_rankings_of_other_models_are_refused() -> None:
    qwen, gemma = model("qwen2"), model("gemma3")
    made = fasa.calibrate(qwen, IDS[:1, :24], k=8, max_new_tokens=3)
    with pytest.raises(LimitError, match="ranking"), attend.FASA(made, n_tip=2).attach(gemma):
        pytest.fail("it was attached")
    wide = attend.FASA(ranking(chunks=8, head_dim=16, rotary_dim=16), n_tip=2)
    with pytest.raises(LimitError, match="4 heads x 16 channels"), wide.attach(qwen):
        pytest.fail("it was attached")
    with pytest.raises(LimitError, match=r"layers \(0,\)"), method(ranking=ranking(layers=1)).attach(qwen):
        pytest.fail("it was attached")
    changed = replace(made, made_on=tuple((a, "linear" if a == "rope_type" else b) for a, b in made.made_on))
    with pytest.warns(UserWarning, match="'linear'"), attend.FASA(changed, n_tip=2).attach(qwen):
        pass
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with attend.FASA(made, n_tip=2).attach(qwen):
            pass


def test_bad_settings(tmp_path: Path) -> None:
    for settings, says in (
        ({"keep": 0}, "keep = 0"),
        ({"n_tip": 0}, "n_tip = 0"),
        ({"n_tip": 5}, "n_tip = 5.*C = 4"),
        ({"n_tip": 1.5}, r"n_tip = 1\.5"),
        ({"share": "layer"}, "share"),
    ):
        with pytest.raises(LimitError, match=says):
            method(**settings)
    with pytest.raises(LimitError, match="n_tip = 9"):
        ranking().dominant(9)
    with pytest.raises(LimitError, match=r"ca\.shape"):
        ranking(chunks=3)
    with pytest.raises(LimitError, match="head_dim = 7"):
        chunk_channels("half_split", 7)
    with pytest.raises(LimitError, match="rotary_dim = 10"):
        chunk_channels("half_split", 8, 10)
    with pytest.raises(LimitError, match="layout"):
        chunk_channels("pairs", 8)  # pyright: ignore[reportArgumentType]
    other = tmp_path / "other.safetensors"
    from safetensors.torch import save_file

    save_file({"ca": torch.zeros(1)}, other)
    with pytest.raises(LimitError, match="path"):
        attend.FCRanking.load(other)


def test_bad_calibrations() -> None:
    tiny = model("llama")
    for settings, says in (
        ({"k": 0}, "k = 0"),
        ({"k": ()}, r"k = \(\)"),
        ({"k": 21}, "the shortest text = 40.*2 k = 42"),
        ({"k": 4, "max_new_tokens": 1}, "max_new_tokens = 1"),
    ):
        with pytest.raises(LimitError, match=says):
            fasa.calibrate(tiny, IDS, **settings)  # pyright: ignore[reportArgumentType]
    with pytest.raises(LimitError, match="the shortest text = 31"):
        fasa.calibrate(tiny, IDS, PADDING, k=16)


def test_a_model_without_rotation_ranks_by_channels() -> None:
    tiny = model("llama")
    made = fasa.calibrate(tiny, IDS[:, :20], k=4, max_new_tokens=3, layout="channels")
    assert made.ca.shape[2] == 8
    with attend.FASA(made, keep=6, n_tip=3).attach(tiny) as trace:
        steps(tiny, IDS, PADDING, 36)
    assert trace.sparse_calls
    del tiny.model.rotary_emb
    with pytest.raises(UnsupportedError, match="layout"):
        fasa.calibrate(tiny, IDS[:, :20], k=4, max_new_tokens=3)


def test_a_cache_that_cannot_carry_state_is_refused() -> None:
    tiny = model("llama")
    from transformers import StaticCache

    with method().attach(tiny), pytest.raises(UnsupportedError, match="StaticLayer"):
        run(tiny, IDS, cache=StaticCache(config=tiny.config, max_cache_len=64))
    with method().attach(tiny):
        run(tiny, IDS, cache=DynamicCache(config=tiny.config))
