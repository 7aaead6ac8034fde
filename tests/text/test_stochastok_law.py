"""The splits have the law of the paper's loop: by enumeration of all draws, by chi-square, and beside the loop."""

from __future__ import annotations

import random
from collections import Counter
from fractions import Fraction
from itertools import product
from typing import Any

import numpy as np
import pytest
from scipy import stats

from tests.text.stochastok_toys import RUNS, TOY, State, exact_law, loop, start
from tests.text.vocabularies import python_target
from tokenmill.text import ExpansionTable, StochasTok
from tokenmill.text import _splitting as splitting

TABLE = ExpansionTable.from_list(TOY)


def enumerated(
    ids: list[int], attempts: int, proposals: int, most: int | None, protected: frozenset[int]
) -> dict[State, Fraction]:
    """The law of the vectorised code over all draws of one block; what it leaves over goes on by the exact law."""
    n, picks = len(ids), 2
    slots = list(product(*(range(n + t) for t in range(proposals)), *(range(picks) for _ in range(proposals))))
    rows = np.array(slots, dtype=np.int64)  # (R, 2 J)
    count = len(rows)
    drawn = splitting.Drawn(
        np.full(count, proposals),
        rows[:, :proposals].ravel(),
        np.ones(count * proposals, dtype=bool),
        rows[:, proposals:].ravel().astype(np.uint64),
    )
    leaves = splitting.Leaves(np.tile(ids, count), np.arange(count * n), np.full(count, n))
    cover = np.tile([i in protected for i in range(n)], count) if protected else None
    allowed = np.full(count, 99 if most is None else most)
    after, spent, won = splitting.settle(TABLE, leaves, drawn, np.full(count, attempts), allowed, cover)
    ends = np.cumsum(after.lengths)
    outcomes: Counter[tuple[State, int, int]] = Counter()
    for end, length, used, made in zip(*(x.tolist() for x in (ends, after.lengths, spent, won)), strict=True):
        part = slice(end - length, end)
        state = tuple(zip(after.ids[part].tolist(), (after.sources[part] % n).tolist(), strict=True))
        outcomes[state, used, made] += 1
    law: dict[State, Fraction] = {}
    for (state, used, made), times in outcomes.items():
        left = None if most is None else most - made
        sources = [source for _, source in state]
        rest = exact_law(TABLE, state, attempts - used, left, protected)
        assert sources == sorted(sources)
        for one, mass in rest.items():
            law[one] = law.get(one, Fraction(0)) + mass * Fraction(times, count)
    return law


@pytest.mark.prop("stochastok", 4)
@pytest.mark.parametrize(
    ("ids", "attempts", "proposals", "most", "protected"),
    [
        ([3], 1, 1, None, ()),
        ([3], 2, 3, None, ()),
        ([3], 3, 4, None, ()),
        ([3, 2], 3, 4, None, ()),
        ([5, 3, 4], 3, 3, None, ()),
        ([3, 0], 3, 4, 1, ()),
        ([3, 2], 3, 3, 2, ()),
        ([3, 3], 3, 4, None, (1,)),
    ],
)
def test_all_draws_together_have_the_exact_law(
    ids: list[int], attempts: int, proposals: int, most: int | None, protected: tuple[int, ...]
) -> None:
    cover = frozenset(protected)
    assert enumerated(ids, attempts, proposals, most, cover) == exact_law(TABLE, start(ids), attempts, most, cover)


