from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain, combinations, pairwise, permutations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.decode.chance import chi_square
from tokenmill.decode._draws import Candidate, Draws, DrawTable, Ranked
from tokenmill.decode._rejection import Method, Step, awrs_step, first_valid, weighted_step
from tokenmill.errors import LimitError

CLOSED: tuple[Method, ...] = ("paper", "recursive")
PROPER: tuple[Method, ...] = ("paper", "recursive", "geometric", "auto")
DRAWS, ORDERS = 20_000, 8_000


def subsets(tokens: int) -> list[frozenset[int]]:
    return [frozenset(s) for s in chain.from_iterable(combinations(range(tokens), n) for n in range(tokens + 1))]


def logs(masses: list[float] | Tensor) -> Tensor:
    return torch.as_tensor(masses, dtype=torch.float64).log()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Chance:
    """Every outcome of a procedure that picks, with its exact probability."""

    def __init__(self) -> None:
        self._script: list[int] = []
        self._widths: list[int] = []
        self.share = 1.0

    def pick(self, shares: list[float]) -> int:
        possible = [i for i, share in enumerate(shares) if share > 0]
        place = len(self._widths)
        index = self._script[place] if place < len(self._script) else 0
        self._widths.append(len(possible))
        self.share *= shares[possible[index]]
        return possible[index]

    def outcomes(self, run: Callable[[], Step]) -> Iterator[tuple[Step, float]]:
        self._script = []
        while True:
            self._widths, self.share = [], 1.0
            yield run(), self.share
            script = (self._script + [0] * len(self._widths))[: len(self._widths)]
            while script and script[-1] == self._widths[len(script) - 1] - 1:
                script.pop()
            if not script:
                return
            script[-1] += 1
            self._script = script


class Picked:
    """A row whose draws are picked by `Chance`: the estimators run as they are."""

    def __init__(self, masses: list[float], chance: Chance, limit: int = 1) -> None:
        self.masses, self.chance, self.limit = dict(enumerate(masses)), chance, limit
        self.total, self.last = math.fsum(masses), -1
        self.log_total = math.log(self.total) if self.total else -math.inf
        self.top_share = max(masses) / self.total if self.total else 0.0

    @property
    def log_left(self) -> float:
        left = math.fsum(self.masses.values())
        return math.log(left) if left else -math.inf

    def propose(self) -> Candidate | None:
        left = math.fsum(self.masses.values())
        if not left:
            return None
        tokens = list(self.masses)
        self.last = tokens[self.chance.pick([self.masses[t] / left for t in tokens])]
        return Candidate(self.last, math.log(self.masses[self.last]))

    def remove(self) -> None:
        del self.masses[self.last]

    def phantoms(self) -> float:
        share = 1 - math.fsum(self.masses.values()) / self.total
        if len(self.masses) == 0 or share <= 0:
            return 0.0
        return self.chance.pick([share**k * (1 - share) for k in range(self.limit)] + [share**self.limit])


def enumerated(masses: list[float], valid: frozenset[int], **settings: Any) -> list[tuple[Step, float]]:
    chance = Chance()
    limit = settings.get("max_rejects") or 1
    return list(chance.outcomes(lambda: weighted_step(Picked(masses, chance, limit), valid.__contains__, **settings)))


def weights_by_token(outcomes: list[tuple[Step, float]], tokens: int) -> list[float]:
    """E[w 1{x = t}] for every t."""
    return [math.fsum(share * math.exp(s.logw) for s, share in outcomes if s.token == t) for t in range(tokens)]


LAWS = [
    [1.0],
    [0.3, 0.7],
    [0.5, 0.5, 0.0],
    [0.9, 0.06, 0.04],
    [0.4, 0.25, 0.2, 0.15],
    [1e-9, 0.7, 0.2, 0.1 - 1e-9],
    [0.4, 0.25, 0.2, 0.1, 0.05],
    [2.0, 0.1, 5.0, 0.4, 0.03],  # not normalised
]


@pytest.mark.prop("awrs", 1)
@pytest.mark.parametrize("method", CLOSED)
@pytest.mark.parametrize("masses", LAWS)
def test_closed_forms_are_properly_weighted_for_every_valid_set(masses: list[float], method: Method) -> None:
    for valid in subsets(len(masses)):
        found = weights_by_token(enumerated(masses, valid, method=method), len(masses))
        assert found == pytest.approx([m * (t in valid) for t, m in enumerate(masses)], abs=1e-12, rel=1e-12)


