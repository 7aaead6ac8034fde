from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch

from tokenmill.errors import LimitError
from tokenmill.hf.layout import decoder
from tokenmill.hf.vision import visual_mask
from tokenmill.prune import ToDRE, cross_modal_ratios, select_diverse, should_drop_visual
from tokenmill.prune._attention import LayerProbe

from . import references, vlms

OBJECTIVES: tuple[Any, Any] = ("max_sum", "k_center")
FIXTURE = torch.tensor(
    [
        [1, 0, 0],
        [0.9, 0.1, 0],
        [0.2, 1, 0],
        [0, 0.8, 0.6],
        [0.6, 0.7, 0.1],
        [0.1, 0.2, 1],
        [0.5, 0.5, 0.5],
        [0.1, 0.3, 0.9],
    ]
)


def tokens(n: int = 25, d: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.prop("todre", 3)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_pick_is_the_brute_force_argmin(objective: Any) -> None:
    for x, k, g in references.instances():
        n = len(x)
        pivot = int(torch.randint(0, n, (), generator=g))
        sim = references.cosines(x)
        empty = (x == 0).all(1).tolist()

        def value(i: int, chosen: list[int], sim: list = sim, empty: list = empty, n: int = n) -> float:
            if empty[i]:
                return -float(n) - 1
            values = [sim[j][i] for j in chosen]
            if objective == "k_center":
                return -max(values)
            total = values[0]  # summed in the order of choice, as the running sum is
            for one in values[1:]:
                total += one
            return -total

        want = references.greedy(n, k, pivot, value)
        assert select_diverse(x, k, pivot=pivot, objective=objective).tolist() == want


def test_hand_checked_orders() -> None:
    assert select_diverse(FIXTURE, 8, pivot=0).tolist() == [0, 3, 5, 2, 1, 7, 4, 6]
    assert select_diverse(FIXTURE, 8, pivot=0, objective="k_center").tolist() == [0, 3, 4, 5, 2, 6, 7, 1]


@pytest.mark.prop("todre", 1)
@pytest.mark.prop("todre", 2)
@pytest.mark.prop("todre", 7)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_sizes_and_prefix(objective: Any) -> None:
    x = tokens()
    whole = select_diverse(x, 25, pivot=3, objective=objective)
    assert sorted(whole.tolist()) == list(range(25))
    assert select_diverse(x, 1, pivot=3, objective=objective).tolist() == [3]
    for k in range(1, 25):
        assert torch.equal(select_diverse(x, k, pivot=3, objective=objective), whole[:k])


@pytest.mark.prop("todre", 4)
def test_running_sum_does_not_drift() -> None:
    x = tokens(600, 64).float()
    order = select_diverse(x, 300, pivot=0)
    unit = torch.nn.functional.normalize(x.double(), dim=1)
    for step in (50, 150, 299):
        sums = unit @ unit[order[:step]].sum(0)
        rest = torch.ones(600, dtype=torch.bool)
        rest[order[:step]] = False
        assert float(sums[order[step]]) <= float(sums[rest].min()) + 1e-4 * step**0.5


@pytest.mark.prop("todre", 5)
@pytest.mark.prop("todre", 6)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_invariances(objective: Any) -> None:
    for seed in range(20):
        x = tokens(seed=seed)
        g = torch.Generator().manual_seed(seed)
        order = select_diverse(x, 10, pivot=2, objective=objective)
        scale = torch.rand(25, 1, generator=g, dtype=torch.float64) + 0.1
        turn, _ = torch.linalg.qr(torch.randn(6, 6, generator=g, dtype=torch.float64))
        assert torch.equal(select_diverse(x * scale @ turn, 10, pivot=2, objective=objective), order)
        shuffle = torch.randperm(25, generator=g)
        pivot = int((shuffle == 2).nonzero())
        assert torch.equal(shuffle[select_diverse(x[shuffle], 10, pivot=pivot, objective=objective)], order)


@pytest.mark.prop("todre", 8)
def test_k_center_is_within_twice_the_best_radius() -> None:
    for seed in range(60):
        x = tokens(8, 3, seed)
        unit = torch.nn.functional.normalize(x, dim=1)
        angle = (unit @ unit.T).clamp(-1, 1).acos()
        for k in (1, 2, 3, 4):
            kept = select_diverse(x, k, pivot=0, objective="k_center")
            radius = float(angle[:, kept].amin(1).max())
            best = min(float(angle[:, list(c)].amin(1).max()) for c in combinations(range(8), k))
            assert radius <= 2 * best + 1e-9


@pytest.mark.prop("todre", 9)
def test_the_two_versions_differ_on_copies() -> None:
    angles = torch.deg2rad(torch.tensor([0.0, 150, 150, 150, 70, 80, 90], dtype=torch.float64))
    x = torch.stack([angles.cos(), angles.sin()], 1)
    far = [round(float(torch.rad2deg(angles[i]))) for i in select_diverse(x, 3, pivot=0)]
    spread = [round(float(torch.rad2deg(angles[i]))) for i in select_diverse(x, 3, pivot=0, objective="k_center")]
    assert far == [0, 150, 150]
    assert spread[:2] == [0, 150]
    assert spread[2] in (70, 80)


ATTENTION = torch.tensor(
    [
        [1, 0, 0, 0, 0, 0],
        [0.5, 0.5, 0, 0, 0, 0],
        [0.2, 0.3, 0.5, 0, 0, 0],
        [0.4, 0.2, 0.2, 0.2, 0, 0],
        [0.5, 0.05, 0.05, 0.2, 0.2, 0],
        [0.6, 0.02, 0.08, 0.1, 0.1, 0.1],
    ]
)


@pytest.mark.prop("todre", 10)
def test_ratios() -> None:
    s, v, t = torch.tensor([0]), torch.tensor([1, 2]), torch.tensor([3, 4, 5])
    t2v, v2t = cross_modal_ratios(ATTENTION[None, None], s, v, t)
    assert float(t2v) == pytest.approx(0.2)
    assert float(v2t) == 0
    t2s, _ = cross_modal_ratios(ATTENTION[None, None], torch.cat([v, t[:0]]), s, t)
    rest = float(ATTENTION[3:, 3:].sum() / 3)
    assert float(t2v) + float(t2s) + rest == pytest.approx(1.0)
    assert should_drop_visual(t2v, v2t, 0.25).tolist() == [True]
    assert should_drop_visual(t2v, v2t, 0.1).tolist() == [False]
    assert should_drop_visual(t2v, v2t, 0.0).tolist() == [False]
    assert should_drop_visual(t2v, v2t, 1.01).tolist() == [True]
    none = torch.zeros(0, dtype=torch.long)
    empty = cross_modal_ratios(ATTENTION[None, None], s, none, t)
    assert [float(x) for x in empty] == [0, 0]


@pytest.mark.prop("todre", 11)
def test_behind_the_last_layer_nothing_changes() -> None:
    model, inputs = vlms.model("llava"), vlms.inputs("llava")
    with torch.no_grad():
        plain = model(**inputs).logits
        with ToDRE(keep=1.0, tau=2.0, depth=1.0).attach(model) as trace:
            ours = model(**inputs).logits
    assert torch.equal(plain, ours)
    assert not trace.shortening.kept


@pytest.mark.prop("todre", 14)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_batches_and_padding(objective: Any) -> None:
    x = torch.stack([tokens(seed=s) for s in range(4)])
    both = select_diverse(x, 7, pivot=torch.tensor([0, 5, 3, 1]), objective=objective)
    for row, pivot in enumerate((0, 5, 3, 1)):
        assert torch.equal(select_diverse(x[row], 7, pivot=pivot, objective=objective), both[row])
    padded = torch.cat([x, torch.ones(4, 3, 6, dtype=torch.float64)], 1)
    mask = torch.arange(28).expand(4, -1) < 25
    ragged = select_diverse(padded, 7, pivot=torch.tensor([0, 5, 3, 1]), objective=objective, mask=mask)
    assert torch.equal(ragged, both)
    assert torch.equal(select_diverse(x, 7, pivot=2, stream=True), select_diverse(x, 7, pivot=2, stream=False))


def test_pivots() -> None:
    x = tokens()
    scores = torch.rand(25, generator=torch.Generator().manual_seed(0))
    assert select_diverse(x, 3, scores=scores)[0] == scores.argmax()
    unit = torch.nn.functional.normalize(x, dim=1)
    like = torch.nn.functional.cosine_similarity(unit, unit.mean(0, keepdim=True))
    assert select_diverse(x, 3, pivot="center")[0] == like.argmax()
    assert select_diverse(x, 3, pivot="farthest")[0] == like.argmin()
    first = {
        int(select_diverse(x, 1, pivot="random", generator=torch.Generator().manual_seed(s))[0]) for s in range(40)
    }
    assert len(first) > 10
    with pytest.raises(LimitError, match="scores"):
        select_diverse(x, 3, pivot="cls")
    with pytest.raises(LimitError, match="pivot"):
        select_diverse(x, 3, pivot=25)


@pytest.mark.parametrize("kind", vlms.WITH_CLS)
def test_the_class_tokens_favourite_is_kept(kind: str) -> None:
    """Against the tower's own attention, from its eager implementation."""
    from tokenmill.hf.vision import encode
    from tokenmill.prune._attention import cls_attention

    model, inputs = vlms.model(kind, attn="eager"), vlms.inputs(kind)
    with torch.no_grad():
        pruned = ToDRE(keep=0.3, tau=0.0).prepare(model, inputs)
        visuals = encode("test", model, inputs, tower_layers=(-1,)).visuals
    for visual, kept in zip(visuals, pruned.report, strict=True):
        attention = cls_attention(visual.tower[-1])
        attention[1:] = -1
        assert int(visual.pack(attention).nan_to_num(-1).argmax()) in kept.keep.tolist()


def test_a_zero_token_comes_last() -> None:
    x = tokens()
    x[4] = 0
    assert select_diverse(x, 25, pivot=0)[-1] == 4


@pytest.mark.parametrize("kind", vlms.KINDS)
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_the_probe_sees_the_layers_own_attention(kind: str, attn: str) -> None:
    model, inputs = vlms.model(kind, attn), vlms.inputs(kind)
    probe = LayerProbe(model, 2)
    with torch.no_grad(), probe.watch():
        model(**inputs, use_cache=False)
        ours = probe.attention(slice(None))
    other = vlms.model(kind, "eager")
    with torch.no_grad():
        weights = other(**inputs, use_cache=False, output_attentions=True).attentions[2]
    real = inputs["attention_mask"].bool()
    for row in range(3):
        at = real[row]
        assert torch.allclose(ours[row][:, at][:, :, at], weights[row][:, at][:, :, at], atol=1e-5)


def test_dropping_is_decided_by_the_layers_attention() -> None:
    model, inputs = vlms.model("llava"), vlms.inputs("llava")
    layers = len(decoder(model).layers)
    with torch.no_grad(), ToDRE(keep=1.0, tau=1.01, depth=0.5).attach(model) as trace:
        model(**inputs)
    assert list(trace.shortening.kept) == [layers // 2 + 1]
    assert trace.kept() == {layers // 2 + 1: 0}
    count = int(visual_mask(model, inputs["input_ids"]).sum())
    with torch.no_grad(), ToDRE(keep=1.0, tau=1e-6, depth=0.5).attach(model) as trace:
        model(**inputs)
    assert trace.kept() == {layers // 2 + 1: count}


def test_bad_input() -> None:
    with pytest.raises(LimitError, match="N=25"):
        select_diverse(tokens(), 26)
    with pytest.raises(LimitError, match="k"):
        select_diverse(tokens(), 0)
    for name, value in {"tau": -1.0, "depth": 0.0, "objective": "sum", "pivot": "first"}.items():
        with pytest.raises(LimitError, match=name):
            ToDRE(**{name: value})  # pyright: ignore[reportArgumentType]