@pytest.mark.prop("stochastok", 4)
@pytest.mark.parametrize(
    ("tokens", "ids", "p", "samples"),
    [
        (TOY, [3], 3.0, 200_000),
        (TOY, [3, 2], 1.5, 200_000),
        (TOY, [3, 0, 5, 2, 3], 0.61, 100_000),
        (RUNS, [4], 9.0, 100_000),  # more attempts than a block of one token holds
        (RUNS, [3, 3], 7.0, 50_000),
    ],
)
def test_samples_have_the_exact_law(tokens: list[bytes | None], ids: list[int], p: float, samples: int) -> None:
    table = ExpansionTable.from_list(tokens)
    law = {
        tuple(token for token, _ in state): mass
        for state, mass in exact_law(table, start(ids), int(p * len(ids))).items()
    }
    merged: Counter[tuple[int, ...]] = Counter()
    for state, mass in exact_law(table, start(ids), int(p * len(ids))).items():
        merged[tuple(token for token, _ in state)] += mass  # type: ignore[assignment]
    made = StochasTok(table, p=p, seed=5).expand_batch([ids] * samples)
    seen = Counter(tuple(row.tolist()) for row in made.input_ids)
    assert set(seen) <= set(law)
    rare = [key for key, mass in merged.items() if mass * samples < 5]
    expected = [float(mass) * samples for key, mass in merged.items() if key not in rare]
    found = [seen[key] for key in merged if key not in rare]
    if rare:
        expected.append(float(sum(merged[key] for key in rare)) * samples)
        found.append(sum(seen[key] for key in rare))
    test: Any = stats.chisquare(found, expected)
    assert test.pvalue > 1e-3


@pytest.mark.parametrize(("n", "p", "most"), [(37, 0.5, None), (101, 2.0, None), (64, 1.0, 20)])
def test_it_does_what_the_loop_does(n: int, p: float, most: int | None) -> None:
    table = ExpansionTable.from_tokenizer(python_target())
    ids = np.random.default_rng(n).choice(np.flatnonzero(table.splittable), n).tolist()
    rng, times = random.Random(n), 600
    twin = [loop(table, ids, p, rng, most) for _ in range(times)]
    ours = [
        row.tolist() for row in StochasTok(table, p=p, max_num_to_expand=most).expand_batch([ids] * times).input_ids
    ]
    for statistic in (
        len,
        lambda row: int(sum(table.lengths[row] == 1)),
        lambda row: int(np.argmax(np.array(row) != ids[0])),
    ):
        a, b = [statistic(row) for row in twin], [statistic(row) for row in ours]
        if len(set(a + b)) > 1:
            test: Any = stats.ks_2samp(a, b)
            assert test.pvalue > 1e-3


def test_slots_are_equally_likely_and_unfair_draws_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    top = np.uint64(2**64 - 1)
    monkeypatch.setattr(splitting, "mixed", lambda x: np.full_like(x, top))
    leaves = splitting.Leaves(np.array([0, 0, 0]), np.arange(3), np.array([3]))
    drawn = splitting._draw(leaves, np.array([3]), np.zeros(1, dtype=np.uint64))
    names = 3 + np.arange(len(drawn.fair))
    whole = np.array([2**64 % int(m) == 0 for m in names])
    assert (drawn.fair == whole).all()


def test_keys_differ_between_seeds_epochs_and_examples() -> None:
    keys = [splitting.example_keys(s, e, np.arange(50)) for s in range(20) for e in range(20)]
    assert len(np.unique(np.concatenate(keys))) == 20_000


def test_unfair_proposals_do_not_count_and_neither_do_slots_that_are_not_there() -> None:
    leaves = splitting.Leaves(np.array([3, 0]), np.arange(2), np.array([2]))

    def after(slots: list[int], fair: list[bool]) -> tuple[list[int], int, int]:
        picks = np.zeros(len(slots), dtype=np.uint64)
        drawn = splitting.Drawn(np.array([len(slots)]), np.array(slots), np.array(fair), picks)
        made, spent, won = splitting.settle(TABLE, leaves, drawn, np.array([9]), np.array([9]))
        return made.ids.tolist(), int(spent[0]), int(won[0])

    assert after([0], [True]) == ([0, 4, 0], 1, 1)
    assert after([0], [False]) == ([3, 0], 0, 0)
    assert after([0, 0], [True, False]) == ([0, 4, 0], 1, 1)
    assert after([0, 2], [True, True]) == ([0, 1, 1, 0], 2, 2)
    assert after([0, 2], [False, True]) == ([3, 0], 0, 0), "what an unfair proposal would have made is not there"
    assert after([1, 2, 0], [True, True, True]) == ([0, 4, 0], 2, 1), "a failure makes no slot"
