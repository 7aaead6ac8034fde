from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from itertools import combinations, pairwise, product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from torch import Tensor

from tests.decode.chance import Enumerated, Law, draft_sets, remember_plans
from tokenmill.decode._transport import (
    kseq_plan,
    kseq_select,
    optimal_acceptance,
    solve_rho,
    spectr_verify,
    verify_drafts,
)
from tokenmill.decode.spectr import draft_trie
from tokenmill.errors import LimitError

Pair = tuple[Tensor, Tensor]


def dirichlet(v: int, seed: int, concentration: float = 0.5, rows: int = 1) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).dirichlet([concentration] * v, size=rows))


@st.composite
def pairs(draw: st.DrawFn, widest: int = 50) -> Pair:
    v, seed = draw(st.integers(2, widest)), draw(st.integers(0, 10_000))
    concentration = draw(st.sampled_from([0.1, 0.5, 2.0]))
    return dirichlet(v, seed, concentration)[0], dirichlet(v, seed + 20_000, concentration)[0]


drafts = st.integers(1, 8)


@pytest.mark.prop("spectr", 1)
@given(pairs(), drafts)
def test_the_emitted_token_follows_the_target(pair: Pair, k: int) -> None:
    p, q = pair
    rho, beta, p_acc, residual = kseq_plan(p, q, k)
    accepted = torch.minimum(p, q / rho) * (p_acc / beta if beta > 0 else 1.0)
    assert float((accepted + (1 - p_acc) * residual - q).abs().max()) < 1e-12
    assert float(residual.sum()) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.prop("spectr", 2)
@given(pairs(), st.integers(2, 8), st.floats(0, 1))
def test_any_larger_factor_keeps_the_law_too(pair: Pair, k: int, share: float) -> None:
    p, q = pair
    smallest = solve_rho(p, q, k)
    for rho in (smallest, smallest + share * (k - smallest), torch.tensor(float(k))):
        factor, beta, p_acc, residual = kseq_plan(p, q, k, rho)
        assert float(residual.min()) * float(1 - p_acc) >= -1e-12
        accepted = torch.minimum(p, q / factor) * (p_acc / beta if beta > 0 else 1.0)
        assert float((accepted + (1 - p_acc) * residual - q).abs().max()) < 1e-9


@pytest.mark.prop("spectr", 2)
@pytest.mark.parametrize("k", [2, 3, 5, 8])
def test_a_smaller_factor_bends_the_law(k: int) -> None:
    """Just below the smallest valid factor the residual is negative somewhere: no law is left to draw from."""
    for seed in range(40):
        p, q = dirichlet(12, seed)[0], dirichlet(12, seed + 500)[0]
        rho = solve_rho(p, q, k)
        _, _, p_acc, residual = kseq_plan(p, q, k, (0.95 * rho).clamp(min=1.0))
        assert float(rho) > 1.0
        assert float((residual * (1 - p_acc)).min()) < 0


@pytest.mark.prop("spectr", 3)
@given(pairs())
def test_one_draft_is_the_maximal_coupling(pair: Pair) -> None:
    p, q = pair
    rho, _, p_acc, residual = kseq_plan(p, q, 1)
    above = (q - p).clamp(min=0)
    assert float(rho) == 1.0
    assert float(p_acc) == pytest.approx(1 - 0.5 * float((p - q).abs().sum()), abs=1e-14)
    assert torch.allclose(residual, above / above.sum(), atol=1e-12, rtol=0)
    assert float(optimal_acceptance(p, q, 1)) == pytest.approx(float(p_acc), abs=1e-14)


@pytest.mark.prop("spectr", 4)
@pytest.mark.parametrize("k", [1, 2, 8])
def test_equal_laws_accept_the_first_draft(k: int) -> None:
    for seed in range(20):
        p = dirichlet(9, seed)[0]
        rho, _, p_acc, residual = kseq_plan(p, p, k)
        assert float(rho) == 1.0
        assert float(p_acc) == pytest.approx(1.0, abs=1e-7)
        assert bool(torch.isfinite(residual).all())
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.multinomial(p, k, replacement=True, generator=generator)
        assert kseq_select(tokens, p, p, generator) == (int(tokens[0]), 0)


