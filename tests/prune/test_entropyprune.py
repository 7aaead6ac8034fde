from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tokenmill.errors import LimitError
from tokenmill.hf.layout import decoder
from tokenmill.hf.vision import visual_mask
from tokenmill.prune import EntropyPrune, entropy_profile, find_ecl, layer_matrix_entropy, token_matrix_entropy
from tokenmill.prune._attention import rotate
from tokenmill.prune._baselines import top_share
from tokenmill.prune.entropyprune import average_keep

from . import references, vlms


def queries(n: int = 20, heads: int = 6, d: int = 10, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, heads, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.prop("entropyprune", 1)
@pytest.mark.parametrize(("heads", "d"), [(6, 10), (10, 6), (4, 4)])
@pytest.mark.parametrize("score", ["raw", "trace"])
def test_the_gram_over_heads_has_the_spectrum_of_the_covariance(heads: int, d: int, score: Any) -> None:
    q = queries(heads=heads, d=d)
    r = q - q.mean(1, keepdim=True)
    small, large = (torch.linalg.eigvalsh(m / heads) for m in (r @ r.transpose(1, 2), r.transpose(1, 2) @ r))
    k = min(heads, d)
    assert torch.allclose(small[:, -k:], large[:, -k:], atol=1e-12)
    dual, direct = (token_matrix_entropy(q, score=score, dual=x) for x in (True, False))
    assert torch.allclose(dual, direct, atol=abs(heads - d) * 2.4e-9 / math.log(heads) + 1e-9)
    assert torch.equal(dual.argsort(), direct.argsort())


@pytest.mark.prop("entropyprune", 2)
def test_centring_takes_one_rank() -> None:
    q = queries()
    r = q - q.mean(1, keepdim=True)
    assert float(torch.linalg.eigvalsh(r @ r.transpose(1, 2))[:, 0].abs().max()) < 1e-12


@pytest.mark.prop("entropyprune", 3)
def test_rotation_by_position_changes_nothing() -> None:
    q = queries(heads=4, d=8)
    want = token_matrix_entropy(q)
    frequencies = 0.5 ** torch.arange(4)
    angles = torch.arange(20)[:, None] * frequencies
    angles = torch.cat([angles, angles], 1)[None]
    turned = rotate(q.transpose(0, 1)[None].float(), angles.cos(), angles.sin())[0].transpose(0, 1)
    assert not torch.allclose(turned, q.float())
    assert torch.allclose(token_matrix_entropy(turned), want, atol=1e-5)
    g = torch.Generator().manual_seed(1)
    turn, _ = torch.linalg.qr(torch.randn(8, 8, generator=g, dtype=torch.float64))
    assert torch.allclose(token_matrix_entropy(q @ turn), want, atol=1e-10)
    assert torch.allclose(token_matrix_entropy(q[:, torch.randperm(4, generator=g)]), want, atol=1e-10)
    assert torch.allclose(token_matrix_entropy(q + torch.randn(8, generator=g, dtype=torch.float64)), want, atol=1e-10)


@pytest.mark.prop("entropyprune", 4)
def test_normalised_entropy() -> None:
    q = queries()
    found = token_matrix_entropy(q, score="trace")
    assert torch.allclose(token_matrix_entropy(7 * q, score="trace"), found, atol=1e-7)
    assert ((found >= 0) & (found <= 1)).all()
    line = torch.arange(6, dtype=torch.float64)[:, None] * torch.ones(10, dtype=torch.float64)
    assert float(token_matrix_entropy(line[None], score="trace")) == pytest.approx(0, abs=1e-7)
    simplex = torch.eye(6, 10, dtype=torch.float64)[None]
    want = math.log(5) / math.log(6)
    assert float(token_matrix_entropy(simplex, score="trace")) == pytest.approx(want, abs=1e-7)


@pytest.mark.prop("entropyprune", 5)
def test_the_published_score_falls_with_size() -> None:
    q = queries()
    r = q - q.mean(1, keepdim=True)
    values = torch.linalg.eigvalsh(r @ r.transpose(1, 2) / 6).clamp_min(1e-10)
    tau = values.sum(1)
    p = values / tau[:, None]
    spread = -(p * p.log()).sum(1)
    want = (tau * spread - tau * tau.log()) / math.log(6)
    assert torch.allclose(token_matrix_entropy(q), want, atol=1e-8)
    assert (token_matrix_entropy(20 * q) < token_matrix_entropy(10 * q)).all()
    assert torch.allclose(token_matrix_entropy(q, score="neg_trace"), -(r * r).sum((1, 2)) / 6)


@pytest.mark.prop("entropyprune", 6)
def test_equal_heads_are_finite() -> None:
    q = torch.ones(1, 6, 10)
    want = 6 * 1e-10 * math.log(1e10) / math.log(6)
    assert float(token_matrix_entropy(q)) == pytest.approx(want, rel=1e-6)


@pytest.mark.prop("entropyprune", 7)
def test_selection_equals_a_sort_with_first_index_ties() -> None:
    for seed in range(references.INSTANCES):
        g = torch.Generator().manual_seed(seed)
        n = int(torch.randint(1, 20, (), generator=g))
        q = torch.randn(n, 4, 6, generator=g, dtype=torch.float64)
        if seed % 2:
            q = q[torch.randint(0, max(1, n // 2), (n,), generator=g)]
        k = int(torch.randint(1, n + 1, (), generator=g))
        scores = token_matrix_entropy(q).tolist()
        want = sorted(sorted(range(n), key=lambda i, s=scores: (-s[i], i))[:k])
        assert EntropyPrune(keep=k).select(q[None])[0].tolist() == want


def test_shares_are_taken_row_by_row() -> None:
    scores = torch.tensor([[1.0, 5, 2, 5, 3], [9, 1, 2, 3, 4]])
    visual = torch.tensor([[0, 1, 1, 1, 1], [0, 0, 1, 1, 1]], dtype=torch.bool)
    assert top_share(scores, visual, 0.5).tolist() == [
        [False, True, False, True, False],
        [False, False, False, True, True],
    ]
    assert top_share(scores, visual, 2).sum(1).tolist() == [2, 2]
    assert top_share(scores, torch.zeros_like(visual), 0.5).sum() == 0


@pytest.mark.prop("entropyprune", 9)
@pytest.mark.parametrize("kind", vlms.KINDS)
def test_scores_are_those_of_a_separate_forward(kind: str) -> None:
    model, inputs = vlms.model(kind), vlms.inputs(kind)
    layer = decoder(model).layers[1]
    found = []
    handle = layer.self_attn.q_proj.register_forward_hook(lambda _m, _a, out: found.append(out))
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    scores = token_matrix_entropy(found[0].unflatten(-1, (4, -1)))
    want = top_share(scores, visual_mask(model, inputs["input_ids"]), 0.4)
    with torch.no_grad(), EntropyPrune(keep=0.4, layer=2).attach(model) as trace:
        model(**inputs)
    assert torch.equal(trace.shortening.kept[2], want)


@pytest.mark.prop("entropyprune", 10)
def test_entropy_of_a_layer() -> None:
    assert layer_matrix_entropy(torch.ones(9, 6)) == 0
    eye = torch.eye(6, 16)
    assert layer_matrix_entropy(eye, center=False) == pytest.approx(math.log(6) / math.log(16), abs=1e-9)
    for n in (5, 40):
        x = torch.randn(n, 12, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
        rows = x - x.mean(0)
        rows = rows / rows.norm(dim=1, keepdim=True)
        for gram in (rows @ rows.T, rows.T @ rows):
            values = torch.linalg.eigvalsh(gram / n).clamp_min(0)
            entropy = -torch.special.xlogy(values, values).sum() / math.log(12)
            assert layer_matrix_entropy(x) == pytest.approx(float(entropy), abs=1e-8)


@pytest.mark.prop("entropyprune", 11)
def test_collapse_layer() -> None:
    flat = torch.full((17,), 0.5)
    planted = flat.clone()
    planted[3:] -= 0.2
    assert find_ecl(planted).layer == 3
    assert find_ecl(flat).layer is None
    rising = torch.linspace(0.2, 0.4, 17)
    assert find_ecl(rising).layer is None
    other = flat.clone()
    other[2:] -= 0.15
    found = find_ecl([planted, planted, planted, other])
    assert (found.layer, found.agreement) == (3, 0.75)
    late = flat.clone()
    late[12:] -= 0.4
    assert find_ecl(late).layer is None
    assert find_ecl(late, max_layer=16).layer == 12
    with pytest.raises(LimitError, match="max_layer"):
        find_ecl(flat, max_layer=40)


def test_profile_of_a_model() -> None:
    model, inputs = vlms.model("llava"), vlms.inputs("llava")
    profile = entropy_profile(model, inputs)
    found = []
    handle = decoder(model).layers[2].register_forward_pre_hook(lambda _m, args: found.append(args[0]))
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    assert profile.shape == (5,)
    visual = found[0][visual_mask(model, inputs["input_ids"])]
    assert float(profile[2]) == pytest.approx(layer_matrix_entropy(visual), abs=1e-9)


@pytest.mark.prop("entropyprune", 12)
def test_budgets_as_published() -> None:
    table = {192: 166, 128: 98, 64: 29}
    assert {a: average_keep(a, 576, 2, 32) for a in table} == table
    with pytest.raises(LimitError, match=r"above 36.*K=2, N=576, T=32"):
        average_keep(32, 576, 2, 32)


def test_average_budget_in_a_model() -> None:
    model, inputs = vlms.model("llava"), vlms.inputs("llava", rows=1)
    with torch.no_grad(), EntropyPrune(keep=12, layer=1, budget="average").attach(model) as trace:
        model(**inputs)
    # (1 x 16 + 3 x k) / 4 = 12 at most
    assert trace.kept() == {1: 10}


def test_bad_input() -> None:
    with pytest.raises(LimitError, match="divprune"):
        EntropyPrune(layer=0)
    with pytest.raises(LimitError, match="at least 2 heads"):
        token_matrix_entropy(queries(heads=1))
    q = queries()
    q[4, 2, 2] = torch.nan
    with pytest.raises(LimitError, match="at 4"):
        token_matrix_entropy(q)
    with pytest.raises(LimitError, match="score"):
        EntropyPrune(score="entropy")  # pyright: ignore[reportArgumentType]
