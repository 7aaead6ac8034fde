from __future__ import annotations

from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenmill.decode._adjacency import AdjacencyMatrix
from tokenmill.decode._draft import Shape, fill, template_shape
from tokenmill.decode._plan import Plan, best_paths
from tokenmill.decode._tree import Tree, TreeTemplate
from tokenmill.decode.token_recycling import tree_template

V, K = 9, 4
NOTHING = np.zeros(0, dtype=np.int64)


def random_matrix(random: Random, k: int = K, *, distinct: bool = False) -> AdjacencyMatrix:
    """Some rows unknown, some known in part, successors repeated unless ``distinct``."""
    matrix = AdjacencyMatrix(V, k)
    for token in range(V):
        row = random.sample(range(V), k) if distinct else [random.randrange(V) for _ in range(k)]
        shares = sorted((random.random() for _ in range(k)), reverse=True)
        matrix.write(torch.tensor([token]), torch.tensor([row]), torch.tensor([shares]).log())
        matrix.count[token] = random.choice([0, 1, k, k, k])
    return matrix


def token_paths(plan: Plan) -> list[tuple[int, ...]]:
    ancestors = Tree.from_parents(torch.from_numpy(plan.parent)).ancestors
    return [tuple(plan.tokens[row.numpy()].tolist()) for row in ancestors]


randoms, hybrids = st.randoms(use_true_random=False), st.booleans()


@given(st.integers(1, 8), st.integers(0, 100))
def test_best_paths_form_a_template(k: int, n: int) -> None:
    paths = best_paths(k, n)
    template = TreeTemplate(paths)  # checks order, prefixes and duplicates
    assert len(paths) == n or k == 1
    assert template.max_rank < k


def naive_paths(shape: Shape, matrix: AdjacencyMatrix, root: int, chain: list[int], limit: int) -> set[tuple[int, ...]]:
    """Token paths of all nodes, from one recursive walk a node."""

    def path(node: int) -> tuple[int, ...] | None:
        if shape.parent[node] < 0:
            return (root,)
        above = path(int(shape.parent[node]))
        rank, depth = int(shape.rank[node]), int(shape.depth[node])
        if above is None or depth > limit:
            return None
        if rank < 0:
            return (*above, chain[depth - 1]) if depth <= len(chain) else None
        known = int(matrix.count[above[-1]])
        return (*above, int(matrix.table[above[-1], rank])) if rank < known else None

    return {p for p in map(path, range(len(shape.parent))) if p is not None}


@pytest.mark.prop("token-recycling", 6)
@given(randoms, st.sampled_from([0, 7, 32, 80]), hybrids, st.integers(0, 9))
def test_filling_equals_a_naive_expansion(random: Random, nodes: int, hybrid: bool, limit: int) -> None:
    template, k = (tree_template("2.2.2"), 8) if nodes == 80 else (TreeTemplate(best_paths(K, nodes)), K)
    shape, matrix = template_shape(template, 4 if hybrid else 0), random_matrix(random, k)
    chain = [random.randrange(V) for _ in range(random.randrange(6))] if hybrid else []
    root = random.randrange(V)
    plan = fill(shape, matrix.rows, root, np.array(chain, dtype=np.int64), limit)
    paths = token_paths(plan)
    assert len(set(paths)) == len(paths), "equal siblings were not merged"
    assert set(paths) == naive_paths(shape, matrix, root, chain, limit)
    assert plan.depth.tolist() == [len(p) - 1 for p in paths] == sorted(plan.depth.tolist())


@pytest.mark.prop("token-recycling", 6)
def test_full_rows_fill_every_node_of_the_official_tree() -> None:
    matrix, template = AdjacencyMatrix(200, 8), tree_template("2.2.2")
    matrix.update(torch.arange(200), torch.randn(200, 200, generator=torch.Generator().manual_seed(0)))
    plan = fill(template_shape(template), matrix.rows, 5, NOTHING, 99)
    assert plan.parent.tolist() == template.parent.tolist()
    for node, path in enumerate(template.paths, 1):
        token = 5
        for rank in path:
            token = int(matrix.table[token, rank])
        assert plan.tokens[node] == token


def test_nothing_is_drafted_from_rows_that_were_never_written() -> None:
    plan = fill(template_shape(tree_template("2.2.2")), AdjacencyMatrix(V, 8).rows, 3, NOTHING, 99)
    assert plan.tokens.tolist() == [3]


def test_a_chain_joins_the_template_and_shares_its_nodes() -> None:
    matrix = AdjacencyMatrix(V, K)
    matrix.write(torch.tensor([0, 1]), torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]]), torch.zeros(2, K))
    shape = template_shape(TreeTemplate([(0,), (0, 0)]), spine=3)
    plan = fill(shape, matrix.rows, 0, np.array([1, 6, 2]), 99)
    assert sorted(token_paths(plan)) == [(0,), (0, 1), (0, 1, 5), (0, 1, 6), (0, 1, 6, 2)]