@pytest.mark.prop("spectr", 4)
@pytest.mark.parametrize("k", [1, 2, 8])
def test_laws_without_a_common_token_accept_nothing(k: int) -> None:
    p, q = torch.tensor([0.4, 0.6, 0.0, 0.0]), torch.tensor([0.0, 0.0, 0.3, 0.7])
    _, beta, p_acc, residual = kseq_plan(p, q, k)
    assert float(beta) == float(p_acc) == 0.0
    assert torch.allclose(residual, q.double())
    assert float(optimal_acceptance(p, q, k)) == 0.0
    token, index = kseq_select(torch.zeros(k, dtype=torch.long), p, q, torch.Generator().manual_seed(0))
    assert token in (2, 3)
    assert index == -1


@pytest.mark.prop("spectr", 5)
@pytest.mark.parametrize("k", range(1, 9))
def test_acceptance_lies_between_the_papers_bounds(k: int) -> None:
    for v, concentration in ((3, 1.0), (10, 0.3), (60, 0.5), (400, 0.2)):
        p = dirichlet(v, v + k, concentration, rows=50)
        q = dirichlet(v, v + k + 1000, concentration, rows=50)
        accepted, best = kseq_plan(p, q, k)[2], optimal_acceptance(p, q, k)
        above = torch.minimum(q, 1 - (1 - p) ** k).sum(1)
        share = 1 - (1 - 1 / k) ** k
        assert bool((accepted <= best + 1e-12).all())
        assert bool((best <= above + 1e-12).all())
        assert bool((accepted >= share * best - 1e-12).all())


def smallest_cut(p: Tensor, q: Tensor, k: int) -> float:
    sets = (list(h) for n in range(len(p) + 1) for h in combinations(range(len(p)), n))
    return min(float(q[h].sum() + 1 - p[h].sum() ** k) for h in sets)


def best_coupling(p: Tensor, q: Tensor, k: int) -> float:
    """The linear programme over all couplings of k drafts with the output."""
    v = len(p)
    tuples = list(product(range(v), repeat=k))
    gain = -np.array([[float(y in x) for y in range(v)] for x in tuples]).ravel()
    rows = [np.kron(np.eye(len(tuples))[i], np.ones(v)) for i in range(len(tuples))]
    columns = [np.tile(np.eye(v)[y], len(tuples)) for y in range(v)]
    masses = [float(torch.stack([p[t] for t in x]).prod()) for x in tuples]
    found = linprog(gain, A_eq=np.array(rows + columns), b_eq=np.array([*masses, *q.tolist()]), bounds=(0, None))
    assert found.success
    return -float(found.fun)


@pytest.mark.prop("spectr", 6)
@given(pairs(widest=8), drafts)
def test_the_optimum_is_the_smallest_cut(pair: Pair, k: int) -> None:
    assert float(optimal_acceptance(*pair, k)) == pytest.approx(smallest_cut(*pair, k), abs=1e-12)


@pytest.mark.prop("spectr", 6)
@pytest.mark.parametrize(("v", "k"), [(2, 1), (3, 2), (4, 2), (3, 3), (4, 3)])
def test_the_optimum_solves_the_linear_programme(v: int, k: int) -> None:
    for seed in range(5):
        p, q = dirichlet(v, seed)[0], dirichlet(v, seed + 50)[0]
        assert float(optimal_acceptance(p, q, k)) == pytest.approx(best_coupling(p, q, k), abs=1e-7)


@pytest.mark.prop("spectr", 7)
@settings(max_examples=20)
@given(pairs())
def test_more_drafts_accept_more_and_need_a_larger_factor(pair: Pair) -> None:
    plans = [kseq_plan(*pair, k) for k in range(1, 9)]
    for fewer, more in pairwise(plans):
        assert float(more[2]) >= float(fewer[2]) - 1e-12
        assert float(more[0]) >= float(fewer[0]) - 1e-12


@pytest.mark.prop("spectr", 8)
@pytest.mark.parametrize(
    ("k", "rho", "accepted", "best"),
    [(1, 1.0, 0.6, 0.6), (2, 1.540312, 0.708062, 0.76), (4, 2.250387, 0.850077, 0.9904)],
)
def test_the_worked_example(k: int, rho: float, accepted: float, best: float) -> None:
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    q = torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64)
    found = kseq_plan(p, q, k)
    assert float(found[0]) == pytest.approx(rho, abs=5e-7)
    assert float(found[2]) == pytest.approx(accepted, abs=5e-7)
    assert float(optimal_acceptance(p, q, k)) == pytest.approx(best, abs=1e-12)
    assert found[3].tolist() == pytest.approx([0.0, 0.0, 1.0], abs=1e-12)


