"""Unmasking policies: the network, the laws of draws, the rule, and the training."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tokenmill import corpora, models
from tokenmill.diffuse import Canvas, Diffusion, Quota, Threshold
from tokenmill.diffuse import _policy_training as training
from tokenmill.diffuse._policy_network import policy_inputs, rotate
from tokenmill.diffuse._reveal_laws import with_best
from tokenmill.diffuse.unmasking_policies import (
    GRPOConfig,
    PolicyBatch,
    PolicyConfig,
    PolicyNetwork,
    UnmaskingPolicy,
    advantages,
    bernoulli_choice,
    bernoulli_log_likelihood,
    dpls_choice,
    dpls_log_likelihood,
    grpo_loss,
    reward,
    train_policy,
)
from tokenmill.errors import LimitError

ROOM, MASK = 12, 2
SMALL = PolicyConfig(width=16, mlp=32, time_width=16)


@pytest.fixture(scope="module")
def mixed() -> tuple[Any, Any]:
    return models.load("diffusion-mixed")


def prompts(tokenizer: Any, count: int, seed: int = 5) -> tuple[list[Any], dict[str, Tensor]]:
    asked = corpora.exercises("mixed", "validation", count, seed=seed)
    made = tokenizer([x.prompt for x in asked], padding=True, return_tensors="pt")
    return asked, {"input_ids": made["input_ids"], "attention_mask": made["attention_mask"]}


def a_network(config: PolicyConfig = SMALL, seed: int = 0, *, trained: bool = True) -> PolicyNetwork:
    """A network with random weights everywhere, as if it had been trained."""
    torch.manual_seed(seed)
    made = PolicyNetwork(config).eval()
    if trained:
        for p in made.modulation.parameters():
            nn.init.normal_(p, std=0.3)
    return made


def seen(*shape: int, seed: int = 0, p: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.rand(shape, generator=generator) < 0.5,
        torch.rand(*shape, p, generator=generator),
        torch.rand(*shape[:-1], 1, generator=generator),
    )


class Fixed(UnmaskingPolicy):
    """A policy whose logits are a function of the confidences (B, S)."""

    def utilities(self, proposal: Any) -> Tensor:
        return self.logits(proposal.confidence)  # pyright: ignore[reportAttributeAccessIssue]


def fixed(logits: Any, **settings: Any) -> Fixed:
    made = Fixed(a_network(), **settings)
    object.__setattr__(made, "logits", logits)
    return made


# The network


@pytest.mark.prop("unmasking-policies", 1)
def test_a_new_network_has_the_papers_weights_and_reveals_one_in_eight() -> None:
    torch.manual_seed(0)
    made = PolicyNetwork()
    assert sum(p.numel() for p in made.parameters()) == 331_265
    masked, confidence, time = seen(8, 20)
    with torch.no_grad():
        logits = made(masked, confidence, time)
        assert torch.equal(logits, made(~masked, confidence, time))
        assert torch.equal(logits, made(masked, confidence, 1 - time))
        assert not torch.allclose(logits, made(masked, 1 - confidence, time), atol=1e-3)
    assert float(logits.mean()) == pytest.approx(-2, abs=0.6)
    trained = a_network()
    with torch.no_grad():
        before = trained(masked, confidence, time)
        assert not torch.allclose(before, trained(~masked, confidence, time), atol=1e-3)
        assert not torch.allclose(before, trained(masked, confidence, 1 - time), atol=1e-4)


@pytest.mark.prop("unmasking-policies", 2)
@pytest.mark.parametrize("p", [1, 3])
def test_time_may_be_batched(p: int) -> None:
    made = a_network(PolicyConfig(width=16, mlp=32, time_width=16, confidences=p))
    masked, confidence, time = seen(3, 5, 9, p=p)
    with torch.no_grad():
        together = made(masked, confidence, time)
        each = torch.stack([made(masked[:, t], confidence[:, t], time[:, t]) for t in range(5)], 1)
    assert torch.allclose(together, each, atol=1e-6)
    with pytest.raises(LimitError, match="confidence"):
        made(masked, confidence[..., :1].expand(-1, -1, -1, p + 1), time)
    with pytest.raises(LimitError, match="time"):
        made(masked, confidence, time[..., 0])


def test_positions_are_relative_rotations_of_pairs() -> None:
    x = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(0)).double()
    turned = rotate(x)
    assert torch.allclose(turned.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(turned[:, 0], x[:, 0])
    angle = math.atan2(float(turned[0, 1, 1]), float(turned[0, 1, 0])) - math.atan2(
        float(x[0, 1, 1]), float(x[0, 1, 0])
    )
    assert math.cos(angle - 1) == pytest.approx(1, abs=1e-6)  # the first pair turns by 1 a place
    same = x[:, :1].expand(-1, 6, -1)
    product = rotate(same) @ rotate(same).transpose(1, 2)
    assert torch.allclose(product[0, 0, 2], product[0, 3, 5], atol=1e-6)


@pytest.mark.prop("unmasking-policies", 12)
def test_a_saved_policy_is_the_same_and_takes_longer_answers(tmp_path: Path) -> None:
    made = a_network()
    made.save(tmp_path / "p")
    again = PolicyNetwork.load(tmp_path / "p")
    assert again.config == made.config
    for length in (8, 16, 512):
        inputs = seen(2, length)
        with torch.no_grad():
            assert torch.equal(made(*inputs), again(*inputs))
    with pytest.raises(LimitError, match=r"full_context = False, but it must be True"):
        PolicyNetwork.load(tmp_path / "p", full_context=False)
    with pytest.raises(LimitError, match="saved policy"):
        PolicyNetwork.load(tmp_path / "q")


# The laws


@pytest.mark.prop("unmasking-policies", 3)
@pytest.mark.parametrize("size", [1, 4, 10])
def test_bernoulli_likelihoods_sum_up_to_one(size: int) -> None:
    u = torch.randn(12, generator=torch.Generator().manual_seed(size)) * 2
    eligible = torch.zeros(12, dtype=torch.bool)
    eligible[torch.randperm(12, generator=torch.Generator().manual_seed(0))[:size]] = True
    chosen = torch.zeros(2**size, 12, dtype=torch.bool)
    chosen[:, eligible] = torch.tensor(list(itertools.product([False, True], repeat=size)))
    ll = bernoulli_log_likelihood(u.expand(len(chosen), -1), chosen, eligible.expand(len(chosen), -1))
    assert float(ll.double().exp().sum()) == pytest.approx(1, abs=1e-5)
    p = u.sigmoid()
    product = torch.where(chosen, p, 1 - p)[:, eligible].prod(1)
    assert torch.allclose(ll.exp(), product, rtol=1e-4)
    nothing = bernoulli_log_likelihood(u, torch.zeros_like(eligible), torch.zeros_like(eligible))
    assert float(nothing) == 0
    assert torch.isfinite(
        bernoulli_log_likelihood(torch.tensor([torch.inf]), torch.tensor([False]), torch.tensor([True]))
    )


def test_bernoulli_draws_have_the_sigmoids_frequencies() -> None:
    u, count = torch.tensor([-1.0, 0.5, 3.0, 9.0]), 40_000
    eligible = torch.tensor([True, True, True, False]).expand(count, -1)
    noise = torch.rand(count, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    share = bernoulli_choice(u.expand(count, -1), eligible, noise).double().mean(0)
    p = u.sigmoid().double() * eligible[0]
    assert ((share - p).abs() <= 3 * (p * (1 - p) / count).sqrt() + 1e-12).all()


def ranks(order: tuple[int, ...], length: int) -> Tensor:
    rank = torch.full((length,), -1)
    rank[list(order)] = torch.arange(len(order))
    return rank


def sequences(places: list[int]) -> list[tuple[int, ...]]:
    return [s for n in range(1, len(places) + 1) for s in itertools.permutations(places, n)]


@pytest.mark.prop("unmasking-policies", 4)
@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("stop", [0.0, 1.5])
def test_plackett_luce_likelihoods_sum_up_to_one(size: int, stop: float) -> None:
    u = torch.randn(7, generator=torch.Generator().manual_seed(size)) * 2
    places = [0, 2, 3, 5, 6][:size]
    eligible = torch.zeros(7, dtype=torch.bool)
    eligible[places] = True
    rank = torch.stack([ranks(s, 7) for s in sequences(places)])
    ll = dpls_log_likelihood(u.expand(len(rank), -1), rank, eligible.expand(len(rank), -1), stop=stop)
    assert float(ll.double().exp().sum()) == pytest.approx(1, abs=1e-5)


def test_plackett_luce_likelihood_is_its_formula() -> None:
    u, eligible, stop = torch.tensor([0.3, -1.0, 2.0, 0.5]), torch.tensor([True, True, True, True]), 0.4
    e = u.double().exp()
    by_hand = e[2] / e.sum() * e[0] / (e[[0, 1, 3]].sum() + math.exp(stop))
    by_hand *= math.exp(stop) / (e[[1, 3]].sum() + math.exp(stop))
    found = dpls_log_likelihood(u, torch.tensor([1, -1, 0, -1]), eligible, stop=stop)
    assert float(found.exp()) == pytest.approx(float(by_hand), rel=1e-5)
    nothing = dpls_log_likelihood(u, torch.full((4,), -1), torch.zeros(4, dtype=torch.bool))
    assert float(nothing) == 0
    wide = u.clone().requires_grad_()
    dpls_log_likelihood(wide, torch.tensor([0, 1, 2, 3]), eligible).backward()
    assert torch.isfinite(wide.grad).all() if wide.grad is not None else False


@pytest.mark.prop("unmasking-policies", 4)
def test_plackett_luce_draws_follow_their_likelihood() -> None:
    u, count, stop = torch.tensor([0.3, 9.0, -1.0, 1.0]), 100_000, 0.2
    eligible = torch.tensor([True, False, True, True])
    noise = torch.rand(count, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rank = dpls_choice(u.expand(count, -1), eligible.expand(count, -1), noise, stop=stop)
    for order in sequences([0, 2, 3]):
        wanted = ranks(order, 4)
        p = float(dpls_log_likelihood(u, wanted, eligible, stop=stop).double().exp())
        share = float((rank == wanted).all(1).double().mean())
        assert abs(share - p) < 3.5 * math.sqrt(p * (1 - p) / count)
    for at, size in ((math.inf, 1), (-math.inf, 3)):
        only = dpls_choice(u.expand(200, -1), eligible.expand(200, -1), noise[:200], stop=at)
        assert ((only >= 0).sum(1) == size).all()
    none = torch.zeros(5, 4, dtype=torch.bool)
    assert (dpls_choice(u.expand(5, -1), none, noise[:5]) == -1).all()


# The rule


@pytest.mark.prop("unmasking-policies", 5)
@pytest.mark.parametrize("block", [4, 12])
def test_extreme_utilities_take_one_pass_or_one_a_place(mixed: Any, block: int) -> None:
    model, tokenizer = mixed
    _, inputs = prompts(tokenizer, 6)
    lengths = {**inputs, "max_new_tokens": ROOM}
    eager = Diffusion(fixed(lambda c: torch.full_like(c, torch.inf)), block_length=block)
    eager.generate(model, **lengths)
    assert eager.trace.row_calls == [ROOM // block] * 6
    # Far below zero nothing is drawn, so one a pass is forced, in the order of the utilities.
    timid = Diffusion(fixed(lambda c: c - 1e4), block_length=block)
    one = Diffusion(Quota(1), block_length=block)
    assert torch.equal(timid.generate(model, **lengths), one.generate(model, **lengths))
    assert timid.trace.row_calls == [ROOM] * 6
    right_to_left = Diffusion(fixed(lambda c: torch.arange(c.shape[1]) - 1e6 + 0 * c), history=True)
    right_to_left.generate(model, **lengths)
    masks = [int((h[0] == MASK).sum()) for h in right_to_left.trace.history]
    assert masks == list(range(ROOM - 1, -1, -1))
    assert (right_to_left.trace.history[0][:, :-1] == MASK).all()


@pytest.mark.prop("unmasking-policies", 5)
@pytest.mark.parametrize("tau", [0.5, 0.9, 0.999])
def test_a_threshold_as_a_policy_is_the_threshold(mixed: Any, tau: float) -> None:
    model, tokenizer = mixed
    _, inputs = prompts(tokenizer, 24)
    policy = fixed(lambda c: torch.where(c >= tau, torch.inf, -torch.inf))
    outs, calls = [], []
    for rule in (policy, Threshold(tau)):
        made = Diffusion(rule, block_length=6)
        outs.append(made.generate(model, **inputs, max_new_tokens=ROOM))
        calls.append(made.trace.row_calls)
    assert torch.equal(*outs)
    assert calls[0] == calls[1]


@pytest.mark.prop("unmasking-policies", 6)
@pytest.mark.parametrize("sampling", ["bernoulli-argmax", "bernoulli", "dpls"])
@pytest.mark.parametrize("full", [True, False])
def test_only_masks_of_the_block_are_revealed_and_they_stay(mixed: Any, sampling: Any, full: bool) -> None:
    model, tokenizer = mixed
    _, inputs = prompts(tokenizer, 8)
    network = a_network(PolicyConfig(width=16, mlp=32, time_width=16, full_context=full))
    made = Diffusion(UnmaskingPolicy(network, sampling=sampling), block_length=5, seed=3, history=True)
    out = made.generate(model, **inputs, max_new_tokens=ROOM)
    start, trace = inputs["input_ids"].shape[1], made.trace
    assert torch.equal(out[:, :start], inputs["input_ids"])
    history = [torch.full((8, ROOM), MASK), *trace.history]
    for before, after in itertools.pairwise(history):
        kept = before != MASK
        assert torch.equal(before[kept], after[kept])
    assert all(calls <= ROOM for calls in trace.row_calls)
    left = (trace.history[-1] == MASK).sum(1).tolist()
    assert [tokens + masks for tokens, masks in zip(trace.row_tokens, left, strict=True)] == [ROOM] * 8
    assert [masks > 0 for masks in left] == trace.still_masked
    assert sampling == "bernoulli" or not any(trace.still_masked)


def test_a_bernoulli_row_gives_a_block_up_after_as_many_passes_as_places(mixed: Any) -> None:
    model, tokenizer = mixed
    _, inputs = prompts(tokenizer, 4)
    never = fixed(lambda c: torch.full_like(c, -torch.inf), sampling="bernoulli")
    made = Diffusion(never, block_length=5)
    out = made.generate(model, **inputs, max_new_tokens=ROOM)
    assert made.trace.row_calls == [ROOM] * 4  # 5 and 5 and 2
    assert made.trace.still_masked == [True] * 4
    assert not (out == MASK).any()


@pytest.mark.prop("unmasking-policies", 11)
def test_padding_on_the_left_changes_nothing(mixed: Any) -> None:
    model, tokenizer = mixed
    _, inputs = prompts(tokenizer, 6)
    more = torch.zeros(6, 3, dtype=torch.long)
    padded = {name: torch.cat([more, value], 1) for name, value in inputs.items()}
    outs, calls = [], []
    for given in (inputs, padded):
        made = Diffusion(UnmaskingPolicy(a_network()), seed=11)
        outs.append(made.generate(model, **given, max_new_tokens=ROOM)[:, given["input_ids"].shape[1] :])
        calls.append(made.trace.row_calls)
    assert torch.equal(*outs)
    assert calls[0] == calls[1]


def test_a_temperature_of_zero_draws_nothing(mixed: Any) -> None:
    model, tokenizer = mixed
    _, inputs = prompts(tokenizer, 6)
    rule = fixed(lambda c: c - 0.9, temperature=0.0, sampling="bernoulli")
    assert not rule.leaves_masks
    outs = [Diffusion(rule, seed=s).generate(model, **inputs, max_new_tokens=ROOM) for s in (0, 1)]
    assert torch.equal(*outs)
    assert torch.equal(outs[0], Diffusion(Threshold(0.9)).generate(model, **inputs, max_new_tokens=ROOM))
    hot = fixed(lambda c: c - 0.9, temperature=1.0)
    drawn = [Diffusion(hot, seed=s) for s in (0, 1)]
    for made in drawn:
        made.generate(model, **inputs, max_new_tokens=ROOM)
    assert drawn[0].trace.revealed != drawn[1].trace.revealed


def test_what_the_network_sees_is_the_pass() -> None:
    x = torch.full((2, 7), MASK)
    x[0, :2], x[1, :6] = 9, 9
    real = torch.ones(2, 7, dtype=torch.bool)
    canvas = Canvas.of(
        x,
        real,
        torch.arange(7).expand(2, -1),
        prompt=2,
        mask_id=MASK,
        eot_ids=torch.tensor([1]),
        block_length=3,
        shift=False,
    )
    canvas.passes, canvas.confidence = torch.tensor([1, 4]), torch.arange(14.0).view(2, 7)
    proposal: Any = SimpleNamespace(canvas=canvas)
    masked, confidence, time, places = policy_inputs(proposal, SMALL)
    assert masked.tolist() == [[True] * 5, [False] * 4 + [True]]
    assert confidence[..., 0].tolist() == [[2, 3, 4, 5, 6], [9, 10, 11, 12, 13]]
    assert time[:, 0].tolist() == pytest.approx([0.2, 0.8])
    assert places.tolist() == [[2, 3, 4, 5, 6]] * 2
    block = PolicyConfig(width=16, mlp=32, time_width=16, full_context=False)
    masked, confidence, _, places = policy_inputs(proposal, block)
    assert places.tolist() == [[2, 3, 4], [5, 6, 7]]
    assert confidence[..., 0].tolist() == [[2, 3, 4], [12, 13, 0]]
    assert masked.tolist() == [[True] * 3, [False, True, False]]


def test_ties_of_the_forced_place_go_to_confidence() -> None:
    chosen = torch.zeros(3, 4, dtype=torch.bool)
    u = torch.tensor([[1.0, 1, 0, 1], [-torch.inf] * 4, [5, 5, 5, 5]])
    eligible = torch.tensor([[True, True, True, False], [False, True, True, False], [False] * 4])
    tie = torch.tensor([[0.1, 0.2, 0.9, 0.9], [0.9, 0.3, 0.3, 0.1], [0.1] * 4])
    assert with_best(chosen, u, eligible, tie).nonzero().tolist() == [[0, 1], [1, 1]]
    chosen[0, 2] = True
    assert with_best(chosen, u, eligible, tie).nonzero().tolist() == [[0, 2], [1, 1]]


# The training


@pytest.mark.prop("unmasking-policies", 7)
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0, 3.0])
def test_the_reward_falls_with_passes_and_is_zero_for_a_wrong_answer(alpha: float) -> None:
    n = torch.arange(1, 16)
    right = reward(torch.ones(15, dtype=torch.bool), n, 12, alpha)
    assert ((right >= 0) & (right <= 1)).all()
    assert (right.diff() <= 0).all()
    assert right[0] == 1
    assert float(right[-1]) == pytest.approx((1 / 12) ** alpha)
    assert not reward(torch.zeros(15, dtype=torch.bool), n, 12, alpha).any()
    if alpha == 0:
        assert (right == 1).all()
    else:
        assert right[5] < right[0]
        added = reward(torch.tensor([True, False]), torch.tensor([3, 3]), 12, alpha, form="additive")
        assert added.tolist() == pytest.approx([1 - alpha / 4, -alpha / 4])
    with pytest.raises(LimitError, match="alpha"):
        reward(right > 0, n, 12, -1.0)
    with pytest.raises(LimitError, match="length"):
        reward(right > 0, n, 0, 1.0)


class Toy:
    """Two places that a pass reveals with logits of its own: the answer is right if place 0 comes before place 1."""

    def __init__(self, theta: Tensor) -> None:
        self.theta = theta  # (2 passes, 2 places)

    def paths(self) -> list[tuple[list[Tensor], list[Tensor], float]]:
        """All trajectories: the choices, what was eligible, and the reward."""
        found = []
        for first in itertools.product([False, True], repeat=2):
            left = torch.tensor([not one for one in first])
            for second in itertools.product([False, True], repeat=2):
                if any(b and not e for b, e in zip(second, left.tolist(), strict=True)):
                    continue
                order = float(first == (True, False) and second == (False, True))
                gained = order + 0.3 * float(all(first))
                found.append(([torch.tensor(first), torch.tensor(second)], [torch.ones(2) > 0, left], gained))
        return found

    def log_likelihood(self, chosen: list[Tensor], eligible: list[Tensor]) -> Tensor:
        return torch.stack([bernoulli_log_likelihood(self.theta[t], chosen[t], eligible[t]) for t in range(2)])


@pytest.mark.prop("unmasking-policies", 8)
def test_the_gradient_is_the_policys_on_a_small_process() -> None:
    toy = Toy(torch.tensor([[0.4, -0.3], [-0.5, 0.8]], requires_grad=True))
    paths = toy.paths()
    ll = torch.stack([toy.log_likelihood(c, e) for c, e, _ in paths])  # (paths, 2)
    active = torch.stack([torch.stack([one.any() for one in e]) for _, e, _ in paths])
    gains = torch.tensor([r for _, _, r in paths])
    p = ll.sum(1).exp().detach()
    assert float(p.sum()) == pytest.approx(1, abs=1e-5)
    wanted = p * (gains - (p * gains).sum())
    (exact,) = torch.autograd.grad(-(wanted * (ll * active).sum(1) / active.sum(1)).sum(), toy.theta, retain_graph=True)

    drawn = torch.multinomial(p, 60_000, replacement=True, generator=torch.Generator().manual_seed(0))
    a = advantages(gains[drawn].double().view(-1, 6_000)).flatten()
    loss = grpo_loss(ll[drawn], ll[drawn].detach(), a, active[drawn], clip=0.5) / len(drawn)
    (found,) = torch.autograd.grad(loss, toy.theta)
    assert torch.allclose(found, exact, atol=0.05 * float(exact.abs().max()))


@pytest.mark.prop("unmasking-policies", 9)
def test_the_first_step_is_reinforce_with_a_baseline() -> None:
    generator = torch.Generator().manual_seed(0)
    ll = torch.randn(6, 4, generator=generator).requires_grad_()
    active = torch.rand(6, 4, generator=generator) < 0.7
    a = advantages(torch.rand(2, 3, generator=generator)).flatten()
    assert float(a.view(2, 3).sum(1).abs().max()) < 1e-6
    (found,) = torch.autograd.grad(grpo_loss(ll, ll.detach(), a, active, clip=0.5), ll)
    wanted = -(a[:, None] * active / active.sum(1, keepdim=True))
    assert torch.allclose(found, wanted, atol=1e-6)
    equal = advantages(torch.full((2, 3), 0.7)).flatten()
    (nothing,) = torch.autograd.grad(grpo_loss(ll, ll.detach(), equal, active, clip=0.5), ll)
    assert float(nothing.abs().max()) < 1e-6


def test_a_ratio_beyond_the_clip_has_no_gradient() -> None:
    new = torch.tensor([[1.0], [1.0], [-1.0], [-1.0]], requires_grad=True)
    a, active = torch.tensor([1.0, -1.0, 1.0, -1.0]), torch.ones(4, 1, dtype=torch.bool)
    loss = grpo_loss(new, torch.zeros(4, 1), a, active, clip=0.5)
    (found,) = torch.autograd.grad(loss, new)
    # Up and already far up: no gain. Down and already far down: none either. The others still move.
    assert found[0] == 0
    assert found[3] == 0
    assert found[1] != 0
    assert found[2] != 0
    assert float(loss.detach()) == pytest.approx(-(1.5 - math.e + math.exp(-1) - 0.5))


@pytest.mark.prop("unmasking-policies", 10)
def test_passes_in_which_nothing_is_eligible_do_not_count() -> None:
    generator = torch.Generator().manual_seed(2)
    new, old = torch.randn(5, 3, generator=generator), torch.randn(5, 3, generator=generator)
    a = torch.randn(5, generator=generator)
    active = torch.ones(5, 3, dtype=torch.bool)
    active[0] = False
    plain = grpo_loss(new, old, a, active, clip=0.5)
    zeros = torch.zeros(5, 4)
    wide = grpo_loss(
        torch.cat([new, zeros], 1), torch.cat([old, zeros], 1), a, torch.cat([active, zeros > 0], 1), clip=0.5
    )
    assert torch.equal(plain, wide)
    assert torch.isfinite(plain)


def test_experts_are_sure_of_what_they_do() -> None:
    ll = torch.tensor([[-3.0, 0.0], [-3.0, 0.0]])
    found = training.with_experts(ll, torch.tensor([False, True]), group=3, experts=1)
    assert torch.equal(found[0], ll[0])
    assert found[1].exp().tolist() == pytest.approx([0.75 * math.exp(-3) + 0.25, 1.0])
    assert torch.equal(training.with_experts(ll, torch.tensor([False, True]), group=3, experts=0), ll)


def batches(tokenizer: Any, count: int) -> Any:
    for seed in itertools.count():
        asked, inputs = prompts(tokenizer, count, seed=seed)

        def right(at: int, ids: list[int], asked: list[Any] = asked) -> bool:
            return asked[at].check(corpora.answer_text(tokenizer, ids))

        yield PolicyBatch(inputs["input_ids"], right, inputs["attention_mask"])


@pytest.mark.parametrize("sampling", ["bernoulli", "dpls"])
def test_roll_outs_are_what_the_policy_drew(mixed: Any, sampling: Any) -> None:
    model, tokenizer = mixed
    rule = UnmaskingPolicy(a_network(), sampling=sampling)
    config = GRPOConfig(max_new_tokens=ROOM, group=3, experts=(0.9, 0.5), expert_block=6, block_length=4)
    batch = next(batches(tokenizer, 4))
    found = training.roll_out(model, rule, batch, config, torch.Generator().manual_seed(0))
    assert found.expert.tolist() == [False, False, False, True, True] * 4
    assert found.passes.tolist() == found.active.sum(1).tolist()
    for row in range(20):
        calls = int(found.passes[row])
        assert not found.eligible[row, calls:].any()
        assert torch.equal(found.time[row, :calls, 0], torch.arange(calls) / ROOM)
        drawn = found.rank[row] >= 0
        assert not (drawn & ~found.eligible[row]).any()
        assert int(drawn.sum()) <= ROOM
        assert (drawn.sum(0) <= 1).all()
        # What is masked in a pass is what was not drawn before.
        assert torch.equal(found.masked[row, :calls], ~(drawn[:calls].cumsum(0) - drawn[:calls].long()).bool())
        if bool(found.expert[row]):
            assert drawn.sum() == ROOM
            assert torch.equal(found.eligible[row, :calls], found.masked[row, :calls])
        else:
            assert not (found.eligible[row] & ~found.masked[row]).any()
            assert (found.eligible[row].sum(1) <= 4).all()
        if sampling == "dpls":
            assert all(sorted(r[r >= 0].tolist()) == list(range(int((r >= 0).sum()))) for r in found.rank[row])
    ll = training.log_likelihood(rule, found)
    assert ll.shape == found.active.shape
    assert (ll[~found.active] == 0).all()
    assert (ll <= 0).all()
    assert float(ll.detach().mean()) < -0.5


def test_training_learns_to_be_quick_where_answers_stay_right(mixed: Any) -> None:
    model, tokenizer = mixed
    torch.manual_seed(0)
    rule = UnmaskingPolicy(PolicyNetwork(SMALL), sampling="bernoulli")
    before = {name: p.clone() for name, p in rule.network.state_dict().items()}  # pyright: ignore[reportAttributeAccessIssue]
    told: list[int] = []
    config = GRPOConfig(max_new_tokens=ROOM, group=6, alpha=1.0, rate=1e-2, warm_up=0, max_norm=1.0)
    report = train_policy(model, rule, batches(tokenizer, 8), config, updates=14, on_update=lambda n, _: told.append(n))
    assert told == list(range(1, 15))
    assert len(report.rewards) == len(report.right) == len(report.passes) == 14
    assert sum(report.passes[-4:]) < 0.8 * sum(report.passes[:4])
    assert sum(report.rewards[-4:]) > sum(report.rewards[:4])
    after = rule.network.state_dict()  # pyright: ignore[reportAttributeAccessIssue]
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert report.best == pytest.approx(max(sum(report.rewards[at : at + 10]) / 10 for at in range(5)))


def test_equal_rewards_leave_the_policy_alone(mixed: Any) -> None:
    model, tokenizer = mixed
    rule = UnmaskingPolicy(a_network(), sampling="bernoulli")
    before = {name: p.clone() for name, p in rule.network.state_dict().items()}  # pyright: ignore[reportAttributeAccessIssue]
    _, inputs = prompts(tokenizer, 2)
    batch = PolicyBatch(inputs["input_ids"], lambda _, __: False, inputs["attention_mask"])
    train_policy(model, rule, [batch] * 2, GRPOConfig(max_new_tokens=ROOM, group=2), updates=2)
    after = rule.network.state_dict()  # pyright: ignore[reportAttributeAccessIssue]
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_steps_of_a_batch_start_from_ratios_of_one(mixed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = mixed
    ratios: list[Tensor] = []
    plain = training.grpo_loss

    def watched(new: Tensor, old: Tensor, *rest: Any, **more: Any) -> Tensor:
        ratios.append((new - old).detach().exp())
        return plain(new, old, *rest, **more)

    monkeypatch.setattr(training, "grpo_loss", watched)
    rule = UnmaskingPolicy(a_network(), sampling="bernoulli")
    config = GRPOConfig(max_new_tokens=ROOM, group=4, rate=1e-2, warm_up=0, experts=(0.9,))
    train_policy(model, rule, batches(tokenizer, 3), config, updates=1)
    assert len(ratios) == 2
    assert (ratios[0] == 1).all()
    assert not (ratios[1] == 1).all()


def test_bad_settings_are_refused(mixed: Any) -> None:
    model, tokenizer = mixed
    rules: tuple[dict[str, Any], ...] = ({"sampling": "greedy"}, {"temperature": -1.0}, {"stop": math.nan})
    for settings in rules:
        with pytest.raises(LimitError, match=next(iter(settings))):
            UnmaskingPolicy(a_network(), **settings)
    trainings: tuple[dict[str, Any], ...] = (
        {"group": 1},
        {"alpha": -0.1},
        {"block_length": 13},
        {"passes": 0},
        {"rate": math.inf},
    )
    for settings in trainings:
        with pytest.raises(LimitError, match=next(iter(settings))):
            GRPOConfig(**{**settings, "max_new_tokens": 12})
    networks: tuple[dict[str, Any], ...] = (
        {"width": 18},
        {"heads": 0},
        {"time_width": 3},
        {"period": 0.5},
        {"start": math.nan},
    )
    for settings in networks:
        with pytest.raises(LimitError, match=next(iter(settings))):
            PolicyConfig(**settings)
    rule = UnmaskingPolicy(a_network(), temperature=0.0)
    with pytest.raises(LimitError, match="temperature"):
        train_policy(model, rule, batches(tokenizer, 2), GRPOConfig(max_new_tokens=ROOM), updates=1)
