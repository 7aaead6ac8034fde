from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenmill.errors import LimitError, UnsupportedError
from tokenmill.hf.layout import decoder
from tokenmill.prune import (
    LayerSchedule,
    SearchResult,
    VFlowOpt,
    VFlowParams,
    average_ratio,
    flow_objective,
    importance,
    optimize,
    patch_entropy,
    recycle_prune,
    solve_last_ratio,
)
from tokenmill.prune._flow_search import search_space

from . import vlms

A = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.6, 0.2, 0.1, 0.1], [0.1, 0.1, 0.4, 0.4], [0.6, 0.1, 0.1, 0.2]])[None]
PUBLISHED = {0.5: (0.7233, 0.7487, 0.487), 0.25: (0.2651, 0.9833, 0.8773), 0.1: (0.1166, 1.0, 0.6011)}


def attention(p: int = 12, seed: int = 0, batch: int = 1) -> torch.Tensor:
    return (3 * torch.randn(batch, 3, p, p, generator=torch.Generator().manual_seed(seed))).softmax(-1)


@pytest.mark.prop("vflowopt", 2)
def test_without_threshold_and_entropy_it_is_the_column_mean() -> None:
    attn = attention()
    found = importance(attn, None, 0.0, 0.0)
    assert torch.allclose(found, attn.mean(1).mean(1), atol=1e-7)
    entropy = torch.rand(1, 12) * 8
    for alpha in (-1.0, -0.3, 0.0, 0.5, 1.0):
        total = importance(attn, entropy, 1.0, alpha).sum()
        assert float(total) == pytest.approx(1 + alpha, abs=1e-6)


def test_hand_checked_importance() -> None:
    assert importance(A, None, 0.0, 0.0)[0].tolist() == pytest.approx([0.5, 0.125, 0.175, 0.2])
    assert importance(A, None, 1.5, 0.0)[0].tolist() == pytest.approx([0.7, 0.1, 0.1, 0.1])
    assert importance(A, None, 3.0, 0.0)[0].tolist() == pytest.approx([0.7, 0.1, 0.1, 0.1])


@pytest.mark.prop("vflowopt", 3)
def test_a_higher_threshold_leaves_fewer_voters() -> None:
    mean = attention().mean(1)[0]
    received = mean.mean(0)
    for t in (0.0, 0.5, 1.0, 1.5, 3.0, 12.0, 50.0):
        voters = [i for i in range(12) if float(received[i]) > t * float(received.mean())]
        voters = voters or [int(received.argmax())]
        want = torch.stack([mean[i] for i in voters]).mean(0)
        got = importance(attention(), None, t, 0.0)[0]
        assert torch.allclose(got, want, atol=1e-6)
        assert torch.isfinite(got).all()


@pytest.mark.prop("vflowopt", 4)
def test_entropy_of_patches() -> None:
    rows = torch.tensor([[0, 0, 0, 0], [0, 0, 255, 255], [0, 1, 2, 3], [7, 7, 7, 9]]).float()
    pixels = torch.cat([r.view(2, 2) for r in rows], 1)[None, None].expand(-1, 3, -1, -1)
    want = [0, 1, 2, 0.811278]
    found = patch_entropy(pixels, 2)[0]
    assert found.tolist() == pytest.approx(want, abs=1e-6)
    assert found.softmax(-1).tolist() == pytest.approx([0.074861, 0.203493, 0.553151, 0.168495], abs=1e-6)
    every = torch.arange(256).float().view(1, 1, 16, 16).expand(-1, 3, -1, -1)
    assert float(patch_entropy(every, 16)) == pytest.approx(8.0, abs=1e-6)
    assert float(patch_entropy(every.flip(-1).transpose(2, 3), 16)) == pytest.approx(8.0, abs=1e-6)
    half = (every / 4).round()
    assert torch.allclose(patch_entropy(half + 100, 16), patch_entropy(half, 16))
    with pytest.raises(LimitError, match="patches of 5"):
        patch_entropy(every, 5)


def test_hand_checked_recycling() -> None:
    score = torch.tensor([0.30, 0.02, 0.05, 0.10, 0.20, 0.03, 0.06, 0.24])
    left = recycle_prune(torch.arange(8.0)[:, None], score, (2, 4), 0.5, 2)
    assert left.keep.tolist() == [0, 3, 4, 7]
    assert left.features[:, 0].tolist() == pytest.approx([0, 3.619048, 3.88, 7], abs=1e-5)
    assert left.scores.tolist() == pytest.approx([0.30, 0.10, 0.20, 0.24])


