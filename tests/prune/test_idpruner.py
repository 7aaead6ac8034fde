from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tokenmill.errors import LimitError
from tokenmill.prune import (
    IDPruner,
    VisionSelectorScorer,
    divprune_select,
    greedy_dpp,
    hopkins,
    importance_retention,
    mmr_select,
    soft_topk,
    train_scorer,
)
from tokenmill.prune.idpruner import drop_count

from . import methods, references, vlms


def drawn(seed: int, n: int = 30, d: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Generator]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g, dtype=torch.float64)
    return x, torch.rand(n, generator=g, dtype=torch.float64), g


@pytest.mark.prop("idpruner", 2)
@pytest.mark.prop("idpruner", 3)
def test_every_pick_is_the_brute_force_argmax() -> None:
    for number, (x, k, g) in enumerate(references.instances()):
        n = len(x)
        w = torch.rand(n, generator=g, dtype=torch.float64)
        if number % 3 == 0:
            w = torch.randint(0, 3, (n,), generator=g).double()
        lam = (0.0, 0.3, 0.5, 0.7, 1.0)[number % 5]
        sim = references.cosines(x)
        scaled = ((w - w.min()) / (w.max() - w.min() + 1e-6)).tolist()
        first = scaled.index(max(scaled))

        def value(i: int, chosen: list[int], lam: float = lam, sim: list = sim, imp: list = scaled) -> float:
            return lam * imp[i] - (1 - lam) * max(sim[j][i] for j in chosen)

        want = references.greedy(n, k, first, value)
        assert mmr_select(x, w, k, lam).tolist() == want


@pytest.mark.prop("idpruner", 1)
def test_ends_of_lambda_are_importance_and_diversity() -> None:
    for seed in range(30):
        x, w, _ = drawn(seed)
        assert set(mmr_select(x, w, 9, 1.0).tolist()) == set(w.topk(9).indices.tolist())
        far = mmr_select(x, w, 9, 0.0)
        assert far[0] == w.argmax()
        sim = references.cosines(x)
        want = references.greedy(30, 9, int(w.argmax()), lambda i, c, sim=sim: -max(sim[j][i] for j in c))
        assert far.tolist() == want


@pytest.mark.prop("idpruner", 3)
def test_prefix_property() -> None:
    x, w, _ = drawn(1)
    whole = mmr_select(x, w, 30)
    for k in (1, 5, 17):
        assert torch.equal(mmr_select(x, w, k), whole[:k])


@pytest.mark.prop("idpruner", 4)
def test_rounds_of_several_candidates() -> None:
    for seed in range(20):
        x, w, _ = drawn(seed)
        exact = mmr_select(x, w, 12)
        assert set(mmr_select(x, w, 12, parallel_k=12).tolist()) == set(w.topk(12).indices.tolist())
        for p in (2, 3, 5, 12, 40):
            order = mmr_select(x, w, 12, parallel_k=p)
            assert len(set(order.tolist())) == 12
        assert torch.equal(mmr_select(x, w, 12, parallel_k=1), exact)


@pytest.mark.prop("idpruner", 5)
def test_invariances() -> None:
    for seed in range(20):
        x, w, g = drawn(seed)
        order = mmr_select(x, w, 10)
        assert torch.equal(mmr_select(x, 7 * w - 3, 10), order)
        scale = torch.rand(30, 1, generator=g, dtype=torch.float64) + 0.1
        turn, _ = torch.linalg.qr(torch.randn(6, 6, generator=g, dtype=torch.float64))
        assert torch.equal(mmr_select(x * scale @ turn, w, 10), order)
        shuffle = torch.randperm(30, generator=g)
        assert torch.equal(shuffle[mmr_select(x[shuffle], w[shuffle], 10)], order)


@pytest.mark.prop("idpruner", 6)
def test_constant_importance_walks_from_the_first_token() -> None:
    x, _, _ = drawn(3)
    sim = references.cosines(x)
    want = references.greedy(30, 8, 0, lambda i, c: -max(sim[j][i] for j in c))
    assert mmr_select(x, torch.full((30,), 5.0), 8).tolist() == want


def test_flat_importance_warns() -> None:
    x, _, _ = drawn(3)
    with pytest.warns(UserWarning, match="flat"):
        mmr_select(x, torch.linspace(0, 1e-7, 30), 8)


@pytest.mark.prop("idpruner", 7)
def test_soft_topk_sums_to_k_and_has_the_implicit_gradient() -> None:
    g = torch.Generator().manual_seed(0)
    for k in (1, 3, 9):
        s = (torch.randn(4, 12, generator=g, dtype=torch.float64) * 3).requires_grad_()
        p = soft_topk(s, k)
        assert torch.allclose(p.sum(-1), torch.full((4,), float(k), dtype=torch.float64), atol=1e-9)
        assert torch.equal(p.argsort(-1), s.argsort(-1))
        assert torch.allclose(soft_topk(s + 5, k), p, atol=1e-9)
        weight = torch.randn(4, 12, generator=g, dtype=torch.float64)
        (gradient,) = torch.autograd.grad((p * weight).sum(), s)
        assert torch.allclose(gradient.sum(-1), torch.zeros(4, dtype=torch.float64), atol=1e-9)
        assert torch.autograd.gradcheck(lambda s, k=k: soft_topk(s, k), (s,), eps=1e-5, atol=1e-4)
    with pytest.raises(LimitError, match="N=12"):
        soft_topk(torch.zeros(1, 12), 12)


