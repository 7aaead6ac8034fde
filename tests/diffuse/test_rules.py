from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.diffuse import toys
from tokenmill import diffuse
from tokenmill.diffuse import Diffusion, Entropy, EntropyBound, Factor, Margin, Quota, RandomReveal, Threshold
from tokenmill.diffuse._canvas import Canvas
from tokenmill.diffuse._draws import kept, sample
from tokenmill.diffuse._rules import above, entropy_bound_set, factor_set, top_n
from tokenmill.diffuse._schedule import even_quota, linear_quota, quotas
from tokenmill.errors import LimitError

EVERY = (Quota(1), RandomReveal(1), Threshold(2.0), Factor(0.0), Entropy(1), Margin(1), EntropyBound(0.0))


@given(st.integers(0, 60), st.integers(1, 20))
def test_quotas_share_the_masks_evenly_larger_first(masks: int, steps: int) -> None:
    """Family property 3: quotas are not negative, sum up to the masks, differ by at most one, larger ones first."""
    found = quotas(masks, steps)
    assert sum(found) == masks
    assert len(found) == steps
    assert min(found) >= 0
    assert max(found) - min(found) <= 1
    assert found == sorted(found, reverse=True)


@given(st.integers(1, 40), st.integers(1, 40))
def test_a_pass_gets_the_entry_of_its_number(masks: int, steps: int) -> None:
    done = torch.arange(steps + 3)
    found = even_quota(torch.tensor(masks).expand_as(done), torch.tensor(steps).expand_as(done), done).tolist()
    assert found[:steps] == [max(n, 1) for n in quotas(masks, steps)]
    assert found[steps:] == [1, 1, 1]


@pytest.mark.parametrize(("masks", "idle"), [(128, 1), (512, 1), (1024, 2)])
def test_the_linear_grid_starts_idle_and_ends_with_everything(masks: int, idle: int) -> None:
    left, seen = masks, []
    for step in range(masks):
        n = int(linear_quota(torch.tensor([left]), masks, torch.tensor([step])))
        seen.append(n)
        left -= n
    assert left == 0
    assert seen[:idle] == [0] * idle
    assert seen[idle] > 0


def test_bad_schedules_are_refused() -> None:
    for bad in ((3, 0), (-1, 2)):
        with pytest.raises(LimitError, match="quotas"):
            quotas(*bad)


def test_top_n_takes_the_lowest_place_of_equal_scores() -> None:
    scores = torch.tensor([[0.5, 0.9, 0.9, 0.9, 0.1], [0.2, 0.2, 0.2, 0.2, 0.2]])
    eligible = torch.tensor([[True, False, True, True, True], [False, True, True, False, True]])
    assert top_n(scores, eligible, 1).tolist() == [[False, False, True, False, False], [False, True] + [False] * 3]
    counts = torch.tensor([0, 9])
    assert top_n(scores, eligible, counts).tolist() == [[False] * 5, eligible[1].tolist()]


def test_threshold_factor_and_entropy_bound_by_hand() -> None:
    c = torch.tensor([[0.95, 0.2, 0.99, 0.8, 0.9]])
    all_of = torch.ones_like(c, dtype=torch.bool)
    assert above(c, all_of, 0.9).tolist() == [[True, False, True, False, True]]
    assert above(c, all_of, 1.1).tolist() == [[False, False, True, False, False]]
    # Sorted: 0.99, 0.95, 0.9, 0.8, 0.2 against (always), 1 - f/3, 1 - f/4, 1 - f/5, 1 - f/6.
    assert factor_set(c, all_of, 0.4).tolist() == [[True, False, True, False, True]]
    assert factor_set(c, all_of, 0.3).tolist() == [[True, False, True, False, False]]
    assert factor_set(c, all_of, 0.0).tolist() == [[False, False, True, False, False]]
    assert factor_set(torch.tensor([[0.9, 0.5, 0.61]]), all_of[:, :3], 1.6).tolist() == [[True, False, True]]
    assert factor_set(torch.tensor([[0.9, 0.6, 0.55]]), all_of[:, :3], 1.0).sum() == 1
    h = torch.tensor([[0.3, 0.05, 0.04, 0.2, 9.0]])
    assert entropy_bound_set(h, all_of, 0.1).tolist() == [[False, True, True, True, False]]
    assert entropy_bound_set(h, all_of, 0.0).tolist() == [[False, False, True, False, False]]
    some = torch.tensor([[True, False, False, True, True]])
    assert entropy_bound_set(h, some, 0.2).tolist() == [[True, False, False, True, False]]
    for made in (above(c, some, 0.1), factor_set(c, some, 9.0), entropy_bound_set(h, some, 99.0)):
        assert made.tolist() == some.tolist()