def test_rows_of_laws_are_planned_as_each_alone() -> None:
    p, q = dirichlet(7, 1, rows=6).view(2, 3, 7), dirichlet(7, 2, rows=6).view(2, 3, 7)
    whole = (*kseq_plan(p, q, 4), optimal_acceptance(p, q, 4))
    for i, j in product(range(2), range(3)):
        alone = (*kseq_plan(p[i, j], q[i, j], 4), optimal_acceptance(p[i, j], q[i, j], 4))
        for together, single in zip(whole, alone, strict=True):
            assert torch.allclose(together[i, j], single, atol=1e-14, rtol=0)


Verify = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], list[int]]


def by_rows(ids: Tensor, p1: Tensor, p2: Tensor, q1: Tensor, q: Tensor) -> list[int]:
    """`spectr_verify` on (K, L, V) laws of Markov chains."""
    draft_probs = torch.stack([p1.expand(ids.shape[0], -1), *(p2[ids[:, i]] for i in range(ids.shape[1] - 1))], dim=1)
    target_probs = torch.stack([q1.expand(ids.shape[0], -1), *(q[ids[:, i]] for i in range(ids.shape[1]))], dim=1)
    return spectr_verify(ids, draft_probs, target_probs)[0].tolist()


def by_trie(ids: Tensor, p1: Tensor, p2: Tensor, q1: Tensor, q: Tensor) -> list[int]:
    """The same with one target law for each node of the merged drafts."""
    tokens, tree, node_of = draft_trie(torch.tensor([0]), ids)
    target = torch.stack([q1, *(q[token] for token in tokens[1:])])
    assert len(tree) == 1 + len({tuple(r[: d + 1]) for r in ids.tolist() for d in range(ids.shape[1])})
    return verify_drafts(ids, lambda j, i: p2[ids[j, i - 1]] if i else p1, lambda j, i: target[node_of[j, i]])[
        0
    ].tolist()


@pytest.mark.prop("spectr", 9)
@pytest.mark.parametrize("verify", [by_rows, by_trie])
def test_the_joint_law_of_a_block_is_the_targets(verify: Verify, monkeypatch: pytest.MonkeyPatch) -> None:
    """Full enumeration: every set of three drafts of two tokens, every coin, every drawn token."""
    remember_plans(monkeypatch)
    v, k, length = 3, 3, 2
    p1, q1 = dirichlet(v, 1, 1.0)[0], dirichlet(v, 2, 1.0)[0]
    p2, q = dirichlet(v, 3, 1.0, rows=v), dirichlet(v, 4, 1.0, rows=v)
    joint: Law = defaultdict(float)
    longer = 0.0
    for ids, share in draft_sets(p1, p2, k, length):
        for out, chance in Enumerated().outcomes(lambda ids=ids: verify(ids, p1, p2, q1, q)):
            longer += share * chance * (len(out) > 1)
            # A shorter block goes on with the target's own law.
            for rest in product(range(v), repeat=length + 1 - len(out)):
                whole, mass = [*out, *rest], share * chance
                for a, b in zip(whole[len(out) - 1 :], rest, strict=False):
                    mass *= float(q[a, b])
                joint[tuple(whole)] += mass
    assert longer > 0.5
    for a, b, c in product(range(v), repeat=3):
        assert joint[a, b, c] == pytest.approx(float(q1[a] * q[a, b] * q[b, c]), abs=1e-12)


@pytest.mark.prop("spectr", 13)
def test_new_names_for_the_tokens_change_nothing() -> None:
    """Same coins, renamed vocabulary: the same drafts are accepted. Only coins decide, so residuals have one token."""
    v, k, length = 5, 4, 3
    generator = torch.Generator().manual_seed(0)
    compared = 0
    for seed in range(60):
        p = dirichlet(v, seed, 1.0, rows=k * length).view(k, length, v)
        p[:] = p[:1]
        ids = torch.stack(
            [torch.stack([torch.multinomial(row, 1, generator=generator)[0] for row in draft]) for draft in p]
        )
        # The target leans to one token, so whatever no draft gives is that token.
        lean = torch.zeros(v, dtype=torch.float64)
        lean[seed % v] = 1.0
        target = torch.cat([0.5 * p + 0.5 * lean, lean.expand(k, 1, v)], dim=1)
        new_name = torch.randperm(v, generator=generator)
        old_name = new_name.argsort()
        plain, row = spectr_verify(ids, p, target, torch.Generator().manual_seed(seed))
        renamed, other = spectr_verify(
            new_name[ids], p[..., old_name], target[..., old_name], torch.Generator().manual_seed(seed)
        )
        assert torch.equal(new_name[plain], renamed)
        assert row == other
        compared += plain.shape[0] > 1
    assert compared > 10