@pytest.mark.prop("idpruner", 8)
def test_scorer_is_the_mean_of_the_attention_matrix() -> None:
    scorer = methods.scorer(16)
    x = torch.randn(2, 20, 16, generator=torch.Generator().manual_seed(0))
    q, k = scorer.query(x), scorer.key(x)
    assert torch.allclose(scorer(x), (q @ k.transpose(1, 2) / 8**0.5).mean(-1), atol=1e-6)
    assert sum(p.numel() for p in scorer.parameters()) == 2 * (16 * 8 + 8)


def test_scorer_round_trip_and_widths(tmp_path: Path) -> None:
    scorer = methods.scorer()
    scorer.save(tmp_path / "scorer")
    again = VisionSelectorScorer.load(tmp_path / "scorer")
    x = torch.randn(1, 5, 32)
    assert torch.equal(scorer(x), again(x))
    model, inputs = vlms.model("llava"), vlms.inputs("llava")
    with pytest.raises(LimitError, match=r"16.*32"):
        IDPruner(methods.scorer(16)).prepare(model, inputs)
    with pytest.raises(LimitError, match="trained VisionSelectorScorer"):
        IDPruner().prepare(model, inputs)
    with pytest.raises(LimitError, match="folder"):
        VisionSelectorScorer.load(tmp_path / "nothing")


@pytest.mark.prop("idpruner", 9)
def test_hopkins_and_retention_tell_spread_from_clusters() -> None:
    g = torch.Generator().manual_seed(0)
    centres = torch.randn(8, 16, generator=g)
    at = torch.randint(0, 8, (400,), generator=g)
    x = centres[at] + 0.3 * torch.randn(400, 16, generator=g)
    uniform = [hopkins(x, torch.randperm(400, generator=g)[:60], generator=g) for _ in range(20)]
    assert 0.4 < sum(uniform) / 20 < 0.6
    weight = (at == 0).float() + 0.01 * torch.rand(400, generator=g)
    top, far = weight.topk(30).indices, divprune_select(x, 30)
    spread, clustered = hopkins(x, far, generator=g), hopkins(x, top, generator=g)
    assert 0 <= spread < clustered <= 1
    assert importance_retention(weight, torch.arange(400)) == pytest.approx(1.0)


@pytest.mark.prop("idpruner", 10)
def test_mmr_reaches_every_point_of_the_naive_hybrid() -> None:
    """On clusters with random weights some lambda is no worse on both axes, for nearly every hybrid."""
    beaten = total = 0
    for seed in range(50):
        g = torch.Generator().manual_seed(seed)
        centres = torch.randn(6, 8, generator=g)
        x = centres[torch.randint(0, 6, (80,), generator=g)] + 0.3 * torch.randn(80, 8, generator=g)
        w = torch.rand(80, generator=g)

        def point(subset: torch.Tensor, x: torch.Tensor = x, w: torch.Tensor = w) -> tuple[float, float]:
            h = [hopkins(x, subset, generator=torch.Generator().manual_seed(s)) for s in range(8)]
            return importance_retention(w, subset), sum(h) / 8

        frontier = [point(mmr_select(x, w, 20, lam)) for lam in torch.linspace(0, 1, 21).tolist()]
        for pool in (25, 40, 60):
            best = w.topk(pool).indices
            kept, spread = point(best[divprune_select(x[best], 20)])
            total += 1
            beaten += any(i >= kept - 0.02 and h <= spread + 0.03 for i, h in frontier)
    assert beaten / total > 0.9


def test_greedy_dpp_takes_the_largest_determinant_step_by_step() -> None:
    for seed in range(20):
        x, w, _ = drawn(seed, n=10)
        unit = torch.nn.functional.normalize(x, dim=1)
        kernel = (unit @ unit.T) * w[:, None] * w + 1e-6 * torch.eye(10)
        chosen: list[int] = []
        for _ in range(4):
            rest = [i for i in range(10) if i not in chosen]
            chosen.append(max(rest, key=lambda i: float(torch.det(kernel[[*chosen, i]][:, [*chosen, i]]))))
        assert greedy_dpp(x, w, 4).tolist() == chosen


@pytest.mark.prop("idpruner", 12)
def test_drop_ratios() -> None:
    table = {(0, 40): 40, (0.25, 100): 75, (0.99, 3): 1, (1.0, 10): 0}
    assert {pair: drop_count(pair[1], pair[0]) for pair in table} == table
    for bad in (5, -0.1, float("nan"), None, "0.5", True):
        with pytest.raises(LimitError, match="drop_ratio"):
            drop_count(10, bad)


def test_bad_input() -> None:
    x, w, _ = drawn(0)
    with pytest.raises(LimitError, match="lam"):
        mmr_select(x, w, 3, 1.5)
    with pytest.raises(LimitError, match="30"):
        mmr_select(x, w[:20], 3)
    w[4] = torch.inf
    with pytest.raises(LimitError, match="4"):
        mmr_select(x, w, 3)
    with pytest.raises(LimitError, match="parallel_k"):
        mmr_select(x, torch.ones(30), 3, parallel_k=0)


@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl"])
def test_training_lowers_the_loss_and_leaves_the_model_alone(kind: str) -> None:
    """The answer is the sign of one marked token among noise: the scorer has to find it."""
    model = vlms.model(kind)
    before = {name: p.clone() for name, p in model.named_parameters()}
    inputs = vlms.inputs(kind)
    labels = torch.full_like(inputs["input_ids"], -100)
    with torch.no_grad():
        labels[:, -1] = model(**inputs).logits[:, -2].argmax(-1)
    scorer, told = train_scorer(model, [{**inputs, "labels": labels}], budget=0.3, steps=40, rate=3e-2)
    assert told.steps == 40
    assert told.last_loss < told.first_loss
    assert not scorer.training
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    out = IDPruner(scorer, keep=0.3, importance_mode="soft_topk").generate(model, inputs, max_new_tokens=1)
    assert len(out) == 3