@pytest.mark.prop("awrs", 1)
@pytest.mark.parametrize(("method", "accepts"), [("recursive", 2), ("geometric", 2), ("geometric", 3), ("auto", 4)])
@pytest.mark.parametrize("rejects", [2, 3])
@pytest.mark.parametrize("masses", LAWS[:5])
def test_giving_up_early_keeps_the_weights_proper(
    masses: list[float], method: Method, accepts: int, rejects: int
) -> None:
    """With an end to the rejected draws the geometric estimator has finitely many outcomes, and all are visited."""
    for valid in subsets(len(masses)):
        outcomes = enumerated(masses, valid, method=method, max_accepts=accepts, max_rejects=rejects)
        assert math.fsum(share for _, share in outcomes) == pytest.approx(1.0, abs=1e-12)
        found = weights_by_token(outcomes, len(masses))
        assert found == pytest.approx([m * (t in valid) for t, m in enumerate(masses)], abs=1e-12)


@pytest.mark.prop("awrs", 1)
def test_enumeration_notices_a_wrong_estimator() -> None:
    """The negative control: dividing by one less than the estimator does is seen at once."""
    masses, valid = LAWS[4], frozenset({1, 3})
    right = enumerated(masses, valid, method="paper")
    wrong = [(Step(s.token, s.logw - math.log(2), s.n_checks) if s.n_checks > 2 else s, p) for s, p in right]
    assert weights_by_token(wrong, 4)[1] != pytest.approx(masses[1], abs=1e-3)


@pytest.mark.prop("awrs", 2)
@pytest.mark.parametrize("method", [*CLOSED, "lcd"])
def test_mean_weight_is_the_valid_mass_and_tokens_follow_the_masked_law(method: Method) -> None:
    masses = LAWS[6]
    for valid in subsets(5)[1:]:
        outcomes, mass = enumerated(masses, valid, method=method), math.fsum(masses[t] for t in valid)
        mean = math.fsum(share * math.exp(step.logw) for step, share in outcomes)
        assert mean == pytest.approx(1.0 if method == "lcd" else mass, abs=1e-12)
        for t in range(5):
            seen = math.fsum(share for step, share in outcomes if step.token == t)
            assert seen == pytest.approx(masses[t] / mass if t in valid else 0.0, abs=1e-12)


def random_law(tokens: int, seed: int, concentration: float = 0.3) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).dirichlet([concentration] * tokens))


@pytest.mark.prop("awrs", 2)
@pytest.mark.parametrize("method", [*PROPER, "lcd"])
def test_drawn_tokens_follow_the_masked_law(method: Method) -> None:
    law = random_law(12, 3, 1.0)
    valid = frozenset(range(0, 12, 3))
    mass = float(law[list(valid)].sum())
    table = DrawTable(law.log().expand(DRAWS, -1), generator=generator(1))
    steps = [weighted_step(table.row(i), valid.__contains__, method=method) for i in range(DRAWS)]
    exact = {(t,): float(law[t]) / mass for t in sorted(valid)}
    assert chi_square(dict(Counter((s.token,) for s in steps)), exact) > 1e-3
    weights = torch.tensor([s.logw for s in steps], dtype=torch.float64).exp()
    if method != "lcd":
        error = float(weights.std()) / DRAWS**0.5
        assert abs(float(weights.mean()) - mass) < 4 * error + 1e-12
        for t in valid:  # E[w 1{x = t}], not only its sum
            part = weights * torch.tensor([s.token == t for s in steps])
            assert abs(float(part.mean() - law[t])) < 4.5 * float(part.std()) / DRAWS**0.5