@pytest.mark.prop("vflowopt", 5)
@pytest.mark.prop("vflowopt", 6)
@given(st.integers(1, 7), st.integers(1, 7), st.floats(0.1, 1.0), st.floats(1.0, 6.0), st.integers(0, 99))
def test_recycling_conserves_every_token(rows: int, columns: int, ratio: float, cell: float, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    n = rows * columns
    x = torch.randn(n, 3, generator=g, dtype=torch.float64)
    score = torch.rand(n, generator=g) - (0.5 if seed % 2 else 0.0)
    left = recycle_prune(x, score, (rows, columns), ratio, cell)
    assert (left.keep.diff() > 0).all()
    members = {int(c): (left.cells == c).nonzero()[:, 0] for c in left.cells.unique() if c >= 0}
    merged = 0
    for at, place in enumerate(left.keep.tolist()):
        name = int(left.cells[place])
        if name < 0:
            assert torch.equal(left.features[at], x[place])
            continue
        merged += 1
        mine = x[members[name]]
        assert place in members[name].tolist()
        assert score[place] == score[members[name]].max()
        assert (left.features[at] >= mine.amin(0) - 1e-4).all()
        assert (left.features[at] <= mine.amax(0) + 1e-4).all()
        if len(mine) == 1:
            assert torch.equal(left.features[at], mine[0])
    assert merged == len(members)
    assert int((left.cells < 0).sum()) + merged == len(left.keep)
    same = recycle_prune(torch.ones(n, 3), score, (rows, columns), ratio, cell)
    assert torch.allclose(same.features, torch.ones_like(same.features), atol=1e-5)


@pytest.mark.prop("vflowopt", 7)
def test_cells_of_one_token_lose_nothing_and_large_cells_are_one() -> None:
    x = torch.randn(24, 5)
    score = torch.rand(24, generator=torch.Generator().manual_seed(0))
    for ratio in (0.1, 0.5, 0.9):
        left = recycle_prune(x, score, (4, 6), ratio, 1)
        assert left.keep.tolist() == list(range(24))
        assert torch.equal(left.features, x)
        one = recycle_prune(x, score, (4, 6), ratio, 6)
        assert len(one.cells[one.cells >= 0].unique()) == 1


@pytest.mark.prop("vflowopt", 8)
def test_exact_budgets() -> None:
    x, score = torch.randn(48, 4), torch.rand(48, generator=torch.Generator().manual_seed(0))
    for ratio in (0.13, 0.25, 0.5, 0.77, 1.0):
        for cell in (1.7, 2.0, 3.4, 8.0):
            wanted = max(1, round(ratio * 48))
            cells = math.ceil(6 / cell) * math.ceil(8 / cell)
            if cells > wanted:
                continue  # one token a cell is more than the budget
            assert len(recycle_prune(x, score, (6, 8), ratio, cell, exact=True).keep) == wanted
    with pytest.raises(LimitError, match="one token a cell"):
        recycle_prune(x, score, (6, 8), 0.1, 1.7, exact=True)


@pytest.mark.prop("vflowopt", 9)
def test_budget_identity() -> None:
    for rho, (r0, r1, r2) in PUBLISHED.items():
        assert average_ratio(r0, (r1, r2), (9, 18), 28) == pytest.approx(rho, abs=1e-3)
    for rho, r0, r1 in ((0.25, 0.3, 0.8), (0.25, 0.375, 1.0), (0.5, 0.6, 0.7), (0.1, 0.12, 0.9)):
        r2 = solve_last_ratio(rho, r0, r1, (9, 18), 28)
        if r2 < 1:
            assert average_ratio(r0, (r1, r2), (9, 18), 28) == pytest.approx(rho, abs=1e-9)
    given_by_hand = {
        (0.25, 0.3, 0.8): 0.891667,
        (0.25, 0.375, 1): 0.066667,
        (0.25, 0.25, 1): 1,
        (0.1, 0.116615295, 1): 0.601057,
    }
    for (rho, r0, r1), want in given_by_hand.items():
        assert solve_last_ratio(rho, r0, r1, (9, 18), 28) == pytest.approx(want, abs=1e-6)
    with pytest.raises(LimitError, match=r"9.*28 layers"):
        solve_last_ratio(0.25, 1.0, 1.0, (9, 18), 28)


@pytest.mark.prop("vflowopt", 10)
def test_objective_is_at_most_one_and_the_identity_reaches_it() -> None:
    model = vlms.model("llava")
    prompts = [vlms.inputs("llava", rows=1, seed=s, images=(1,)) for s in range(3)]
    identity = VFlowOpt(keep=1.0, params=VFlowParams(r0=1.0, r1=1.0, r2=1.0))
    objective: Any = flow_objective(model, prompts)
    assert objective(identity) == pytest.approx(1.0, abs=1e-6)
    half = objective(VFlowOpt(keep=0.5))
    assert half < 1 - 1e-4
    turned = flow_objective(model, prompts[::-1])
    assert turned(VFlowOpt(keep=0.5)) == pytest.approx(half, abs=1e-6)
    assert objective.bad == 0
    with pytest.raises(LimitError, match="prompts"):
        flow_objective(model, [])


@pytest.mark.prop("vflowopt", 11)
def test_stages_rank_by_the_scores_from_before_the_decoder() -> None:
    model, inputs = vlms.model("llava"), vlms.inputs("llava")
    method = VFlowOpt(keep=0.5, recycle=False)
    kept = []
    pruned: Any = None
    for _ in range(2):
        with torch.no_grad():
            pruned = method.prepare(model, inputs)
            with method.attach(model, pruned) as trace:
                model(**pruned)
        kept.append(trace.shortening.kept)
        with torch.no_grad():
            for weight in decoder(model).parameters():
                weight.mul_(-0.7)
    assert all(torch.equal(kept[0][layer], kept[1][layer]) for layer in kept[0])
    for layer in kept[0]:
        for row in range(3):
            scores, mask = pruned.scores[row], kept[0][layer][row]
            rest = ~mask & ~scores.isnan()
            if rest.any():
                assert scores[mask].min() >= scores[rest].max()
    with pytest.raises(LimitError, match="prepare"), method.attach(model):
        pass


@pytest.mark.prop("vflowopt", 12)
def test_search_finds_the_top_of_a_parabola() -> None:
    space = search_space(0.25)
    target = {"r0": 0.3, "r1": 0.9, "t": 20.0, "m": 10.0, "alpha": -0.2}
    asked = []

    def objective(method: VFlowOpt) -> float:
        p = method.params
        values = {name: getattr(p, name) for name in space}
        asked.append(values)
        return 1 - sum(((values[n] - target[n]) / (hi - lo)) ** 2 for n, (lo, hi) in space.items())

    found = optimize(None, [], 0.25, n_calls=60, n_init=15, objective=objective)
    assert found.value > 0.95
    for values in asked:
        assert all(lo <= values[n] <= hi for n, (lo, hi) in space.items())
    first = [p for p, _ in optimize(None, [], 0.25, n_calls=8, objective=objective).trials]
    assert first == [p for p, _ in optimize(None, [], 0.25, n_calls=8, objective=objective).trials]


def test_search_on_a_model_and_its_file(tmp_path: Path) -> None:
    model = vlms.model("llava")
    prompts = [vlms.inputs("llava", rows=1, seed=s, images=(1,)) for s in range(2)]
    found = optimize(model, prompts, 0.5, n_calls=4, n_init=2, sampler="random")
    assert found.value == max(v for _, v in found.trials)
    best = flow_objective(model, prompts)(VFlowOpt(keep=0.5, params=found.params))
    assert best == pytest.approx(found.value, abs=1e-6)
    found.save(tmp_path / "search.json")
    assert SearchResult.load(tmp_path / "search.json") == found


@pytest.mark.prop("vflowopt", 13)
@pytest.mark.parametrize("kind", vlms.KINDS)
def test_a_batch_is_its_rows(kind: str) -> None:
    model = vlms.model(kind)
    inputs = vlms.inputs(kind, rows=1, images=(1,))
    both = {k: torch.cat([v, v]) for k, v in inputs.items()}
    method = VFlowOpt(keep=0.5, params=VFlowParams(m=2.0, t=1.0))
    with torch.no_grad():
        alone, pair = method.generate(model, inputs, max_new_tokens=3), method.generate(model, both, max_new_tokens=3)
    assert torch.equal(pair[1:], alone)


def test_budget_over_layers_is_met() -> None:
    model, inputs = vlms.model("llava"), vlms.inputs("llava", rows=1, images=(1,))
    method = VFlowOpt(keep=0.5, params=VFlowParams(r0=0.625, r1=0.8, m=4.0))
    with torch.no_grad():
        pruned = method.prepare(model, inputs)
        with method.attach(model, pruned) as trace:
            model(**pruned)
    text = inputs["input_ids"].shape[1] - 16
    held = [n - text for n in trace.shortening.lengths]
    assert held == [10, 8, 8, 6]
    assert abs(sum(held) / 4 / 16 - 0.5) < 0.05


def test_window_layers_of_qwen_are_refused() -> None:
    model, inputs = vlms.model("qwen2_5_vl"), vlms.inputs("qwen2_5_vl")
    with pytest.raises(UnsupportedError, match=r"tower_layer in \[1\]"):
        VFlowOpt(tower_layer=0).prepare(model, inputs)


def test_bad_input() -> None:
    with pytest.raises(LimitError, match="t = -1"):
        importance(A, None, -1.0, 0.0)
    with pytest.raises(LimitError, match="alpha"):
        importance(A, None, 0.0, 2.0)
    with pytest.raises(LimitError, match=r"\(1, 4\)"):
        importance(A, torch.ones(1, 5), 0.0, 0.5)
    with pytest.raises(LimitError, match="cell"):
        recycle_prune(torch.ones(4, 2), torch.ones(4), (2, 2), 0.5, 0.5)
    with pytest.raises(LimitError, match="grid"):
        recycle_prune(torch.ones(4, 2), torch.ones(4), (2, 3), 0.5, 2)
    with pytest.raises(LimitError, match="ascending"):
        LayerSchedule((9, 9), (1.0, 1.0))
    with pytest.raises(LimitError, match="share"):
        VFlowOpt(keep=20)
