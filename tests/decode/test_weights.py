from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.decode.chance import chi_square
from tokenmill.decode._weights import (
    WAYS,
    NoValidContinuation,
    Resampling,
    WeightedSequences,
    effective_size,
    normalised,
    resample,
)
from tokenmill.errors import LimitError

WEIGHTS = torch.tensor([0.37, 0.0, 0.03, 0.2, 0.15, 0.25], dtype=torch.float64)
RUNS = 20_000


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def dirichlet(n: int, seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).dirichlet([0.4] * n))


def copies(weights: Tensor, how: Resampling, runs: int) -> Tensor:
    """(runs, N) how often each particle was taken."""
    seeded = generator(3)
    rows = [resample(weights, how, seeded).bincount(minlength=len(weights)) for _ in range(runs)]
    return torch.stack(rows)


@pytest.mark.prop("awrs", 7)
@pytest.mark.parametrize("how", WAYS)
def test_copies_are_as_many_as_the_weight_says(how: Resampling) -> None:
    found = copies(WEIGHTS, how, RUNS).double()
    expected = len(WEIGHTS) * WEIGHTS
    assert float(found[:, 1].max()) == 0
    alive = WEIGHTS > 0
    error = found.std(0)[alive] / RUNS**0.5
    off = (found.mean(0) - expected)[alive].abs()
    assert bool((off < 4.5 * error + 1e-12).all())
    assert bool((off[expected[alive] > 1] < 0.01 * expected[alive][expected[alive] > 1]).all())


@pytest.mark.prop("awrs", 7)
def test_systematic_copies_are_the_floor_or_the_ceiling() -> None:
    found, expected = copies(WEIGHTS, "systematic", 2000), len(WEIGHTS) * WEIGHTS
    assert bool(((found >= expected.floor()) & (found <= expected.ceil())).all())
    stratified = copies(WEIGHTS, "stratified", 2000)
    assert float((stratified - expected).abs().max()) < 2
    residual = copies(WEIGHTS, "residual", 2000)
    assert bool((residual >= expected.floor()).all())
    # the negative control: independent draws are not so even
    assert float((copies(WEIGHTS, "multinomial", 2000) - expected).abs().max()) >= 2


@given(st.integers(1, 40), st.integers(0, 10_000), st.sampled_from(WAYS))
def test_ancestors_are_sorted_alive_and_as_many_as_before(n: int, seed: int, how: Resampling) -> None:
    weights = dirichlet(n, seed)
    weights[:: 2 + seed % 3] = 0.0
    weights = weights / weights.sum() if float(weights.sum()) > 0 else torch.full_like(weights, 1 / n)
    found = resample(weights, how, generator(seed))
    assert found.shape == (n,)
    assert bool((weights[found] > 0).all())
    assert bool((found.diff() >= 0).all())


@pytest.mark.parametrize("value", [0.0, 1 - 2**-53])
@pytest.mark.parametrize("how", WAYS)
def test_the_ends_of_the_interval_find_somebody_alive(
    how: Resampling, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "rand", lambda n, **_: torch.full((n,), value, dtype=torch.float64))
    # ten times 0.1 sums to less than 1, and the last particle is dead
    weights = torch.tensor([0.0, *[0.1] * 10, 0.0], dtype=torch.float64)
    found = resample(weights, how)
    assert set(found.tolist()) <= set(range(1, 11))


@pytest.mark.parametrize("how", ["stratified", "systematic", "residual"])
def test_equal_weights_stay_as_they_are(how: Resampling) -> None:
    for n in (1, 2, 4, 8, 64):
        found = resample(torch.full((n,), 1 / n, dtype=torch.float64), how, generator())
        assert found.tolist() == list(range(n))


@pytest.mark.prop("awrs", 7)
@given(st.integers(1, 60), st.integers(0, 10_000), st.floats(-900, 900))
def test_the_effective_size_lies_between_one_and_all(n: int, seed: int, shift: float) -> None:
    logs = dirichlet(n, seed).log() + shift
    size = effective_size(logs)
    assert 1 <= size <= n
    weights = logs.softmax(0)
    assert size == pytest.approx(float(1 / (weights**2).sum()), rel=1e-9)
    assert effective_size(torch.full((n,), shift, dtype=torch.float64)) == pytest.approx(n, rel=1e-12)
    only = torch.full((n,), -torch.inf, dtype=torch.float64)
    assert effective_size(only) == 0.0
    assert not normalised(only).any()
    only[n // 2] = shift
    assert effective_size(only) == 1.0


def some(log_weights: list[float], texts: list[bytes]) -> WeightedSequences:
    ids = [list(text) for text in texts]
    return WeightedSequences(ids, texts, torch.tensor(log_weights, dtype=torch.float64), [True] * len(texts))


def test_equal_texts_are_merged_and_draws_respect_weights() -> None:
    texts = [b"a", b"b", b"a", b"dead", b"c"]
    found = some([math.log(0.1) + 5, math.log(0.5) + 5, math.log(0.3) + 5, -math.inf, math.log(0.1) + 5], texts)
    assert found.posterior() == pytest.approx({b"b": 0.5, b"a": 0.4, b"c": 0.1})
    assert list(found.posterior()) == [b"b", b"a", b"c"]
    assert found.best() == b"b"
    assert found.log_ml == pytest.approx(5 - math.log(5))
    assert found.expect(lambda text: text == b"a") == pytest.approx(0.4)
    assert float(found.weights.sum()) == pytest.approx(1)
    seeded = generator(1)
    seen = Counter((found.sample(seeded),) for _ in range(5000))
    law = {(t,): share for t, share in found.posterior().items()}
    keys = {t: (i,) for i, t in enumerate(law)}
    assert chi_square({keys[t]: n for t, n in seen.items()}, {keys[t]: p for t, p in law.items()}) > 1e-3  # pyright: ignore
    assert found.draw(generator()) != 3


def test_the_best_text_is_that_of_the_merged_law() -> None:
    found = some([math.log(0.4), math.log(0.3), math.log(0.3)], [b"single", b"twin", b"twin"])
    assert found.best() == b"twin"


def test_a_dead_population_is_empty_and_never_nan() -> None:
    found = some([-math.inf, -math.inf], [b"x", b"yy"])
    assert (found.log_ml, found.ess, found.posterior(), found.alive) == (-math.inf, 0.0, {}, False)
    assert found.weights.tolist() == [0.0, 0.0]
    assert found.texts == [b"x", b"yy"]
    for use in (found.best, found.sample, found.draw, lambda: found.expect(len)):
        with pytest.raises(NoValidContinuation, match="none of 2 particles") as caught:
            use()
        assert caught.value.partial is found
    empty = some([], [])
    assert (empty.log_ml, empty.ess, empty.posterior(), len(empty)) == (-math.inf, 0.0, {}, 0)


def test_equality_looks_at_weights() -> None:
    assert some([0.0], [b"a"]) == some([0.0], [b"a"])
    assert some([0.0], [b"a"]) != some([1.0], [b"a"])
    assert some([0.0], [b"a"]) != some([0.0], [b"b"])
    assert some([0.0], [b"a"]) != "a"


@pytest.mark.parametrize("weights", [[], [0.5, 0.4], [1.5, -0.5], [math.nan, 1.0]])
def test_what_is_no_law_cannot_be_resampled(weights: list[float]) -> None:
    with pytest.raises(LimitError, match="weights"):
        resample(torch.tensor(weights, dtype=torch.float64))


def test_an_unknown_way_is_refused() -> None:
    with pytest.raises(LimitError, match="stratified"):
        resample(WEIGHTS, "stratifed")  # pyright: ignore[reportArgumentType]
