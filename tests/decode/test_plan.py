from __future__ import annotations

from itertools import combinations
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.decode.test_draft import random_matrix, token_paths
from tokenmill.decode._adjacency import AdjacencyMatrix
from tokenmill.decode._plan import LONGEST_MATCH, Plan, Statistics, agreement, candidates, worth_its_ms

V, K = 9, 4
NOTHING = np.zeros(0, dtype=np.int64)


def random_statistics(random: Random) -> Statistics:
    statistics = Statistics(K)
    for _ in range(random.randrange(30)):
        shares = np.array([[random.random() for _ in range(K)]])
        chain_ranks = [random.randrange(K + 1) for _ in range(random.randrange(2))]
        statistics.saw(shares, [random.randrange(K + 1)], chain_ranks)
        kinds = [random.randrange(3) for _ in range(random.randrange(1, 9))]
        statistics.saw_chain(kinds, random.randrange(len(kinds) + 1), random.randrange(1, 20))
        statistics.saw_step(random.randrange(1, 9), random.uniform(1, 9))
    return statistics


def random_plan(
    random: Random, *, hybrid: bool, depth_limit: int = 40, matrix: AdjacencyMatrix | None = None
) -> tuple[Plan, list[int]]:
    chain = [random.randrange(V) for _ in range(random.randrange(1, 7))] if hybrid else []
    plan = candidates(
        (matrix or random_matrix(random, distinct=True)).rows,
        random_statistics(random),
        random.randrange(V),
        np.array(chain, dtype=np.int64),
        random.randrange(1, 20) if hybrid else 0,
        depth_limit,
    )
    return plan, chain


randoms, hybrids = st.randoms(use_true_random=False), st.booleans()


@given(randoms, hybrids)
def test_children_are_never_likelier_than_their_parents(random: Random, hybrid: bool) -> None:
    plan, _ = random_plan(random, hybrid=hybrid)
    assert plan.chance[0] == 1.0
    assert plan.parent[0] == -1
    assert (plan.chance[1:] < plan.chance[plan.parent[1:]]).all()
    assert (np.diff(plan.depth) >= 0).all()
    assert (plan.depth[1:] == plan.depth[plan.parent[1:]] + 1).all()


@given(randoms, hybrids)
def test_siblings_share_the_chance_of_their_parent(random: Random, hybrid: bool) -> None:
    """Only one token follows, so the chances of what may follow never add up to more."""
    plan, _ = random_plan(random, hybrid=hybrid)
    below = np.zeros(plan.chance.size)
    np.add.at(below, plan.parent[1:], plan.chance[1:])
    assert (below <= plan.chance + 1e-9).all()


@given(randoms, hybrids, st.integers(0, 5))
def test_no_candidate_stands_below_the_depth_limit(random: Random, hybrid: bool, limit: int) -> None:
    plan, _ = random_plan(random, hybrid=hybrid, depth_limit=limit)
    assert int(plan.depth.max()) <= limit


@given(randoms, hybrids)
def test_candidates_come_from_known_rows_and_from_the_chain(random: Random, hybrid: bool) -> None:
    matrix = random_matrix(random, distinct=True)
    plan, chain = random_plan(random, hybrid=hybrid, matrix=matrix)
    paths = token_paths(plan)
    assert len(set(paths)) == len(paths)
    for path in paths[1:]:
        before, token = path[-2:]
        in_row = token in matrix.table[before, : int(matrix.count[before])].tolist()
        assert in_row or list(path[1:]) == chain[: len(path) - 1]


def test_the_chain_of_a_longer_match_is_followed_further() -> None:
    empty, chain = AdjacencyMatrix(V, K).rows, np.array([1, 2, 3, 4, 5, 6, 7, 8])
    depths, sums = [], []
    for matched in (1, 3, LONGEST_MATCH, LONGEST_MATCH + 5):
        plan = candidates(empty, Statistics(K), 0, chain, matched, 40)
        assert token_paths(plan)[-1] == tuple(range(plan.tokens.size))
        depths.append(int(plan.depth.max()))
        sums.append(float(plan.chance.sum()))
    assert depths == sorted(depths)
    assert sums[0] < sums[1] < sums[2] == sums[3]
    assert candidates(empty, Statistics(K), 0, NOTHING, 0, 40).tokens.tolist() == [0]


