from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenmill.decode._adjacency import AdjacencyMatrix
from tokenmill.decode._draft import fill, template_draft
from tokenmill.decode._plan import (
    Draft,
    Statistics,
    best_paths,
    choose,
    draft_tree,
    expected_hits,
    subset,
    universe,
)
from tokenmill.decode._tree import TreeTemplate
from tokenmill.decode.token_recycling import tree_template

V, K = 9, 4


def counted(random, k: int = K) -> Statistics:
    """Statistics after a random history."""
    statistics = Statistics(k)
    statistics.saw_ranks([random.randrange(k + 1) for _ in range(random.randrange(40))])
    for _ in range(random.randrange(20)):
        seen = random.randrange(1, 9)
        statistics.saw_chain(random.randrange(1, 20), random.randrange(seen + 1), seen)
    return statistics


def hits_of(random, *, spine: int, copies: int, paths: int, depth_limit: int = 40) -> tuple:
    nodes = universe(K, spine, copies, paths)
    ranks = np.array([random.randrange(K + 1) for _ in range(copies)])
    matched = random.randrange(0, 20) if spine else 0
    return nodes, expected_hits(nodes, counted(random), matched=matched, chain_ranks=ranks, depth_limit=depth_limit)


@given(st.randoms(use_true_random=False), st.sampled_from([(0, 1), (6, 3), (3, 4)]))
def test_children_are_never_likelier_than_their_parents(random, shape: tuple[int, int]) -> None:
    nodes, hits = hits_of(random, spine=shape[0], copies=shape[1], paths=30)
    assert hits[0] == 1.0
    assert (hits >= 0).all()
    assert (hits[1:] <= hits[nodes.parent[1:]] + 1e-12).all()


@given(st.randoms(use_true_random=False), st.sampled_from([(0, 1), (6, 3)]))
def test_the_children_of_a_node_are_right_at_most_as_often_as_the_node(random, shape: tuple[int, int]) -> None:
    """Only one token follows: the chances of siblings are chances of different tokens."""
    nodes, hits = hits_of(random, spine=shape[0], copies=shape[1], paths=30)
    below = np.zeros(len(hits))
    np.add.at(below, nodes.parent[1:], hits[1:])
    assert (below <= hits * 1.05 + 1e-9).all()


@given(st.randoms(use_true_random=False), st.integers(0, 5))
def test_nodes_beyond_the_depth_limit_are_not_expected(random, limit: int) -> None:
    nodes, hits = hits_of(random, spine=6, copies=3, paths=30, depth_limit=limit)
    assert (hits[nodes.depth > limit] == 0).all()
    draft = choose(nodes, hits, np.ones(20))
    assert int(draft.depth.max()) <= limit


def test_the_chain_of_a_long_match_is_expected_and_without_one_it_is_not() -> None:
    nodes = universe(K, 6, 3, 30)
    ranks, spine = np.full(3, K), nodes.leaves == nodes.depth
    without = expected_hits(nodes, Statistics(K), matched=0, chain_ranks=ranks, depth_limit=40)
    assert (without[spine & (nodes.first < 0)][1:] == 0).all()
    short, long = (expected_hits(nodes, Statistics(K), matched=m, chain_ranks=ranks, depth_limit=40) for m in (1, 16))
    on_chain = (nodes.first < 0) & (nodes.depth > 0)
    assert (long[on_chain] > short[on_chain]).all()


def closed(nodes, chosen: set[int]) -> bool:
    return 0 in chosen and all(nodes.parent[i] < 0 or nodes.parent[i] in chosen for i in chosen)


