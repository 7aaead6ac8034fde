from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tokenmill.errors import LimitError, UnsupportedError
from tokenmill.prune import ZOOPrune, divprune_select, zoo_select, zoo_sensitivity
from tokenmill.prune.zoo_prune import share_evenly

from . import references, vlms


def projector(d: int = 8, width: int = 24, out: int = 16, seed: int = 0, act: Any = None) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1000 + seed)
        made = nn.Sequential(nn.Linear(d, width), act if act is not None else nn.GELU(), nn.Linear(width, out))
    return made.double().eval()


def tokens(n: int = 30, d: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.prop("zoo-prune", 1)
def test_a_linear_projector_answers_alike_everywhere_and_leaves_diversity() -> None:
    linear = projector(act=nn.Identity())
    x = tokens()
    found = zoo_sensitivity(x, linear, m=16)
    assert torch.allclose(found, found[0].expand_as(found), rtol=1e-9)
    z = linear(x).detach()
    flat = torch.ones(30, dtype=torch.float64)
    sim = references.cosines(z)
    want = references.greedy(30, 9, 0, lambda i, c: 1 - max(sim[j][i] for j in c))
    assert zoo_select(z, flat, 9).tolist() == want


@pytest.mark.prop("zoo-prune", 2)
def test_differences_approach_the_derivative_with_the_square_of_the_step() -> None:
    x, p = tokens(), projector()
    exact = zoo_sensitivity(x, p, m=8, estimator="jvp")
    near = zoo_sensitivity(x.float(), p.float(), m=8, h=1e-2)
    assert float(((near - exact) / exact).abs().max()) < 1e-3
    p = p.double()
    close = zoo_sensitivity(x, p, m=8, h=1e-2)
    assert float(((close - exact) / exact).abs().max()) < 1e-4
    errors = [float((zoo_sensitivity(x, p, m=8, h=h) - exact).abs().mean()) for h in (0.5, 0.25, 0.125)]
    assert 3 < errors[0] / errors[1] < 5
    assert 3 < errors[1] / errors[2] < 5


@pytest.mark.prop("zoo-prune", 3)
def test_the_closed_form_is_the_jacobians_norm() -> None:
    x, p = tokens(12), projector()
    closed = zoo_sensitivity(x, p, estimator="frobenius")
    norms = [torch.func.jacrev(p)(row).pow(2).sum().div(8).sqrt() for row in x]
    assert torch.allclose(closed, torch.stack(norms), rtol=1e-5)
    sampled = zoo_sensitivity(x, p, m=4000, estimator="jvp", chunk=500)
    assert (sampled <= closed * 1.01).all()
    assert (sampled > 0.8 * closed).all()
    # The mean square of the answers is the squared norm over d.
    u = torch.randn(20_000, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    u = u / u.norm(dim=1, keepdim=True)
    jacobian = torch.func.jacrev(p)(x[0])
    assert float((u @ jacobian.T).pow(2).sum(1).mean()) == pytest.approx(float(jacobian.pow(2).sum() / 8), rel=0.01)


@pytest.mark.prop("zoo-prune", 4)
def test_symmetries_of_the_sensitivity() -> None:
    x, p = tokens(), projector()
    found = zoo_sensitivity(x, p, m=8)
    turned = projector()
    turn, _ = torch.linalg.qr(tokens(16, 16))
    with torch.no_grad():
        turned[2].weight.copy_(turn @ turned[2].weight)
        turned[2].bias.add_(3)
    assert torch.allclose(zoo_sensitivity(x, turned, m=8), found, rtol=1e-9)
    with torch.no_grad():
        turned[2].weight.mul_(5)
    scaled = zoo_sensitivity(x, turned, m=8)
    assert torch.allclose(scaled, 5 * found, rtol=1e-9)
    z = p(x).detach()
    assert torch.equal(zoo_select(z, scaled, 9), zoo_select(z, found, 9))

    class Mirrored(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return p(2 * x0 - x) if x.shape == x0.shape else p(2 * x0.repeat(len(x) // len(x0), 1) - x)

    x0 = x
    assert torch.allclose(zoo_sensitivity(x, Mirrored().eval(), m=8), found, rtol=1e-9)


@pytest.mark.prop("zoo-prune", 5)
@pytest.mark.parametrize("estimator", ["fd", "jvp"])
def test_seeds_and_chunks(estimator: Any) -> None:
    x, p = tokens(), projector()

    def draw(seed: int, chunk: int) -> torch.Tensor:
        g = torch.Generator().manual_seed(seed)
        return zoo_sensitivity(x, p, m=12, estimator=estimator, generator=g, chunk=chunk)

    assert torch.equal(draw(1, 4), draw(1, 4))
    assert torch.allclose(draw(1, 4), draw(1, 12), rtol=1e-9)
    assert torch.allclose(draw(1, 4), draw(1, 5), rtol=1e-9)
    assert not torch.allclose(draw(1, 4), draw(2, 4))
    state = torch.random.get_rng_state()
    draw(3, 4)
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.prop("zoo-prune", 6)
@pytest.mark.parametrize("combine", ["mul", "sum", "sens", "div"])
def test_every_pick_is_the_brute_force_argmax(combine: Any) -> None:
    for number, (x, k, g) in enumerate(references.instances()):
        n = len(x)
        s = torch.rand(n, generator=g, dtype=torch.float64)
        if number % 3 == 0:
            s = torch.randint(0, 3, (n,), generator=g).double()
        sim = references.cosines(x)
        spread = float(s.max() - s.min())
        scaled = ((s - s.min()) / (s.max() - s.min() + 1e-8)).tolist() if spread > 0 else [1.0] * n
        first = scaled.index(max(scaled))
        nearest = [max((sim[i][j] for j in range(n) if j != i), default=-1e9) for i in range(n)]
        if combine == "sens":
            want = sorted(range(n), key=lambda i: (-float(s[i]), i))[:k]
        elif combine == "div":
            first = nearest.index(min(nearest))
            want = references.greedy(n, k, first, lambda i, c, sim=sim: -max(sim[j][i] for j in c))
        elif combine == "mul":
            want = references.greedy(
                n, k, first, lambda i, c, sim=sim, w=scaled: w[i] * (1 - max(sim[j][i] for j in c))
            )
        else:
            want = references.greedy(
                n, k, first, lambda i, c, sim=sim, w=scaled: w[i] + (1 - max(sim[j][i] for j in c))
            )
        assert zoo_select(x, s, k, combine=combine).tolist() == want


@pytest.mark.prop("zoo-prune", 6)
def test_start_prefix_and_the_least_sensitive_token() -> None:
    x, s = tokens(), torch.rand(30, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    whole = zoo_select(x, s, 30)
    assert whole[0] == s.argmax()
    assert whole[-1] == s.argmin()
    assert torch.equal(zoo_select(x, s, 7), whole[:7])


@pytest.mark.prop("zoo-prune", 7)
def test_diversity_alone_is_divprune_and_sensitivity_alone_the_top() -> None:
    for seed in range(20):
        x = tokens(seed=seed)
        s = torch.rand(30, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        assert torch.equal(zoo_select(x, s, 9, combine="div"), divprune_select(x, 9))
        assert torch.equal(zoo_select(x, s, 9, combine="sens"), s.topk(9).indices)


@pytest.mark.prop("zoo-prune", 8)
def test_copies_of_a_chosen_token_come_last() -> None:
    x, s = tokens(), torch.rand(30, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x[20] = x[int(s.argmax())]
    order = zoo_select(x, s, 30).tolist()
    assert order.index(20) >= 28  # only the token of weight zero may tie with it


@pytest.mark.prop("zoo-prune", 9)
def test_permutation_and_tiles() -> None:
    for seed in range(10):
        x = tokens(seed=seed)
        g = torch.Generator().manual_seed(seed)
        s = torch.rand(30, generator=g, dtype=torch.float64)
        shuffle = torch.randperm(30, generator=g)
        assert torch.equal(shuffle[zoo_select(x[shuffle], s[shuffle], 9)], zoo_select(x, s, 9))
        group = torch.arange(30) // 10
        parts = torch.cat([10 * t + zoo_select(x[10 * t :][:10], s[10 * t :][:10], 3) for t in range(3)])
        assert torch.equal(zoo_select(x, s, 9, group=group), parts)
    assert share_evenly(10, [2, 20, 20]) == [2, 4, 4]
    assert share_evenly(7, [9, 9, 9]) == [3, 2, 2]
    assert share_evenly(6, [1, 1, 9]) == [1, 1, 4]
    with pytest.raises(LimitError, match="per_tile"):
        share_evenly(2, [3, 3, 3])


@pytest.mark.prop("zoo-prune", 9)
def test_newlines_stay_on_top_of_the_budget() -> None:
    model, inputs = vlms.model("llava_next"), vlms.inputs("llava_next", rows=1)
    with torch.no_grad():
        pruned = ZOOPrune(keep=20).prepare(model, inputs)
    kept = pruned.report[0].keep
    newlines = {16 + 9 * r + 8 for r in range(6)}
    assert newlines <= set(kept.tolist())
    assert len(kept) == 26
    features = pruned["mm_encoder_outputs"]["image"].pooler_output[0]
    at = [number for number, token in enumerate(kept.tolist()) if token in newlines]
    assert (features[at] == model.model.image_newline).all()
    # Every tile has its share: 64 tokens in 5 tiles, 20 kept.
    with torch.no_grad():
        from tokenmill.hf.vision import encode

        group = encode("test", model, inputs).visuals[0].group[kept]
    assert torch.bincount(group[group >= 0]).tolist() == [4, 4, 4, 4, 4]


def test_half_precision_projectors_run_wide() -> None:
    x = tokens()
    half = projector().bfloat16()
    got = zoo_sensitivity(x.bfloat16(), half, m=32)
    want = zoo_sensitivity(x.bfloat16().float(), projector().bfloat16().float(), m=32)
    assert got.dtype == torch.float32
    assert torch.equal(got, want)
    assert next(half.parameters()).dtype == torch.bfloat16


def test_directions_of_each_token_are_noisier_but_near() -> None:
    x, p = tokens(200), projector()
    exact = zoo_sensitivity(x, p, estimator="frobenius")

    def agreement(directions: Any) -> float:
        found = zoo_sensitivity(x, p, m=64, directions=directions)
        return float(torch.corrcoef(torch.stack([exact.argsort().argsort(), found.argsort().argsort()]).double())[0, 1])

    assert agreement("shared") > 0.9
    assert agreement("independent") > 0.8


def test_bad_input() -> None:
    x, p = tokens(), projector()
    for name, value in {"m": 0, "h": 0.0, "chunk": 0}.items():
        with pytest.raises(LimitError, match=name):
            zoo_sensitivity(x, p, **{name: value})  # pyright: ignore[reportArgumentType]
    with pytest.raises(LimitError, match="train mode"):
        zoo_sensitivity(x, projector().train())
    with pytest.raises(UnsupportedError, match="jvp"):
        zoo_sensitivity(x, nn.Linear(8, 4).double().eval(), estimator="frobenius")
    x[5] = torch.nan
    with pytest.raises(LimitError, match="at 5"):
        zoo_sensitivity(x, p)
    with pytest.raises(LimitError, match="N=30"):
        zoo_select(tokens(), torch.ones(30), 31)


@pytest.mark.prop("zoo-prune", 2)
@pytest.mark.parametrize("directions", ["shared", "independent"])
def test_the_derivative_of_two_linear_layers_is_the_general_one(directions: Any) -> None:
    x, p = tokens(), projector()
    ours = zoo_sensitivity(x, p, m=8, estimator="jvp", directions=directions)
    general = zoo_sensitivity(x, lambda t: p(t), m=8, estimator="jvp", directions=directions)
    assert torch.allclose(ours, general, rtol=1e-10)