def test_a_chain_token_that_the_row_has_too_is_one_candidate() -> None:
    matrix = AdjacencyMatrix(V, K)
    matrix.write(torch.tensor([0]), torch.tensor([[5, 6, 7, 8]]), torch.tensor([[3.0, 1.0, 0.0, 0.0]]))
    alone = candidates(matrix.rows, Statistics(K), 0, NOTHING, 0, 1)
    both = candidates(matrix.rows, Statistics(K), 0, np.array([6]), 9, 1)
    chance = [dict(zip(p.tokens.tolist(), p.chance.tolist(), strict=True)) for p in (alone, both)]
    assert both.tokens.tolist().count(6) == 1
    assert chance[1][6] > chance[0][6]
    assert chance[1][5] < chance[0][5]


@given(randoms, hybrids)
def test_the_chosen_part_is_the_best_of_all(random: Random, hybrid: bool) -> None:
    """Brute force over every set of nodes that holds the root and the parents of its members."""
    plan, _ = random_plan(random, hybrid=hybrid)
    small = np.zeros(plan.tokens.size, dtype=bool)
    small[np.argsort(-plan.chance, kind="stable")[:9]] = True
    plan = plan.select(small)
    n = plan.tokens.size
    cost = np.cumsum([1.0] + [random.uniform(-0.05, 0.9) for _ in range(5)]).clip(0.5)
    pace = random.uniform(0.05, 1.5)
    gains = [
        plan.chance[list(members)].sum() - pace * cost[len(members) - 1]
        for size in range(1, min(n, 6) + 1)
        for members in combinations(range(n), size)
        if 0 in members and all(plan.parent[i] in members for i in members if i)
    ]
    best = worth_its_ms(plan, cost, pace)
    assert best.tokens.size <= len(cost)
    assert set(token_paths(best)) <= set(token_paths(plan))
    assert best.chance.sum() - pace * cost[best.tokens.size - 1] == pytest.approx(max(gains), rel=1e-12)


def likely_rows() -> AdjacencyMatrix:
    matrix = AdjacencyMatrix(64, 8)
    successors = (torch.arange(64)[:, None] + torch.arange(1, 9)) % 64
    matrix.write(torch.arange(64), successors, torch.linspace(5, 0, 8).expand(64, 8))
    return matrix


def test_nothing_is_drafted_when_every_further_position_is_dear() -> None:
    plan = candidates(likely_rows().rows, Statistics(8), 3, np.arange(10, 30), 16, 99)
    dear, free = np.concatenate([[1.0], np.full(30, 40.0)]), np.ones(31)
    assert worth_its_ms(plan, dear, 1.0).tokens.tolist() == [3]
    assert worth_its_ms(plan, free, 1.0).tokens.size == 31
    assert worth_its_ms(plan, free[:1], 1.0).tokens.tolist() == [3]