def test_parallel_reveals_are_those_of_the_joint_when_the_marginals_are_sure() -> None:
    """Family property 7: n marginals above 1 - e with (n + 1) e <= 1 have the joint's argmax as theirs."""
    generator = torch.Generator().manual_seed(0)
    n, values, checked = 4, 3, 0
    for _ in range(400):
        share = 0.75 + 0.25 * torch.rand((), generator=generator)
        rest = torch.rand(values**n, generator=generator) ** 6
        rest[int(torch.randint(values**n, (), generator=generator))] = 0
        joint = (1 - share) * rest / rest.sum()
        joint[int(torch.randint(values**n, (), generator=generator))] += share
        joint = joint.view([values] * n)
        marginals = torch.stack([joint.sum([j for j in range(n) if j != i]) for i in range(n)])
        best = marginals.max(1)
        # The rule says: all n may go at once.
        if factor_set(best.values[None], torch.ones(1, n, dtype=torch.bool), 1.0).all():
            checked += 1
            assert int(joint.argmax()) == int((best.indices * values ** torch.arange(n - 1, -1, -1)).sum())
    assert checked > 100


@pytest.mark.parametrize("rule", EVERY)
def test_one_place_a_pass_takes_as_many_passes_as_tokens(rule: Any) -> None:
    """Family property 4: any rule that reveals one place a pass takes G passes."""
    ids, mask = toys.prompts()
    decoder = Diffusion(rule, block_length=4, seed=0)
    decoder.generate(toys.random_model(), ids, max_new_tokens=10, attention_mask=mask)
    assert decoder.trace.row_calls == [10, 10, 10]
    assert decoder.trace.revealed == [3] * 10


def test_threshold_zero_takes_a_pass_a_block_and_above_one_it_is_a_quota_of_one() -> None:
    """Family property 4: threshold 0 takes one pass a block, above 1 it is quota 1 by confidence."""
    ids, mask = toys.prompts()
    model = toys.random_model()

    def run(rule: Any, length: int | None) -> tuple[Any, Any]:
        decoder = Diffusion(rule, block_length=length)
        return decoder.generate(model, ids, max_new_tokens=10, attention_mask=mask), decoder.trace

    for length, blocks in ((None, 1), (4, 3), (10, 1), (1, 10)):
        assert run(Threshold(0.0), length)[1].row_calls == [blocks] * 3
        ours, quota = run(Threshold(1.5), length), run(Quota(1), length)
        assert torch.equal(ours[0], quota[0])
        assert ours[1].row_calls == quota[1].row_calls == [10] * 3


def test_more_is_revealed_by_looser_rules() -> None:
    ids, mask = toys.prompts()
    model = toys.random_model()
    for rules in ([Threshold(t) for t in (0.9, 0.4, 0.1)], [Factor(f) for f in (0.1, 1.0, 9.0)]):
        passes = []
        for rule in (*rules, EntropyBound(50.0)):
            decoder = Diffusion(rule)
            decoder.generate(model, ids, max_new_tokens=10, attention_mask=mask)
            passes.append(decoder.trace.model_calls)
        assert passes == sorted(passes, reverse=True)
        assert passes[0] > passes[2] >= passes[3] == 1


def _proposal(logits: torch.Tensor) -> diffuse.Proposal:
    rows, places, _ = logits.shape
    x = torch.full((rows, places), toys.MASK)
    real = torch.ones_like(x, dtype=torch.bool)
    settings: dict[str, Any] = {"prompt": 0, "mask_id": toys.MASK, "block_length": places, "shift": False}
    canvas = Canvas.of(x, real, x, eot_ids=torch.tensor([]), **settings)
    targets = torch.arange(places).expand(rows, -1)
    valid = real.clone()
    valid[1:, -1] = False
    return diffuse.Proposal(canvas, logits, targets, valid, valid)