@pytest.mark.prop("awrs", 2)
def test_another_law_fails_the_same_test() -> None:
    """The negative control: tokens drawn at twice the temperature, a quarter of the samples."""
    law, valid = random_law(12, 3, 1.0), frozenset(range(0, 12, 3))
    table = DrawTable(law.sqrt().log().expand(DRAWS // 4, -1), generator=generator(1))
    seen = Counter((weighted_step(table.row(i), valid.__contains__).token,) for i in range(DRAWS // 4))
    mass = float(law[list(valid)].sum())
    assert chi_square(dict(seen), {(t,): float(law[t]) / mass for t in sorted(valid)}) < 1e-6


@pytest.mark.prop("awrs", 3)
@given(st.integers(1, 30), st.integers(0, 1000))
def test_when_everything_is_valid_the_weight_is_one(tokens: int, seed: int) -> None:
    logp = random_law(tokens, seed).log()
    for method in PROPER:
        step = awrs_step(logp, lambda _: True, method=method, generator=generator(seed))
        assert step.logw == pytest.approx(float(logp.logsumexp(0)), abs=1e-12)
        assert step.n_checks <= 2


@pytest.mark.prop("awrs", 3)
@given(st.integers(1, 30), st.integers(0, 1000))
def test_when_nothing_is_valid_the_weight_is_zero(tokens: int, seed: int) -> None:
    law = random_law(tokens, seed)
    for method in (*PROPER, "lcd"):
        step = awrs_step(law.log(), lambda _: False, method=method, generator=generator(seed))
        assert step == Step(-1, -math.inf, int((law > 0).sum()))
    assert awrs_step(torch.full_like(law, -torch.inf), lambda _: True) == Step(-1, -math.inf, 0)


@pytest.mark.prop("awrs", 4)
@given(st.integers(1, 30), st.integers(0, 1000), st.data())
def test_one_valid_token_has_a_weight_without_variance(tokens: int, seed: int, data: st.DataObject) -> None:
    logp = random_law(tokens, seed).log()
    only = data.draw(st.integers(0, tokens - 1))
    for repeat in range(5):
        step = awrs_step(logp, only.__eq__, method="recursive", generator=generator(repeat))
        assert step.token == (only if logp[only] > -math.inf else -1)
        assert step.logw == pytest.approx(float(logp[only]), abs=1e-9)


@pytest.mark.prop("awrs", 5)
@given(st.integers(1, 40), st.integers(0, 1000), st.sampled_from([*PROPER, "lcd"]), st.integers(2, 5))
def test_no_token_is_checked_twice(tokens: int, seed: int, method: Method, accepts: int) -> None:
    law = random_law(tokens, seed, 0.1)
    valid = set(np.random.default_rng(seed).choice(tokens, size=tokens // 4).tolist())
    asked: list[int] = []

    def accept(token: int) -> bool:
        asked.append(token)
        return token in valid

    accepts = accepts if method in ("auto", "geometric") else 2
    step = awrs_step(law.log(), accept, method=method, max_accepts=accepts, generator=generator(seed))
    assert len(set(asked)) == len(asked) == step.n_checks <= tokens
    assert all(law[t] > 0 for t in asked)


@pytest.mark.prop("awrs", 10)
@pytest.mark.parametrize("method", PROPER)
def test_checks_are_few_and_fall_with_the_valid_mass(method: Method) -> None:
    tokens, means = 20_000, []
    for mass in (0.99, 0.5, 0.1):
        law = torch.full((tokens,), (1 - mass) / (tokens - 10), dtype=torch.float64)
        law[torch.arange(10) * 1999] = mass / 10
        table = DrawTable(law.log().expand(200, -1), generator=generator(4))
        checks = [weighted_step(table.row(i), lambda t: t % 1999 == 0, method=method).n_checks for i in range(200)]
        means.append(sum(checks) / len(checks))
    assert means[0] < means[1] < means[2] < 40
    assert means[0] < 2.2


def gumbel_order(logp: Tensor, seeded: torch.Generator) -> list[int]:
    """The slow twin: keys for the whole vocabulary, sorted. Noise is taken from (0, 1], so no key is NaN."""
    noise = 1 - torch.rand(logp.shape, generator=seeded, dtype=torch.float64)
    keys = logp - (-noise.log()).log()
    order = keys.argsort(descending=True)
    return order[logp[order] > -torch.inf].tolist()


def lazy_order(row: Draws) -> list[int]:
    order: list[int] = []
    while (candidate := row.propose()) is not None:
        order.append(candidate.token)
        row.remove()
    return order


ORDERED = {
    "flat": [0.3, 0.25, 0.25, 0.2],
    "one token has nearly all": [0.985, 0.01, 0.004, 0.001],  # sums are made anew at once
    "with a hole": [0.6, 0.0, 0.3, 0.1],
}


@pytest.mark.prop("awrs", 5)
@pytest.mark.parametrize("name", ORDERED)
@pytest.mark.parametrize("twin", ["lazy", "gumbel"])
def test_lazy_draws_and_gumbel_keys_have_the_same_order_in_law(name: str, twin: str) -> None:
    masses = ORDERED[name]
    law: dict[tuple[int, ...], float] = {}
    for order in permutations([t for t, m in enumerate(masses) if m > 0]):
        share, left = 1.0, 1.0
        for t in order:
            share *= masses[t] / left if left > 1e-12 else 1.0
            left -= masses[t]
        law[order] = share
    seeded = generator(8)
    if twin == "lazy":
        table = DrawTable(logs(masses).expand(ORDERS, -1), generator=seeded)
        seen = Counter(tuple(lazy_order(table.row(i))) for i in range(ORDERS))
    else:
        seen = Counter(tuple(gumbel_order(logs(masses), seeded)) for _ in range(ORDERS))
    assert chi_square(dict(seen), law) > 1e-3


@given(st.integers(1, 400), st.integers(0, 1000), st.sampled_from([0.02, 0.3, 3.0]))
def test_a_walk_visits_every_token_with_mass_once_and_knows_what_is_left(
    tokens: int, seed: int, concentration: float
) -> None:
    logp = random_law(tokens, seed, concentration).log() - 700.0 * (seed % 3)
    row = DrawTable(logp[None], generator=generator(seed)).row(0)
    assert row.log_total == pytest.approx(float(logp.logsumexp(0)), abs=1e-9)
    left = logp.clone()
    while (candidate := row.propose()) is not None:
        assert candidate.log_mass == pytest.approx(float(logp[candidate.token]), abs=1e-9)
        assert row.log_left == pytest.approx(float(left.logsumexp(0)), abs=1e-9)
        assert left[candidate.token] > -math.inf
        row.remove()
        left[candidate.token] = -math.inf
    assert not bool((left > -math.inf).any())
    assert row.log_left == -math.inf


def test_masses_far_below_the_smallest_number_are_still_reached() -> None:
    logp = torch.tensor([0.0, -800.0, -2000.0], dtype=torch.float64)
    for method in PROPER:
        step = awrs_step(logp, (2).__eq__, method=method, generator=generator())
        if method in ("paper", "recursive"):
            assert step.token == 2
            assert step.logw == pytest.approx(-2000.0 - (math.log(3) if method == "paper" else 0.0))
        else:
            assert step.logw == -math.inf  # a draw with replacement would never get there


def test_phantoms_are_geometric() -> None:
    row = DrawTable(logs([0.7, 0.2, 0.1])[None], generator=generator(5)).row(0)
    while (candidate := row.propose()) is not None and candidate.token != 0:
        pass
    assert row.phantoms() == 0
    row.remove()
    counts = Counter((min(int(row.phantoms()), 20),) for _ in range(DRAWS))
    law = {(k,): 0.7**k * 0.3 for k in range(20)} | {(20,): 0.7**20}
    assert chi_square(dict(counts), law) > 1e-3


def test_uniform_numbers_at_both_ends_find_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """U = 0 must not find a first token without mass, U just below 1 not a last one, whatever the sum rounds to."""
    logp = logs([0.0, 0.1, 0.7, 0.1 / 3, 0.0])
    for value, token in ((0.0, 1), (1 - 2**-53, 3), (1.0, 3)):
        monkeypatch.setattr(torch, "rand", lambda shape, v=value, **_: torch.full(shape, v, dtype=torch.float64))
        row = DrawTable(logp[None]).row(0)
        candidate = row.propose()
        assert candidate is not None
        assert candidate.token == token
        # the same behind sums that were made anew: the second token is drawn from those
        first, second = (0.95, 0.05) if value == 0 else (0.05, 0.95)
        anew = DrawTable(logs([0.0, first, second, 0.0])[None]).row(0)
        assert lazy_order(anew) == ([1, 2] if value == 0 else [2, 1])


def test_events_are_merged_and_blocked_tokens_have_no_mass() -> None:
    logp = random_law(10, 1, 1.0).log()[None]
    table = DrawTable(logp, generator=generator(), blocked=torch.tensor([1, 4]), event=[3, 7, 8])
    masses = dict.fromkeys(range(10), 0.0)
    row = table.row(0)
    while (candidate := row.propose()) is not None:
        masses[candidate.token] = math.exp(candidate.log_mass)
        row.remove()
    p = logp[0].exp()
    expected = [0.0 if t in (1, 4, 7, 8) else float(p[t]) for t in range(10)]
    expected[3] = float(p[[3, 7, 8]].sum())
    assert list(masses.values()) == pytest.approx(expected, abs=1e-12)


def test_blocked_tokens_with_all_the_mass_leave_the_rest_alone() -> None:
    """What is left has masses below the smallest number in the scale of the blocked token."""
    logp = torch.tensor([[0.0, -900.0, -901.0, -902.0]], dtype=torch.float64)
    row = DrawTable(logp, generator=generator(), blocked=torch.tensor([0]), event=[2, 3]).row(0)
    expected = float(logp[0, 1:].logsumexp(0))
    assert row.log_total == pytest.approx(expected)
    assert row.top_share == pytest.approx(math.exp(-900 - expected))
    assert sorted(lazy_order(row)) == [1, 2]


@pytest.mark.prop("awrs", 9)
def test_rows_do_not_depend_on_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same numbers for every row, a permuted batch gives permuted steps."""
    logp = torch.stack([random_law(50, seed).log() for seed in range(6)])
    numbers = torch.rand(4096, generator=generator(), dtype=torch.float64)
    monkeypatch.setattr(torch, "rand", lambda shape, **_: numbers[: shape[-1]].expand(shape).clone())
    order = [3, 1, 5, 0, 4, 2]

    def steps(rows: Tensor) -> list[Step]:
        table = DrawTable(rows)
        return [weighted_step(table.row(i), lambda t: t % 5 == 0) for i in range(len(table))]

    straight = steps(logp)
    assert steps(logp[order]) == [straight[i] for i in order]
    assert [awrs_step(row, lambda t: t % 5 == 0) for row in logp] == straight


@pytest.mark.prop("awrs", 9)
def test_the_same_seed_gives_the_same_step() -> None:
    logp = random_law(200, 4).log()
    runs = [[awrs_step(logp, lambda t: t % 7 == 0, generator=generator(seed)) for seed in range(20)] for _ in range(2)]
    assert runs[0] == runs[1]
    assert len({step.token for step in runs[0]}) > 1


@given(st.integers(1, 700), st.integers(0, 1000), st.booleans())
def test_ranked_walks_go_down_in_probability(tokens: int, seed: int, equal: bool) -> None:
    masses = random_law(tokens, seed)
    masses = (masses * 20).round() if equal else masses
    walk, seen = Ranked(masses, 0.0), []
    while (candidate := walk.propose()) is not None:
        seen.append(candidate.token)
    assert sorted(seen) == [t for t in range(tokens) if masses[t] > 0]
    assert all(masses[a] >= masses[b] for a, b in pairwise(seen))
    only = seen[-1] if seen else 0
    step = first_valid(Ranked(masses, 0.0), only.__eq__)
    assert step == (Step(only, 0.0, len(seen)) if seen else Step(-1, -math.inf, 0))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"max_accepts": 1}, "max_accepts"),
        ({"max_accepts": True}, "max_accepts"),
        ({"max_rejects": 1}, "max_rejects"),
        ({"max_rejects": 0}, "max_rejects"),
        ({"max_rejects": math.inf}, "max_rejects"),
        ({"method": "recursiv"}, "recursive"),
        ({"method": "paper", "max_rejects": 4}, "max_rejects"),
        ({"method": "recursive", "max_accepts": 3}, "max_accepts"),
    ],
)
def test_settings_without_proper_weights_are_refused(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(LimitError, match=named):
        awrs_step(logs([0.5, 0.5]), lambda _: True, **settings)


@pytest.mark.parametrize(
    "logp",
    [
        torch.tensor([0.5, 0.5]),
        torch.zeros(0, dtype=torch.float64),
        torch.zeros(2, 3, dtype=torch.float64),
        torch.tensor([0.0, math.nan], dtype=torch.float64),
        torch.tensor([0.0, math.inf], dtype=torch.float64),
    ],
)
def test_what_is_no_row_of_log_probabilities_is_refused(logp: Tensor) -> None:
    with pytest.raises(LimitError, match="logp"):
        awrs_step(logp, lambda _: True)


def test_the_input_is_not_changed() -> None:
    logp = random_law(30, 2).log()
    before = logp.clone()
    awrs_step(logp, lambda _: False, generator=generator())
    assert torch.equal(logp, before)