def test_the_faster_the_run_the_choosier_the_plan() -> None:
    plan = candidates(likely_rows().rows, Statistics(8), 3, NOTHING, 0, 99)
    cost = np.arange(1.0, 9.0, 0.2)
    sizes = [worth_its_ms(plan, cost, pace).tokens.size for pace in (0.01, 0.3, 1.0, 10.0)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > sizes[1] > sizes[-1] == 1


def test_the_pace_is_that_of_the_last_steps() -> None:
    statistics = Statistics(K)
    assert statistics.tokens_per_ms(2.0, 8.0) == 0.25
    for _ in range(200):
        statistics.saw_step(3, 2.0)
    assert statistics.tokens_per_ms(2.0, 8.0) == pytest.approx(1.5, abs=0.7)
    slow = statistics.tokens_per_ms(2.0, 8.0)
    for _ in range(200):
        statistics.saw_step(1, 2.0)
    assert statistics.tokens_per_ms(2.0, 8.0) < min(slow, 0.6)


def test_what_was_right_makes_the_next_tree_larger() -> None:
    rows, cost = likely_rows().rows, np.arange(1.0, 9.0, 0.2)

    def size(ranks: list[int]) -> int:
        statistics = Statistics(8)
        statistics.saw(np.tile(rows.shares[:1], (len(ranks), 1)).astype(np.float64), ranks, [])
        return worth_its_ms(candidates(rows, statistics, 3, NOTHING, 0, 99), cost, 0.5).tokens.size

    assert size([0] * 200) > size([]) > size([8] * 200)


def test_statistics_learn_how_often_a_successor_was_right() -> None:
    """After a miss the first one, after a first rank the first and the second alike, after another rank none."""
    statistics = Statistics(2)
    for rank in (0, 0, 1, 2) * 400:
        statistics.saw(np.array([[0.9, 0.08]]), [rank], [])
    matrix = AdjacencyMatrix(V, 2)
    matrix.write(torch.tensor([0]), torch.tensor([[5, 6]]), torch.tensor([[0.9, 0.08]]).log())

    def chances() -> dict[int, float]:
        plan = candidates(matrix.rows, statistics, 0, NOTHING, 0, 1)
        return dict(zip(plan.tokens.tolist(), plan.chance.tolist(), strict=True))

    after_miss = chances()
    assert after_miss[5] > 0.75
    statistics.saw(np.array([[0.9, 0.08]]), [0], [])
    after_first = chances()
    assert after_first[5] == pytest.approx(0.5, abs=0.1)
    assert after_first[6] == pytest.approx(0.5, abs=0.1)
    statistics.saw(np.array([[0.9, 0.08]]), [1], [])
    assert chances().get(5, 0.0) < 0.3
    again = Statistics.from_dict(2, statistics.to_dict())
    assert again.to_dict() == statistics.to_dict() != Statistics(2).to_dict()


def test_successors_beside_a_chain_are_counted_apart() -> None:
    """Where a chain offers one token, the others are right less often than where they stand alone."""
    statistics = Statistics(K)
    shares = np.array([[0.6, 0.2, 0.1, 0.1]])
    for _ in range(300):
        statistics.saw(shares, [0], [])  # alone the first one is right
        statistics.saw(shares, [K], [1])  # beside a chain that offers the second one, nothing is
    matrix = AdjacencyMatrix(V, K)
    matrix.write(torch.tensor([0]), torch.tensor([[5, 6, 7, 8]]), torch.from_numpy(shares).log())
    alone = candidates(matrix.rows, statistics, 0, NOTHING, 0, 1)
    beside = candidates(matrix.rows, statistics, 0, np.array([6]), 1, 1)
    assert float(alone.chance[alone.tokens == 5][0]) > 0.7
    assert float(beside.chance[beside.tokens == 5].sum()) < 0.3


def test_statistics_learn_how_long_a_chain_holds() -> None:
    statistics = Statistics(K)
    before = statistics.by_match()
    for _ in range(2000):
        statistics.saw_chain([2], 0, 1)
        statistics.saw_chain([0] * 5, 5, 4)
    after = statistics.by_match()
    assert after[2, 0] < 0.05 < before[2, 0]
    assert after[0, 4] > 0.95
    assert np.array_equal(after[1], before[1])
    assert (np.diff(after, axis=1) >= 0).all()


def test_agreement_of_a_chain_with_a_row() -> None:
    assert [agreement(rank, K) for rank in range(K + 1)] == [0, 1, 1, 1, 2]


def test_a_chain_behind_a_long_match_is_followed_to_its_end() -> None:
    """An empty matrix knows nothing, so what is offered is the chain, node under node."""
    chain = np.array([5, 9, 2, 7, 1])
    rows = AdjacencyMatrix(16, 4).rows
    plan = candidates(rows, Statistics(4), root=3, chain=chain, matched=LONGEST_MATCH, depth_limit=9)
    assert plan.tokens.tolist() == [3, *chain.tolist()]
    assert plan.parent.tolist() == [-1, 0, 1, 2, 3, 4]
    assert candidates(rows, Statistics(4), 3, chain, LONGEST_MATCH, depth_limit=2).tokens.tolist() == [3, 5, 9]