@pytest.mark.prop("spectr", 13)
def test_the_same_seed_gives_the_same_block() -> None:
    p, q = dirichlet(6, 1, rows=12).view(4, 3, 6), dirichlet(6, 2, rows=16).view(4, 4, 6)
    ids = torch.randint(0, 6, (4, 3), generator=torch.Generator().manual_seed(5))
    runs = [spectr_verify(ids, p, q, torch.Generator().manual_seed(seed))[0].tolist() for seed in range(20)]
    again = [spectr_verify(ids, p, q, torch.Generator().manual_seed(seed))[0].tolist() for seed in range(20)]
    assert runs == again
    assert len({tuple(r) for r in runs}) > 1


def test_every_draft_with_the_emitted_token_stays_alive() -> None:
    """Also one whose own coin failed: what it goes on with does not depend on the coin."""
    ids = torch.tensor([[0, 1], [0, 0]])
    even = torch.tensor([0.5, 0.5], dtype=torch.float64)
    rare, one = even.new_tensor([0.2, 0.8]), even.new_tensor([0.0, 1.0])
    target_probs = torch.stack([rare, one, even]).expand(2, 3, 2)
    by_second_coin = 0
    for seed in range(80):
        first = kseq_select(ids[:, 0], even, rare, torch.Generator().manual_seed(seed))
        by_second_coin += first == (0, 1)
        tokens, survivor = spectr_verify(ids, even.expand(2, 2, 2), target_probs, torch.Generator().manual_seed(seed))
        assert tokens[0] == first[0]
        if first[0] == 0:  # then only the first draft has what the target says next
            assert tokens[1] == 1
            assert tokens.shape[0] == 3
            assert survivor == 0
    assert by_second_coin > 5


@pytest.mark.parametrize("function", [solve_rho, kseq_plan, optimal_acceptance])
def test_what_is_no_pair_of_laws_is_refused(function: Callable) -> None:
    law = torch.full((4,), 0.25)
    bad = {
        "an entry of nan": torch.tensor([torch.nan, 0.5, 0.5, 0.0]),
        "an entry of -0.5": torch.tensor([-0.5, 0.5, 0.5, 0.5]),
        "off by 1": torch.tensor([0.5, 0.5, 0.5, 0.5]),
        "int64": torch.tensor([1, 0, 0, 0]),
    }
    for words, values in bad.items():
        with pytest.raises(LimitError, match=rf"draft_probs = .*{words}"):
            function(values, law, 2)
        with pytest.raises(LimitError, match=rf"target_probs = .*{words}"):
            function(law, values, 2)
    with pytest.raises(LimitError, match="draft 4 and target 3"):
        function(law, torch.full((3,), 1 / 3), 2)
    for k in (0, -1):
        with pytest.raises(LimitError, match=rf"k = {k}.*at least 1"):
            function(law, law, k)


def test_a_draft_that_its_law_rules_out_is_refused() -> None:
    p, q = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.2, 0.3, 0.5])
    with pytest.raises(LimitError, match="0 at the drafted token 2"):
        kseq_select(torch.tensor([0, 2]), p, q)


@pytest.mark.parametrize(
    ("ids", "draft", "target", "parameter"),
    [
        ((3,), (1, 3, 4), (1, 4, 4), "draft_ids"),
        ((0, 2), (0, 2, 4), (0, 3, 4), "draft_ids"),
        ((2, 3), (2, 2, 4), (2, 4, 4), "draft_probs"),
        ((2, 3), (2, 3, 4), (2, 3, 4), "target_probs"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(ids: tuple, draft: tuple, target: tuple, parameter: str) -> None:
    with pytest.raises(LimitError, match=rf"{parameter}\.shape"):
        spectr_verify(torch.zeros(ids, dtype=torch.long), torch.full(draft, 0.25), torch.full(target, 0.25))