@given(st.randoms(use_true_random=False), st.booleans())
def test_the_chosen_tree_is_the_best_of_all(random, hybrid: bool) -> None:
    """Brute force over every set of nodes that holds the root and the parents of its members."""
    spine, copies, paths = (2, 2, 3) if hybrid else (0, 1, 8)
    nodes, hits = hits_of(random, spine=spine, copies=copies, paths=paths)
    n = len(hits)
    cost = np.cumsum([1.0] + [random.uniform(-0.05, 0.9) for _ in range(5)]).clip(0.5)
    rates = {
        members: hits[list(members)].sum() / cost[len(members) - 1]
        for size in range(1, 7)
        for members in combinations(range(n), size)
        if closed(nodes, set(members))
    }
    draft = choose(nodes, hits, cost)
    size = draft.parent.shape[0]
    assert size <= len(cost)
    # The draft does not say which nodes of the universe it holds, so it is looked up by its shape.
    chosen = [
        members
        for members in rates
        if len(members) == size
        and np.array_equal(subset(nodes, np.array(members)).parent, draft.parent)
        and np.array_equal(subset(nodes, np.array(members)).rank, draft.rank)
    ]
    assert chosen, "the draft is not closed under parents"
    assert max(rates[m] for m in chosen) == pytest.approx(max(rates.values()), rel=1e-9)


def test_no_node_is_drafted_when_every_further_position_is_dear() -> None:
    nodes, statistics = universe(8, 24, 4, 64), Statistics(8)
    statistics.saw_ranks([0] * 30)
    hits = expected_hits(nodes, statistics, matched=16, chain_ranks=np.full(4, 8), depth_limit=99)
    dear = np.concatenate([[1.0], np.full(30, 40.0)])
    assert choose(nodes, hits, dear).parent.tolist() == [-1]
    cheap = np.full(31, 1.0)
    assert choose(nodes, hits, cheap).parent.shape[0] == 31


def test_what_was_right_moves_the_next_tree() -> None:
    nodes, cost = universe(8, 0, 1, 80), 1 + 0.12 * np.arange(40)

    def size(ranks: list[int]) -> int:
        statistics = Statistics(8)
        statistics.saw_ranks(ranks)
        hits = expected_hits(nodes, statistics, matched=0, chain_ranks=np.full(1, 8), depth_limit=99)
        return choose(nodes, hits, cost).parent.shape[0]

    assert size([0] * 200) > size([]) > size([8] * 200)


def test_statistics_learn_which_rank_follows_which() -> None:
    statistics = Statistics(K)
    statistics.saw_ranks([0, 0, 2, K] * 400)  # a first rank is followed by 0 and 2 alike, another rank by a miss
    after_miss, after_first, after_other = statistics.successor()
    assert after_miss[0] > 0.8
    assert after_first[0] == pytest.approx(0.5, abs=0.1)
    assert after_first[2] == pytest.approx(0.5, abs=0.1)
    assert after_other.sum() < 0.25 < Statistics(K).successor()[2].sum()
    again = Statistics.from_dict(K, statistics.to_dict())
    assert (again.successor() == statistics.successor()).all()


def test_statistics_learn_how_long_a_chain_holds() -> None:
    statistics = Statistics(K)
    before = statistics.continuation()
    for _ in range(300):
        statistics.saw_chain(1, 0, 5)
        statistics.saw_chain(4, 5, 5)
    after = statistics.continuation()
    assert after[0] < 0.05 < before[0]
    assert after[4] > 0.95
    assert (np.diff(after) >= 0).all()


@given(st.integers(1, 8), st.integers(0, 100))
def test_best_paths_form_a_template(k: int, n: int) -> None:
    paths = best_paths(k, n, 16)
    template = TreeTemplate(paths)  # checks order, prefixes and duplicates
    assert len(template) == min(n, len(paths))
    assert len(paths) == n or k == 1
    assert template.max_rank < k


def naive_paths(draft: Draft, matrix: AdjacencyMatrix, root: int, chain: list[int]) -> set[tuple[int, ...]]:
    """Token paths of all nodes, from one recursive walk a node."""

    def path(node: int) -> tuple[int, ...] | None:
        if draft.parent[node] < 0:
            return (root,)
        above = path(int(draft.parent[node]))
        if above is None:
            return None
        rank, depth = int(draft.rank[node]), int(draft.depth[node])
        if rank < 0:
            return (*above, chain[depth - 1]) if depth <= len(chain) else None
        known = int(matrix.count[above[-1]])
        return (*above, int(matrix.table[above[-1], rank])) if rank < known else None

    return {p for p in map(path, range(len(draft.parent))) if p is not None}


