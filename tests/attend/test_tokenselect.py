from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tokenmill import attend, hf
from tokenmill.attend import _session, tokenselect
from tokenmill.attend.tokenselect import SelectionCache, assemble, mean_query, safe_cosine, select, vote
from tokenmill.errors import LimitError

from .methods import IDS, KINDS, PADDING, SMALL, model, run, steps

VOTES = ("soft", "hard", "topk")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def twin(query: Tensor, keys: Tensor, kind: str, valid: Tensor, k: int) -> Tensor:
    """Votes of `vote`, head by head and key by key."""
    (b, h, _), (_, g, s, _) = query.shape, keys.shape
    score = torch.full((b, s), -torch.inf)
    for row in range(b):
        at = valid[row].nonzero()[:, 0].tolist()
        score[row, at] = 0
        for head in range(h):
            z = [float(query[row, head] @ keys[row, head // (h // g), slot]) for slot in at]
            if kind == "soft":
                total = sum(torch.tensor(z).sub(max(z)).exp().tolist())
                z = [float(torch.tensor(x - max(z)).exp()) / total for x in z]
            if kind == "hard":
                best = sorted(range(len(z)), key=lambda i, z=z: (-z[i], i))[:k]
                z = [float(i in best) for i in range(len(z))]
            for slot, one in zip(at, z, strict=True):
                score[row, slot] += one
    return score


@pytest.mark.parametrize("kind", VOTES)
def test_votes_and_selections_are_those_of_a_loop(kind: Any) -> None:
    for seed, (h, g) in enumerate([(4, 4), (4, 2), (6, 1)]):
        query, keys = draw(3, h, 8, seed=seed), draw(3, g, 23, 8, seed=seed + 50)
        valid = torch.rand(3, 23, generator=torch.Generator().manual_seed(seed)) < 0.7
        found, want = vote(query, keys, kind, valid=valid, k=5), twin(query, keys, kind, valid, 5)
        torch.testing.assert_close(found, want, atol=1e-4, rtol=1e-4)
        index = select(found, 4)
        for row, values in zip(index.tolist(), found.tolist(), strict=True):
            order = sorted(range(23), key=lambda i, values=values: (-values[i], i))
            assert row == sorted(order[:4])


@pytest.mark.prop("tokenselect", 2)
@pytest.mark.parametrize("kind", KINDS)
def test_original_positions_equal_dense_attention_with_the_others_masked(kind: str) -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    class Spy(attend.SparseAttention):
        inside = attend.TokenSelect(**SMALL, positions="original", theta=None)

        def read(self, reading: _session.Reading) -> Any:
            calls: list[tuple[Tensor, int, int]] = []
            honest = tokenselect.assemble
            bounds = iter([(a, b) for a, b in reading.chunks(4) if reading.end(b) > 10])

            def watch(*args: Any, **kwargs: Any) -> Tensor:
                slots = honest(*args, **kwargs)
                calls.append((slots, *next(bounds)))
                return slots

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(tokenselect, "assemble", watch)
                out = self.inside.read(reading)[0]
            mask = hf.visible(reading.mask, reading.query, reading.key).expand(2, 1, -1, -1).clone()
            for slots, start, stop in calls:
                chosen = torch.zeros(2, reading.size, dtype=torch.bool)
                for row in range(2):
                    chosen[row, slots[row][slots[row] >= 0]] = True
                mask[:, 0, start:stop] &= chosen[:, None]
            want = attend.sparse_attend(
                reading.query, reading.key, reading.value, scaling=reading.scaling, seen=mask
            ).transpose(1, 2)
            real = mask.any(-1)[:, 0]
            seen.append((out[real], want[real]))
            return out, None

    tiny = model(kind)
    with Spy().attach(tiny) as trace:
        steps(tiny, IDS, PADDING, 30)
    assert trace.sparse_calls
    for found, want in seen:
        torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-5)


@pytest.mark.prop("tokenselect", 3)
def test_with_one_head_all_votes_choose_the_same_set() -> None:
    for seed in range(30):
        query, keys = draw(2, 1, 8, seed=seed), draw(2, 1, 40, 8, seed=seed + 100)
        sets = [select(vote(query, keys, kind, k=7), 7) for kind in VOTES]
        assert torch.equal(sets[0], sets[1])
        assert torch.equal(sets[0], sets[2])


@pytest.mark.prop("tokenselect", 4)
def test_scaling_a_head_moves_only_the_sum_of_dot_products() -> None:
    moved = 0
    for seed in range(20):
        query, keys = draw(1, 4, 8, seed=seed), draw(1, 4, 60, 8, seed=seed + 100)
        loud = query.clone()
        loud[:, 0] *= 1000
        assert torch.equal(vote(query, keys, "hard", k=6), vote(loud, keys, "hard", k=6))
        alone = select(vote(query[:, :1], keys[:, :1], "topk"), 6)
        assert torch.equal(select(vote(loud, keys, "topk"), 6), alone)
        moved += not torch.equal(select(vote(loud, keys, "hard", k=6), 6), alone)
    assert moved > 15, "the hard vote spreads over the heads"


@pytest.mark.prop("tokenselect", 4)
def test_a_constant_added_to_one_heads_logits_changes_nothing() -> None:
    query, keys = draw(1, 4, 8), draw(1, 4, 60, 8, seed=1)
    # A channel that only head 0 asks for and that all its keys share adds a constant to its dot products.
    query = torch.cat([query, torch.tensor([1.0, 0, 0, 0])[None, :, None]], -1)
    keys = torch.cat([keys, torch.zeros(1, 4, 60, 1)], -1)
    shifted = keys.clone()
    shifted[:, 0, :, -1] = 5.0
    for kind in VOTES:
        assert torch.equal(select(vote(query, keys, kind, k=6), 6), select(vote(query, shifted, kind, k=6), 6))


@pytest.mark.prop("tokenselect", 5)
@pytest.mark.parametrize("big", [1.0, 300.0])
def test_every_head_has_one_vote(big: float) -> None:
    query, keys = big * draw(3, 6, 8), draw(3, 2, 40, 8, seed=1)
    valid = torch.arange(40).expand(3, -1) >= torch.tensor([0, 7, 20])[:, None]
    for kind, total in (("soft", 6.0), ("hard", 30.0)):
        score = vote(query, keys, kind, valid=valid, k=5)  # pyright: ignore[reportArgumentType]
        torch.testing.assert_close(score.masked_fill(~valid, 0).sum(1), torch.full((3,), total))
        assert (score[~valid] == -torch.inf).all()


@pytest.mark.prop("tokenselect", 6)
def test_sets_have_their_size_their_sinks_and_their_window() -> None:
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        start = torch.randint(0, 12, (4,), generator=generator)
        stop = torch.randint(30, 41, (4,), generator=generator)
        valid = (torch.arange(40) >= start[:, None] + 3) & (torch.arange(40) < stop[:, None] - 5)
        index = select(draw(4, 40, seed=seed).masked_fill(~valid, -torch.inf), 6)
        slots = assemble(3, index, 5, stop, start=start)
        assert slots.shape == (4, 14)
        for row in range(4):
            found, first, last = slots[row].tolist(), int(start[row]), int(stop[row])
            assert found == sorted(set(found))
            assert set(range(first, first + 3)) | set(range(last - 5, last)) <= set(found)
            assert first <= found[0]
            assert found[-1] == last - 1


@pytest.mark.prop("tokenselect", 6)
def test_a_short_row_has_every_token_once() -> None:
    for length in range(1, 15):
        valid = torch.zeros(1, 40, dtype=torch.bool)
        valid[0, 20 + 3 : 20 + length - 5] = True
        index = select(torch.zeros(1, 40).masked_fill(~valid, -torch.inf), 6)
        slots = assemble(3, index, 5, 20 + length, start=20)[0]
        assert slots[slots >= 0].tolist() == list(range(20, 20 + length))


@pytest.mark.prop("tokenselect", 6)
def test_while_a_selection_is_reused_nothing_falls_out_of_sight() -> None:
    index = torch.tensor([[7, 9], [3, 8]])
    since, stop = torch.tensor([20, 24]), torch.tensor([26, 26])
    slots = assemble(2, index, 4, stop, since=since)
    assert slots[0].tolist() == [0, 1, 7, 9, *range(16, 26)]
    assert slots[1].tolist() == [0, 1, 3, 8, -1, -1, -1, -1, *range(20, 26)]
    assert assemble(2, index, 4, stop, since=since, strict=True)[0].tolist() == [0, 1, 7, 9, 22, 23, 24, 25]


@pytest.mark.prop("tokenselect", 7)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", ["contiguous", "original"])
def test_a_prefill_of_single_queries_equals_decoding(kind: str, place: Any) -> None:
    tiny = model(kind)
    method = attend.TokenSelect(**{**SMALL, "chunk": 1}, theta=None, positions=place)
    with method.attach(tiny):
        whole = run(tiny, IDS, PADDING).logits
        by_one = steps(tiny, IDS, PADDING, 1)
        helped = attend.prefill(tiny, {"input_ids": IDS, "attention_mask": PADDING}, chunk=1).logits
    real = PADDING[:, 1:].bool()
    torch.testing.assert_close(by_one[real], whole[:, 1:][real], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(helped, whole[:, -1:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("length", [40, 37])
def test_a_prompt_in_chunks_equals_one_forward(length: int) -> None:
    tiny = model("qwen2")
    ids, mask = IDS[:, :length], PADDING[:, :length]
    for place in ("contiguous", "original"):
        with attend.TokenSelect(**SMALL, positions=place).attach(tiny):
            whole = run(tiny, ids, mask).logits
            last = attend.prefill(tiny, {"input_ids": ids, "attention_mask": mask}, chunk=4)
        torch.testing.assert_close(last.logits, whole[:, -4:], atol=1e-4, rtol=1e-4)
        assert last.past_key_values.get_seq_length() == length


@pytest.mark.prop("tokenselect", 7)
def test_the_order_of_queries_in_a_chunk_does_not_matter() -> None:
    query, keys = draw(2, 4, 6, 8), draw(2, 2, 30, 8, seed=1)
    real = torch.tensor([[True] * 6, [False, True, True, True, True, True]])
    order = torch.tensor([5, 1, 4, 0, 3, 2])
    mean, other = mean_query(query, real), mean_query(query[:, :, order], real[:, order])
    torch.testing.assert_close(mean, other)
    assert torch.equal(select(vote(mean, keys), 5), select(vote(other, keys), 5))
    torch.testing.assert_close(mean[1], query[1, :, 1:].mean(1))


@pytest.mark.prop("tokenselect", 8)
def test_the_threshold_decides_about_reuse() -> None:
    tiny = model("qwen2")
    layers, rows, decoded = 2, 2, 12

    def go(theta: float | None) -> tuple[Tensor, Any]:
        with attend.TokenSelect(**SMALL, theta=theta).attach(tiny) as trace:
            out = run(tiny, IDS[:, :28])
            before = trace.selections
            parts = []
            for at in range(28, 40):
                out = run(tiny, IDS[:, at : at + 1], cache=out.past_key_values, at=at)
                parts.append(out.logits)
        return torch.cat(parts, 1), (trace.selections - before, trace.reused)

    off, counted = go(None)
    assert counted == (layers * rows * decoded, 0)
    exact, counted = go(1.0)
    assert counted == (layers * rows * decoded, 0)
    assert torch.equal(exact, off)
    _, counted = go(-1.0)
    assert counted == (layers * rows, layers * rows * (decoded - 1))
    some = [go(theta)[1][1] for theta in (-1.0, 0.0, 0.3, 0.6, 0.9, 1.0)]
    assert some == sorted(some, reverse=True)
    assert 0 < some[1] < some[0]


@pytest.mark.prop("tokenselect", 8)
def test_the_selection_cache_keeps_layers_and_rows_apart() -> None:
    cache, query = SelectionCache(0.9), draw(3, 16)
    assert cache.get(0, query) is None
    cache.put(0, query, torch.arange(6).view(3, 2))
    assert cache.get(1, query) is None
    found = cache.get(0, query)
    assert found is not None
    assert found.tolist() == [[0, 1], [2, 3], [4, 5]]
    other = query.clone()
    other[1] = -query[1]
    found = cache.get(0, other)
    assert found is not None
    assert found.tolist() == [[0, 1], [-1, -1], [4, 5]]
    cache.put(0, other[1:2], torch.tensor([[8, 9]]), rows=torch.tensor([False, True, False]))
    found = cache.get(0, other)
    assert found is not None
    assert found.tolist() == [[0, 1], [8, 9], [4, 5]]
    cache.reset()
    assert cache.get(0, other) is None


@pytest.mark.prop("tokenselect", 8)
def test_a_query_is_similar_to_itself_and_a_zero_one_to_nothing() -> None:
    query = torch.cat([draw(50, 33), torch.zeros(1, 33)])
    for theta in (1.0, 0.0, -1.0):
        cache = SelectionCache(theta)
        cache.put(0, query, torch.ones(51, 1, dtype=torch.long))
        found = cache.get(0, query)
        assert found is not None
        assert found[:, 0].tolist() == [1] * 50 + [-1]
    cache = SelectionCache(1.1)
    cache.put(0, query, torch.ones(51, 1, dtype=torch.long))
    assert cache.get(0, query) is None
    # The stored query stays the one that chose: small turns add up.
    cache, turning = SelectionCache(0.9), torch.tensor([[1.0, 0.0]])
    cache.put(0, turning, torch.ones(1, 1, dtype=torch.long))
    hits = []
    for _ in range(4):
        turning = turning @ torch.tensor([[0.96, 0.28], [-0.28, 0.96]])
        hits.append(cache.get(0, turning) is not None)
    assert hits == [True, False, False, False]


def test_a_new_prompt_resets_the_selection_cache() -> None:
    tiny = model("llama")
    with attend.TokenSelect(**SMALL, theta=-1.0).attach(tiny) as trace:
        cache = run(tiny, IDS[:, :24]).past_key_values
        run(tiny, IDS[:, 24:25], cache=cache, at=24)
        run(tiny, IDS[:, 25:30], cache=cache, at=25)
        before = trace.reused
        run(tiny, IDS[:, 30:31], cache=cache, at=30)
        assert trace.reused == before == 0
        run(tiny, IDS[:, 31:32], cache=cache, at=31)
        assert trace.reused == 4


@pytest.mark.prop("tokenselect", 9)
def test_queries_within_the_bound_choose_the_same() -> None:
    outside = 0
    for seed in range(60):
        query, keys = draw(6, seed=seed).double(), draw(20, 6, seed=seed + 100).double()
        bound = safe_cosine(query, keys, 5)
        assert 0 < bound <= 1
        want = select((keys @ query)[None].float(), 5)
        score, order = (keys @ query).sort(descending=True)
        # The worst turn is along the difference of the two keys at the border.
        away = keys[order[5]] - keys[order[4]]
        away -= (away @ query) / (query @ query) * query
        tangent = (1 / bound**2 - 1) ** 0.5
        for share in (0.2, 0.9, 0.999):
            for side in (away, draw(6, seed=seed + 500).double()):
                side = side - (side @ query) / (query @ query) * query
                turned = 3 * (query + share * tangent * query.norm() * side / side.norm())
                assert torch.equal(select((keys @ turned)[None].float(), 5), want)
        far = query + 1.01 * (score[4] - score[5]) / away.norm() * away / away.norm()
        outside += not torch.equal(select((keys @ far)[None].float(), 5), want)
    assert outside == 60, "beyond the gap the set changes"
    assert safe_cosine(torch.ones(2), torch.ones(3, 2), 1) == 1


@pytest.mark.prop("tokenselect", 10)
@pytest.mark.parametrize("kind", KINDS)
def test_turning_keys_back_is_exact_and_places_of_a_full_set_are_the_positions(kind: str) -> None:
    tiny = model(kind)
    turn = hf.layer_rotary("test", tiny, len(hf.layer_types(tiny)) - 1)
    x, at = draw(2, 3, 50, 8), torch.arange(50)[None] * 7
    torch.testing.assert_close(turn.unrotate(turn.rotate(x, turn.phases(at)), turn.phases(at)), x, atol=1e-5, rtol=1e-5)
    # The padded row has 31 tokens and reads all of them, at places that are its positions; the other row chooses.
    method = attend.TokenSelect(keep=26, n_init=2, n_local=7, chunk=4)
    with method.attach(tiny) as trace:
        found = steps(tiny, IDS, PADDING, 36)
    assert trace.sparse_calls
    dense = steps(tiny, IDS, PADDING, 36)
    torch.testing.assert_close(found[0], dense[0], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found[1], dense[1], atol=1e-2)


@pytest.mark.prop("tokenselect", 10)
def test_contiguous_places_of_all_keys_equal_dense_attention() -> None:
    turn = hf.layer_rotary("test", model("qwen2"), 0)
    query, keys, values = draw(2, 4, 3, 8), draw(2, 2, 20, 8, seed=1), draw(2, 2, 20, 8, seed=2)
    at = torch.arange(20)[None]

    def rotate(x: Tensor, places: Tensor) -> Tensor:
        return turn.rotate(x, turn.phases(places))

    found = tokenselect.attend(query, keys, values, scaling=0.3, positions="contiguous", rotate=rotate)
    want = tokenselect.attend(rotate(query, at[:, 17:]), rotate(keys, at), values, scaling=0.3)
    torch.testing.assert_close(found, want)
    causal = torch.ones(3, 20, dtype=torch.bool).tril(17)[None, None]
    by_hand = attend.sparse_attend(rotate(query, at[:, 17:]), rotate(keys, at), values, scaling=0.3, seen=causal)
    assert torch.equal(want, by_hand)


@pytest.mark.prop("tokenselect", 11)
@pytest.mark.parametrize("kind", KINDS)
def test_no_position_exceeds_the_budget(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = model(kind)
    highest: list[int] = []
    honest = tokenselect.attend

    def watch(*args: Any, places: Any, **kwargs: Any) -> Tensor:
        highest.append(int(torch.cat(places, 1).max()))
        return honest(*args, places=places, **kwargs)

    monkeypatch.setattr(tokenselect, "attend", watch)
    for method in (attend.TokenSelect(**SMALL, theta=None), attend.TokenSelect(**SMALL, theta=-1.0, strict=True)):
        with method.attach(tiny):
            steps(tiny, IDS, PADDING, 30)
    assert max(highest) == 2 + 3 + 5 - 1


@pytest.mark.prop("tokenselect", 12)
def test_grouped_heads_vote_on_their_own_keys() -> None:
    differs = 0
    for seed in range(10):
        query, keys = draw(2, 6, 8, seed=seed), draw(2, 2, 40, 8, seed=seed + 100)
        for kind in VOTES:
            found = vote(query, keys, kind, k=5)
            torch.testing.assert_close(found, vote(query, keys.repeat_interleave(3, 1), kind, k=5))
            release = vote(query, keys, kind, k=5, pairing="modulo")
            torch.testing.assert_close(release, vote(query, keys.repeat(1, 3, 1, 1), kind, k=5))
            differs += not torch.equal(select(found, 5), select(release, 5))
    assert differs > 20


def test_far_tokens_are_found_by_content() -> None:
    """A key that one query points at is chosen wherever it stands, since the vote has no distances."""
    query, keys = draw(1, 4, 8), 0.1 * draw(1, 2, 500, 8, seed=1)
    for place in (0, 250, 499):
        planted = keys.clone()
        planted[0, :, place] = query.view(1, 2, 2, 8).mean(2)[0]
        assert place in select(vote(query, planted), 3)[0].tolist()


def test_pooling_takes_neighbours_along() -> None:
    query, keys = draw(1, 2, 8), torch.zeros(1, 2, 20, 8)
    keys[0, :, 11] = query[0]
    assert select(vote(query, keys, pool=3), 3).tolist() == [[10, 11, 12]]


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"keep": 0}, ("keep = 0",)),
        ({"keep": True}, ("keep = True",)),
        ({"keep": 1.5}, ("keep = 1.5",)),
        ({"n_init": -1}, ("n_init = -1",)),
        ({"n_local": 0}, ("n_local = 0",)),
        ({"chunk": 513}, ("chunk = 513", "at most n_local = 512")),
        ({"theta": 1.5}, ("theta = 1.5", "[-1, 1]")),
        ({"theta": float("nan")}, ("theta = nan",)),
        ({"vote": "sum"}, ("vote", "soft")),
        ({"positions": "keep"}, ("positions", "contiguous")),
        ({"pool": 4}, ("pool = 4", "odd")),
        ({"scale": 0.0}, ("scale = 0.0",)),
        ({"scale": "none"}, ("scale = 'none'",)),
    ],
)
def test_bad_settings(settings: Any, parts: tuple[str, ...]) -> None:
    with pytest.raises(LimitError) as caught:
        attend.TokenSelect(**settings)
    for part in parts:
        assert part in str(caught.value)


def test_bad_arguments() -> None:
    query, keys = draw(1, 2, 8), draw(1, 2, 9, 8)
    for settings, name in (
        ({"kind": "mean"}, "kind"),
        ({"kind": "hard"}, "k = None"),
        ({"pool": 2}, "pool = 2"),
        ({"pairing": "all"}, "pairing"),
    ):
        with pytest.raises(LimitError, match=name):
            vote(query, keys, **settings)  # pyright: ignore[reportArgumentType]
    with pytest.raises(LimitError, match=r"S=9"):
        select(vote(query, keys), 10)
    with pytest.raises(LimitError, match="theta"):
        SelectionCache(float("nan"))
    with pytest.raises(LimitError, match="k = 9"):
        safe_cosine(query[0, 0], keys[0, 0], 9)
    with pytest.raises(LimitError, match="rotate"):
        tokenselect.attend(query[:, :, None], keys, keys, scaling=1.0, positions="contiguous")
    with pytest.raises(LimitError, match="positions"):
        tokenselect.attend(query[:, :, None], keys, keys, scaling=1.0, positions="none")  # pyright: ignore[reportArgumentType]


def test_a_key_that_is_no_number_loses() -> None:
    score = torch.tensor([[0.0, torch.nan, 2.0, 1.0]])
    assert select(score, 2).tolist() == [[2, 3]]


@pytest.mark.parametrize("settings", [{"keep": 0.2}, {"keep": 0.2, "theta": -1.0}])
def test_a_share_counts_the_cached_tokens(settings: Any) -> None:
    tiny = model("qwen2")
    with attend.TokenSelect(**{**SMALL, **settings}).attach(tiny) as trace:
        steps(tiny, IDS, PADDING, 20)
    assert trace.sparse_calls


@pytest.mark.parametrize("place", ["contiguous", "original"])
def test_a_branched_draft_is_read_as_its_branches(place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes of a tree of drafts, masked to their ancestors, get what each branch would get alone."""

    def low_slots_win(query: Tensor, keys: Tensor, *_: Any, valid: Tensor, **__: Any) -> Tensor:
        return (-torch.arange(keys.shape[2])).float().expand_as(valid).masked_fill(~valid, -torch.inf)

    monkeypatch.setattr(tokenselect, "vote", low_slots_win)
    tiny = model("qwen2")
    head, extra = IDS[:1, :30], IDS[:1, 30:34]
    tree = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]], dtype=torch.bool)

    def go(nodes: list[int]) -> Tensor:
        count, seen = len(nodes), tree[nodes][:, nodes]
        mask = torch.cat([torch.ones(count, 30, dtype=torch.bool), seen], 1)[None, None]
        # The window has 4 tokens of the text and the nodes.
        method = attend.TokenSelect(keep=6, n_init=2, n_local=4 + count, chunk=4, positions=place)
        with torch.no_grad():
            with attend.TokenSelect(keep=100, positions=place).attach(tiny):
                cache = run(tiny, head).past_key_values
            with method.attach(tiny) as trace:
                where = 29 + seen.sum(-1)[None]
                out = tiny(input_ids=extra[:, nodes], attention_mask=mask, position_ids=where, past_key_values=cache)
        assert trace.sparse_calls
        return out.logits

    whole = go([0, 1, 2, 3])
    for branch in ([0, 1], [0, 2, 3]):
        torch.testing.assert_close(whole[:, branch], go(branch), atol=1e-4, rtol=1e-4)