def test_entropy_margin_and_top_of_a_proposal() -> None:
    logits = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
    logits[..., 5] = -torch.inf
    proposal = _proposal(logits)
    p = logits.softmax(-1)
    entropy = torch.distributions.Categorical(probs=p[..., :5]).entropy()
    entropy[1, 3] = 0
    torch.testing.assert_close(proposal.entropy(), entropy)
    best = p.sort(-1, descending=True).values
    best[1, 3] = 0
    torch.testing.assert_close(proposal.margin(), best[..., 0] - best[..., 1])
    torch.testing.assert_close(proposal.top(8)[..., :6], best)
    assert proposal.top(8).shape == (2, 4, 8)
    assert not proposal.top(8)[..., 6:].any()


def test_entropy_and_margin_choose_by_what_their_names_say() -> None:
    logits = torch.full((2, 3, 4), -torch.inf)
    # A wide law with a clear lead, a law of two equals, a law with one token more likely but a long tail.
    logits[:, 0, :] = torch.tensor([0.52, 0.16, 0.16, 0.16]).log()
    logits[:, 1, :2] = torch.tensor([0.5, 0.5]).log()
    logits[:, 2, :2] = torch.tensor([0.55, 0.45]).log()
    proposal = _proposal(logits)
    proposal.valid[1] = True
    proposal.canvas.confidence = logits.softmax(-1).amax(-1)
    proposal.eligible = proposal.valid
    picks = [rule.reveal(proposal)[0].tolist().index(True) for rule in (Quota(1), Entropy(1), Margin(1))]
    assert picks == [2, 2, 0]
    proposal.eligible = proposal.valid & torch.tensor([True, True, False])
    picks = [rule.reveal(proposal)[0].tolist().index(True) for rule in (Quota(1), Entropy(1), Margin(1))]
    assert picks == [0, 1, 0]


def test_random_reveals_are_uniform_and_each_row_has_its_own() -> None:
    proposal = _proposal(torch.zeros(2, 4, 6))
    counts = torch.zeros(2, 4)
    same = 0
    for seed in range(600):
        proposal.canvas.generators = diffuse._draws.generators(10 * seed, 2, torch.device("cpu"))
        picked = RandomReveal(1).reveal(proposal)
        counts += picked
        same += bool((picked[0] == picked[1]).all())
    assert counts[1, 3] == 0
    assert (counts[0] - 150).abs().max() < 45
    assert (counts[1, :3] - 200).abs().max() < 45
    assert 90 < same < 210


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: Quota(0), "n"),
        (lambda: RandomReveal(True), "n"),
        (lambda: Entropy(-1), "n"),
        (lambda: Margin(0), "n"),
        (lambda: Threshold(float("nan")), "tau"),
        (lambda: Factor(-0.1), "f"),
        (lambda: EntropyBound(float("nan")), "gamma"),
    ],
)
def test_bad_numbers_are_refused_by_name(make: Any, name: str) -> None:
    with pytest.raises(LimitError, match=f"{name} ="):
        make()


def test_draws_follow_the_law_and_the_cuts() -> None:
    logits = torch.tensor([1.0, 0.5, -0.5, -torch.inf, 2.0])
    rows = 30_000
    each = diffuse._draws.generators(0, 1, torch.device("cpu"))
    where = torch.ones(1, rows, dtype=torch.bool)
    for temperature, top_k, top_p in ((1.0, 0, 1.0), (0.5, 0, 1.0), (1.0, 2, 1.0), (2.0, 0, 0.6)):
        drawn = sample(logits.expand(1, rows, -1), where, each, temperature=temperature, top_k=top_k, top_p=top_p)
        law = kept((logits.double() / temperature)[None], top_k=top_k, top_p=top_p)[0].softmax(-1)
        seen = torch.bincount(drawn, minlength=5) / rows
        assert (seen - law).abs().max() < 4 * 0.5 / rows**0.5
        assert not seen[3]
    assert kept(torch.tensor([[3.0, 2.0, 1.0]]), top_k=0, top_p=0.5).isfinite().tolist() == [[True, False, False]]
    close = kept(torch.tensor([[0.0, 0.0, 0.0, -9.0]]), top_k=0, top_p=0.5)
    assert close.isfinite().tolist() == [[True, True, False, False]]


def test_all_orders_of_a_proposals_places_are_one_set() -> None:
    for order in itertools.permutations(range(3)):
        c = torch.tensor([[0.9, 0.7, 0.2]])[:, list(order)]
        taken = factor_set(c, torch.ones(1, 3, dtype=torch.bool), 1.0)
        assert sorted(c[taken].tolist()) == pytest.approx([0.7, 0.9])
