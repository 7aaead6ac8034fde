from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from tokenmill import attend, hf
from tokenmill.attend import _session
from tokenmill.attend import token_sparse_attention as tsa
from tokenmill.errors import LimitError, UnsupportedError
from tokenmill.laws.general import fingerprint

from .methods import IDS, KINDS, PADDING, model, run, steps

SETTINGS: dict[str, Any] = {"tau": 0.3, "window": 4, "pool_kernel": 3, "min_tokens": 3}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def case(seed: int = 0, *, heads: int = 4, groups: int = 2, length: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of two rows."""
    query, key = draw(2, heads, length, 8, seed=seed), draw(2, groups, length, 8, seed=seed + 1)
    return query, key, draw(2, groups, length, 6, seed=seed + 2)


def select(query: Tensor, key: Tensor, **settings: Any) -> Tensor | None:
    return tsa.select_tokens(query, key, scaling=0.35, **{**SETTINGS, **settings})


def attention_matrix(query: Tensor, key: Tensor, valid: Tensor | None = None) -> Tensor:
    """Causal softmax, (B, H, L, L), written out."""
    length = key.shape[2]
    logits = query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).mT * 0.35
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    if valid is not None:
        seen = seen & valid[:, None, None]
    return logits.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)


def twin(query: Tensor, key: Tensor, *, tau: float, window: int, pool: int, least: int, row: int) -> list[list[int]]:
    """The kept tokens of each head of a row, step by step as the paper has it."""
    matrix = attention_matrix(query, key)[row]
    count, length, prefix = matrix.shape[0], matrix.shape[1], matrix.shape[1] - window
    half = pool // 2
    score = []
    for head in range(count):
        raw = [sum(float(matrix[head, q, t]) for q in range(prefix, length)) / window for t in range(prefix)]
        score.append([sum(raw[max(t - half, 0) : t + half + 1]) / pool for t in range(prefix)])
    mean = [sum(score[h][t] for h in range(count)) / count for t in range(prefix)]
    share = sorted(x / (sum(mean) + 1e-8) for x in mean)
    mass, below = 0.0, 0
    for x in share:
        mass += x
        below += mass < tau
    keep = max(least, prefix - (below + 1 if below else 0))
    chosen = [sorted(sorted(range(prefix), key=lambda t, s=s: (-s[t], t))[:keep]) for s in score]
    return [kept + list(range(prefix, length)) for kept in chosen]


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (6, 1)])
def test_the_choice_is_that_of_a_loop(heads: int, groups: int) -> None:
    dense = 0
    for seed in range(8):
        query, key, _ = case(seed, heads=heads, groups=groups)
        for tau in (0.01, 0.1, 0.4, 0.9):
            for row in range(2):
                found = select(query[row : row + 1], key[row : row + 1], tau=tau)
                want = twin(query, key, tau=tau, window=4, pool=3, least=3, row=row)
                if found is None:
                    dense += 1
                    assert all(kept == list(range(40)) for kept in want)
                else:
                    assert found[0].tolist() == want
    assert dense, "the smallest share drops nothing in some rows"


@pytest.mark.prop("token-sparse-attention", 1)
@pytest.mark.parametrize("padding", [None, PADDING])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_drops_nothing_is_dense(kind: str, attn: str, padding: Any) -> None:
    tiny = model(kind, attn=attn)
    mask = torch.ones_like(IDS) if padding is None else padding
    real = mask.bool()
    want, later = run(tiny, IDS, mask).logits, steps(tiny, IDS, mask, 20)
    for settings in ({"tau": 0.0}, {"min_tokens": 1000}, {"min_tokens": 36}, {"force_first": 36}):
        with attend.TokenSparseAttention(**{**SETTINGS, **settings}).attach(tiny) as trace:
            torch.testing.assert_close(run(tiny, IDS, mask).logits[real], want[real], atol=1e-6, rtol=1e-6)
            torch.testing.assert_close(steps(tiny, IDS, mask, 20), later, atol=1e-6, rtol=1e-6)
        assert trace.sparse_calls == 0


@pytest.mark.prop("token-sparse-attention", 2)
def test_rows_go_back_to_their_places() -> None:
    query, key, value = case()
    everything = torch.arange(40).expand(2, 4, -1)
    assert torch.equal(tsa.decompress(tsa.compress(query, key, value, everything)[0], everything, 40), query)
    idx = select(query, key)
    assert idx is not None
    idx = torch.cat([torch.full((2, 4, 2), -1), idx], -1)  # rows that are none go nowhere
    short = tsa.compress(query, key, value, idx)
    assert [x.shape[2] for x in short] == [idx.shape[2]] * 3
    back = tsa.decompress(short[0], idx, 40)
    for row in range(2):
        for head in range(4):
            kept = idx[row, head, 2:]
            assert torch.equal(back[row, head, kept], query[row, head, kept])
            rest = torch.ones(40, dtype=torch.bool)
            rest[kept] = False
            assert (back[row, head, rest] == 0).all()


class Twin(attend.SparseAttention):
    """Compares every sparse answer with dense attention in which keys outside the set are hidden."""

    by_head = True

    def __init__(self, method: tsa.TokenSparseAttention) -> None:
        self.method, self.compared = method, 0

    def read(self, reading: _session.Reading) -> Any:
        before = reading.trace.sparse_calls
        out, weights = self.method.read(reading)
        if reading.trace.sparse_calls == before:
            return out, weights
        seen = hf.visible(reading.mask, reading.query, reading.key)
        valid = None if reading.mask is None else seen.any(2)[:, 0].expand(2, -1)
        idx = tsa.select_tokens(reading.query, reading.key, scaling=reading.scaling, valid=valid, **SETTINGS)
        assert idx is not None
        kept = torch.zeros(*reading.query.shape[:2], reading.size + 1, dtype=torch.bool)
        kept = kept.scatter(-1, torch.where(idx < 0, reading.size, idx), True)[..., :-1]
        want = attend.sparse_attend(
            reading.query, reading.key, reading.value, scaling=reading.scaling, seen=seen & kept[:, :, None]
        )
        want = want.masked_fill(~kept[..., None], 0).transpose(1, 2)
        torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)
        self.compared += 1
        return out, weights


@pytest.mark.prop("token-sparse-attention", 3)
@pytest.mark.parametrize("padding", [torch.ones_like(PADDING), PADDING])
@pytest.mark.parametrize("kind", KINDS)
def test_kept_tokens_attend_to_kept_tokens_and_others_get_zero(kind: str, padding: Tensor) -> None:
    tiny = model(kind)
    twin = Twin(attend.TokenSparseAttention(**SETTINGS))
    with twin.attach(tiny):
        run(tiny, IDS, padding)
    assert twin.compared == 2


@pytest.mark.prop("token-sparse-attention", 4)
def test_indices_ascend_hold_the_window_and_shrink_with_the_settings() -> None:
    for seed in range(10):
        query, key, _ = case(seed)
        widths = []
        for tau in (0.0, 0.02, 0.1, 0.3, 0.6, 0.95):
            idx = select(query, key, tau=tau, min_tokens=1)
            widths.append(40 if idx is None else idx.shape[2])
            if idx is not None:
                assert (idx.diff(dim=-1) > 0).all()
                assert torch.equal(idx[..., -4:], torch.arange(36, 40).expand(2, 4, -1))
        assert widths == sorted(widths, reverse=True)
        assert widths[0] == 40 > widths[-1]
        least = [select(query, key, tau=0.95, min_tokens=n) for n in (1, 10, 20, 36)]
        sizes = [40 if idx is None else idx.shape[2] for idx in least]
        assert sizes == sorted(sizes)
        assert sizes[-1] == 40


@pytest.mark.prop("token-sparse-attention", 5)
@pytest.mark.parametrize("tau", [0.05, 0.3, 0.8])
def test_the_dropped_mass_reaches_tau_and_not_without_its_last_token(tau: float) -> None:
    for seed in range(20):
        score = draw(3, 4, 50, seed=seed).exp()
        keep = tsa.coverage(score, tau)
        share = score.mean(1) / score.mean(1).sum(-1, keepdim=True)
        for row in range(3):
            dropped = share[row].sort().values[: 50 - int(keep[row])]
            assert len(dropped) >= 2
            assert float(dropped.sum()) >= tau - 1e-5
            assert float(dropped[:-1].sum()) < tau


def test_nothing_goes_when_the_first_token_crosses_or_there_is_no_mass() -> None:
    assert tsa.coverage(torch.ones(1, 2, 4), 0.25 - 1e-3).tolist() == [4]
    assert tsa.coverage(torch.ones(1, 2, 4), 0.3).tolist() == [2]
    assert tsa.coverage(torch.zeros(1, 2, 4), 0.5).tolist() == [4]
    assert tsa.coverage(torch.tensor([[[-torch.inf, -torch.inf, 1.0, 1.0]]]), 0.6).tolist() == [1]


@pytest.mark.prop("token-sparse-attention", 6)
def test_permuted_heads_give_permuted_sets() -> None:
    query, key, _ = case(heads=4, groups=4)
    order = torch.tensor([2, 0, 3, 1])
    idx, moved = select(query, key), select(query[:, order], key[:, order])
    assert idx is not None
    assert moved is not None
    assert torch.equal(moved, idx[:, order])


@pytest.mark.prop("token-sparse-attention", 7)
@pytest.mark.parametrize("kind", KINDS)
def test_the_last_token_is_attended_to_the_kept_keys(kind: str) -> None:
    tiny = model(kind, layers=1)

    class Last(Twin):
        def read(self, reading: _session.Reading) -> Any:
            out, weights = super().read(reading)
            assert (out[:, -1].abs().amax(-1) > 0).all()
            return out, weights

    twin = Last(attend.TokenSparseAttention(**SETTINGS, layers=(0,)))
    with twin.attach(tiny):
        found = run(tiny, IDS, PADDING).logits[:, -1]
    assert twin.compared == 1
    assert torch.isfinite(found).all()


@pytest.mark.prop("token-sparse-attention", 8)
@pytest.mark.parametrize("kind", KINDS)
def test_the_cache_is_the_dense_one_up_to_the_first_sparse_layer(kind: str) -> None:
    tiny = model(kind)
    first = max(index for index, of in enumerate(hf.layer_types(tiny)) if of == "full_attention")
    method = attend.TokenSparseAttention(**SETTINGS, layers=(first,))
    dense = run(tiny, IDS, PADDING).past_key_values
    with method.attach(tiny) as trace:
        cache, other = (run(tiny, IDS, PADDING).past_key_values for _ in range(2))
        assert trace.sparse_calls == 2
        for ours, theirs in zip(cache.layers[: first + 1], dense.layers, strict=False):
            assert torch.equal(ours.keys, theirs.keys)
            assert torch.equal(ours.values, theirs.values)
        inside = run(tiny, IDS[:, :1], cache=cache, at=40).logits
    assert torch.equal(run(tiny, IDS[:, :1], cache=other, at=40).logits, inside)


@pytest.mark.prop("token-sparse-attention", 9)
def test_drift_is_relative_and_the_least_is_chosen() -> None:
    before, after = draw(2, 9, 16), draw(2, 9, 16, seed=1)
    drift = tsa.layer_drift(before, after)
    torch.testing.assert_close(tsa.layer_drift(7 * before, 7 * after), drift)
    assert tsa.layer_drift(before, before) == 0
    real = torch.arange(9).expand(2, -1) >= torch.tensor([0, 4])[:, None]
    by_hand = [float((after - before)[b, t].norm() / before[b, t].norm()) for b, t in real.nonzero().tolist()]
    torch.testing.assert_close(tsa.layer_drift(before, after, real), torch.tensor(sum(by_hand) / len(by_hand)))
    for number in (1, 5, 12):
        values = draw(number, seed=number)
        order = values.argsort().tolist()
        for delta in (0.0, 0.2, 0.5, 0.77, 1.0):
            count = int(delta * number)
            assert tsa.choose_layers(values, delta) == tuple(sorted(order[:count]))
    assert tsa.choose_layers(torch.tensor([1.0, 1.0, 2.0]), 0.4) == ()
    assert tsa.choose_layers(torch.tensor([3.0, 1.0, 2.0, 0.0]), 0.5, among=(0, 1, 2)) == (1,)


@pytest.mark.parametrize("kind", KINDS)
def test_the_profile_is_that_of_the_hidden_states(kind: str) -> None:
    tiny = model(kind)
    before = fingerprint(tiny)
    found = tsa.profile_drift(tiny, IDS, PADDING)
    assert fingerprint(tiny)["config"] == before["config"]
    with torch.no_grad():
        hidden = tiny.model(input_ids=IDS, attention_mask=PADDING, output_hidden_states=True).hidden_states
    want = [tsa.layer_drift(a, b, PADDING.bool()) for a, b in pairwise(hidden[:-1])]
    torch.testing.assert_close(found[:-1], torch.stack(want))  # the last hidden state is behind the norm
    assert found.shape == (len(hidden) - 1,)
    with pytest.raises(LimitError, match="input_ids"):
        tsa.profile_drift(tiny, IDS[:, :0])


@pytest.mark.prop("token-sparse-attention", 10)
def test_the_proxy_is_rows_of_the_attention_matrix() -> None:
    query, key, _ = case()
    valid = torch.arange(40).expand(2, -1) >= torch.tensor([0, 7])[:, None]
    want = attention_matrix(query, key, valid)[:, :, 36:, :36].mean(2)
    found = tsa.prefix_scores(query, key, scaling=0.35, window=4, valid=valid)
    torch.testing.assert_close(found, want, atol=1e-6, rtol=1e-6)
    assert (found.sum(-1) < 1).all()


@pytest.mark.prop("token-sparse-attention", 11)
def test_rows_stand_alone_and_padding_is_never_kept() -> None:
    for seed in range(10):
        query, key, _ = case(seed)
        start = torch.tensor([0, 9])
        valid = torch.arange(40).expand(2, -1) >= start[:, None]
        # So much mass that the smallest number of tokens decides, which makes rows equal.
        idx = select(query, key, tau=0.99, min_tokens=8, valid=valid)
        assert idx is not None
        for row in range(2):
            first = int(start[row])
            alone = select(query[row : row + 1, :, first:], key[row : row + 1, :, first:], tau=0.99, min_tokens=8)
            assert alone is not None
            assert torch.equal(idx[row], alone[0] + first)
        assert (idx[1] >= 9).all()
        wide = select(query, key, tau=0.02, valid=valid)
        if wide is not None:
            assert ((wide[1] >= 9) | (wide[1] == -1)).all()


def test_padding_beside_a_sink_is_not_kept_for_its_neighbours_sake() -> None:
    query, key = torch.ones(1, 1, 40, 8), torch.zeros(1, 1, 40, 8)
    key[..., 9, 0] = 60.0
    idx = select(query, key, tau=0.5, min_tokens=2, valid=torch.arange(40)[None] >= 9)
    assert idx is not None
    assert {9, 10} < set(idx[0, 0].tolist())
    assert int(idx.min()) == 9


def test_a_row_keeps_what_the_neediest_one_keeps() -> None:
    flat, sharp = torch.zeros(1, 1, 40, 8), torch.zeros(1, 1, 40, 8)
    sharp[..., 5, 0] = 60.0
    query = torch.ones(2, 1, 40, 8)
    idx = select(query, torch.cat([flat, sharp]), tau=0.3)
    assert idx is not None
    alone = select(query[:1], flat, tau=0.3)
    assert alone is not None
    assert idx.shape == (2, 1, alone.shape[2])
    only = select(query[:1], sharp, tau=0.3)
    assert only is not None
    assert only.shape[2] < alone.shape[2]


def test_first_tokens_can_be_forced() -> None:
    query, key, _ = case()
    valid = torch.arange(40).expand(2, -1) >= torch.tensor([0, 9])[:, None]
    idx = select(query, key, tau=0.99, force_first=2, valid=valid)
    assert idx is not None
    for row, first in ((0, 0), (1, 9)):
        for head in range(4):
            assert {first, first + 1} <= set(idx[row, head].tolist())


def test_another_attention_runs_on_the_kept_tokens() -> None:
    tiny, shapes = model("qwen2"), []

    def inner(query: Tensor, key: Tensor, value: Tensor, *, scaling: float, seen: Any, **options: Any) -> Tensor:
        shapes.append((query.shape, key.shape, value.shape))
        return tsa.short_attention(query, key, value, scaling=scaling, seen=seen, **options)

    with attend.TokenSparseAttention(**SETTINGS).attach(tiny):
        want = run(tiny, IDS).logits
    with attend.TokenSparseAttention(**SETTINGS, inner=inner).attach(tiny):
        assert torch.equal(run(tiny, IDS).logits, want)
    assert len(shapes) == 1
    assert shapes[0][0] == shapes[0][1] == shapes[0][2]


def test_softcap_reaches_the_short_attention() -> None:
    query, key, value = (x.repeat_interleave(2, 1) if n else x for n, x in enumerate(case()))
    causal = torch.ones(40, 40, dtype=torch.bool).tril()
    want = attend.sparse_attend(query, key, value, scaling=0.3, seen=causal, softcap=1.5)
    torch.testing.assert_close(tsa.short_attention(query, key, value, scaling=0.3, seen=None, softcap=1.5), want)
    plain = tsa.short_attention(query, key, value, scaling=0.3, seen=None)
    torch.testing.assert_close(plain, attend.sparse_attend(query, key, value, scaling=0.3, seen=causal))


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_and_prompts_in_pieces_stay_dense(kind: str) -> None:
    tiny = model(kind)
    with attend.TokenSparseAttention(**SETTINGS).attach(tiny) as trace:
        cache = run(tiny, IDS[:, :6]).past_key_values
        assert trace.sparse_calls == 0
        run(tiny, IDS[:, 6:30], cache=cache, at=6)
        run(tiny, IDS[:, 30:31], cache=cache, at=30)
        assert trace.sparse_calls == 0
        out = tiny.generate(input_ids=IDS, attention_mask=PADDING, max_new_tokens=4, do_sample=False, num_beams=2)
        assert trace.sparse_calls
        assert out.shape == (2, 44)
        assert 0 < trace.density < 1


def test_by_default_the_upper_half_of_the_full_layers_is_sparse() -> None:
    for kind, count in (("llama", 1), ("gemma3", 1)):
        tiny = model(kind)
        with attend.TokenSparseAttention(**SETTINGS).attach(tiny) as trace:
            run(tiny, IDS)
        assert trace.sparse_calls == count
    with attend.TokenSparseAttention(**SETTINGS, layers=(0, 1)).attach(tiny := model("llama")) as trace:
        run(tiny, IDS)
    assert trace.sparse_calls == 2
    with (
        pytest.raises(UnsupportedError, match="sliding_attention"),
        attend.TokenSparseAttention(**SETTINGS, layers=(0,)).attach(model("gemma3")),
    ):
        pytest.fail("it was attached")


def test_rows_that_are_padded_on_the_right_are_refused() -> None:
    tiny, mask = model("llama"), torch.ones_like(IDS)
    mask[0, 35:] = 0
    with (
        attend.TokenSparseAttention(**SETTINGS).attach(tiny),
        pytest.raises(UnsupportedError, match="Pad on the left"),
        torch.no_grad(),
    ):
        tiny(input_ids=IDS, attention_mask=mask)


def test_the_model_is_given_back_after_an_error() -> None:
    tiny = model("qwen2")
    before = fingerprint(tiny)

    def fail(*_: Any, **__: Any) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), attend.TokenSparseAttention(**SETTINGS, inner=fail).attach(tiny):
        run(tiny, IDS)
    after = fingerprint(tiny)
    assert all(after[key] == before[key] for key in before if not key.startswith("tensor"))


def test_gradients_flow_through_the_kept_tokens() -> None:
    tiny = model("llama")
    embeds = tiny.get_input_embeddings()(IDS[:1]).detach().requires_grad_()
    with attend.TokenSparseAttention(**SETTINGS).attach(tiny):
        tiny(inputs_embeds=embeds).logits[0, -1].sum().backward()
    assert embeds.grad is not None
    assert torch.isfinite(embeds.grad).all()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"tau": -0.1}, r"tau = -0\.1"),
        ({"tau": 1.0}, r"tau = 1\.0"),
        ({"tau": float("nan")}, "tau = nan"),
        ({"window": 0}, "window = 0"),
        ({"pool_kernel": 4}, "pool_kernel = 4.*odd"),
        ({"pool_kernel": 0}, "pool_kernel = 0"),
        ({"min_tokens": 0}, "min_tokens = 0"),
        ({"force_first": -1}, "force_first = -1"),
    ],
)
def test_bad_settings(settings: Any, says: str) -> None:
    with pytest.raises(LimitError, match=says):
        attend.TokenSparseAttention(**settings)
    query, key, _ = case()
    with pytest.raises(LimitError, match=says):
        select(query, key, **settings)


def test_bad_arguments() -> None:
    query, key, _ = case()
    with pytest.raises(LimitError, match=r"window = 41.*L = 40"):
        select(query, key, window=41)
    for delta in (-0.1, 1.5, float("nan"), True):
        with pytest.raises(LimitError, match="delta"):
            tsa.choose_layers(torch.zeros(3), delta)
    with pytest.raises(LimitError, match="among"):
        tsa.choose_layers(torch.zeros(3), 0.5, among=(3,))
    with (
        pytest.raises(LimitError, match=r"among the model's attention layers \[0, 1\]"),
        attend.TokenSparseAttention(layers=(40,)).attach(model("llama")),
    ):
        pytest.fail("it was attached")