def token_paths(tokens: torch.Tensor, tree) -> list[tuple[int, ...]]:
    return [tuple(tokens[row].tolist()) for row in tree.ancestors]


@pytest.mark.prop("token-recycling", 6)
@given(st.randoms(use_true_random=False), st.sampled_from(["0", "7", "32", "official", "planned"]), st.booleans())
def test_filling_equals_a_naive_expansion(random, name: str, hybrid: bool) -> None:
    k = 8 if name == "official" else K
    if name == "planned":
        nodes, hits = hits_of(random, spine=5, copies=3, paths=20)
        draft = choose(nodes, hits, 1 + 0.01 * np.arange(20))
    else:
        template = tree_template("2.2.2") if name == "official" else TreeTemplate(best_paths(K, int(name)))
        draft = template_draft(template, 4 if hybrid else 0)
    matrix = AdjacencyMatrix(V, k)
    for token in range(V):  # some rows unknown, some half known, some with a repeated successor
        matrix.count[token] = random.choice([0, 1, k, k])
        matrix.table[token] = torch.tensor([random.randrange(V) for _ in range(k)])
    chain = [random.randrange(V) for _ in range(random.randrange(6))]
    root = random.randrange(V)
    tokens, tree = fill(draft, matrix, root, np.array(chain, dtype=np.int64))
    paths = token_paths(tokens, tree)
    assert len(set(paths)) == len(paths), "equal siblings were not merged"
    assert set(paths) == naive_paths(draft, matrix, root, chain)
    assert tree.depth.tolist() == sorted(tree.depth.tolist())


@pytest.mark.prop("token-recycling", 6)
def test_full_rows_fill_every_node_of_the_official_tree() -> None:
    matrix, template = AdjacencyMatrix(200, 8), tree_template("2.2.2")
    generator = torch.Generator().manual_seed(0)
    matrix.update(torch.arange(200), torch.randn(200, 200, generator=generator))
    tokens, tree = fill(template_draft(template), matrix, 5, np.zeros(0, dtype=np.int64))
    assert torch.equal(tree.parent, template.parent)
    for node, path in enumerate(template.paths, 1):
        token = 5
        for rank in path:
            token = int(matrix.table[token, rank])
        assert tokens[node] == token


def test_nothing_is_drafted_from_rows_that_were_never_written() -> None:
    tokens, tree = fill(template_draft(tree_template("2.2.2")), AdjacencyMatrix(V, 8), 3, np.zeros(0, dtype=np.int64))
    assert tokens.tolist() == [3]
    assert len(tree) == 1


def test_a_chain_joins_the_template_and_shares_its_nodes() -> None:
    matrix = AdjacencyMatrix(V, K)
    matrix.write(torch.tensor([0, 1]), torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]]))
    draft = template_draft(TreeTemplate([(0,), (0, 0)]), spine=3)
    tokens, tree = fill(draft, matrix, 0, np.array([1, 6, 2]))
    assert sorted(token_paths(tokens, tree)) == [(0,), (0, 1), (0, 1, 5), (0, 1, 6), (0, 1, 6, 2)]


def test_a_part_of_a_draft_keeps_parents_ranks_and_depths() -> None:
    draft = template_draft(tree_template("7"), 3)
    part = subset(draft, np.flatnonzero(draft.depth <= 2))
    assert (part.depth <= 2).all()
    assert part.parent[0] == -1
    tree = draft_tree(part)
    assert tree.depth.tolist() == part.depth.tolist()
    assert sorted(part.rank.tolist()) == sorted(draft.rank[draft.depth <= 2].tolist())
