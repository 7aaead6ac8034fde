from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenmill.decode._tree import Tree, TreeTemplate, repeated_siblings, verify
from tokenmill.decode.token_recycling import TREES, tree_template
from tokenmill.errors import LimitError

NAMES = [name for name in TREES if name != "auto"]


@st.composite
def parents(draw: st.DrawFn, most: int = 30) -> list[int]:
    """Parents of a random tree, nodes sorted by depth."""
    levels, parent = [[0]], [-1]
    for width in draw(st.lists(st.integers(1, 8), max_size=6)):
        width = min(width, most - len(parent))
        if width < 1:
            break
        above = levels[-1]
        parent += draw(st.lists(st.sampled_from(above), min_size=width, max_size=width))
        levels.append(list(range(len(parent) - width, len(parent))))
    return parent


def walk_up(parent: Sequence[int], node: int) -> list[int]:
    path = [node]
    while parent[path[-1]] >= 0:
        path.append(parent[path[-1]])
    return path[::-1]


def walk_down(parent: Sequence[int], tokens: Sequence[int], chosen: Sequence[int]) -> list[int]:
    """From the root to the first child that carries the chosen token, until there is none."""
    path = [0]
    while True:
        here = path[-1]
        fitting = [i for i, p in enumerate(parent) if p == here and tokens[i] == chosen[here]]
        if not fitting:
            return path
        path.append(fitting[0])


@pytest.mark.prop("token-recycling", 6)
@given(parents())
def test_ancestors_are_the_reflexive_transitive_closure_of_parent(parent: list[int]) -> None:
    tree = Tree.from_parents(torch.tensor(parent))
    expected = torch.zeros(len(parent), len(parent), dtype=torch.bool)
    for node in range(len(parent)):
        expected[node, walk_up(parent, node)] = True
    assert torch.equal(tree.ancestors, expected)
    assert torch.equal(tree.ancestors.sum(1), tree.depth + 1)
    assert torch.equal(tree.ancestors, tree.ancestors.tril())
    assert tree.depth.tolist() == [len(walk_up(parent, node)) - 1 for node in range(len(parent))]
    for depth in range(int(tree.depth.max()) + 1):
        level = (tree.depth == depth).nonzero().squeeze(1)
        assert tree.paths_to(level).tolist() == [walk_up(parent, int(node)) for node in level]


@pytest.mark.prop("token-recycling", 7)
@settings(max_examples=300)
@given(parents(), st.randoms(use_true_random=False))
def test_verification_equals_a_walk_from_the_root(parent: list[int], random) -> None:
    tokens, chosen = ([random.randrange(2) for _ in parent] for _ in range(2))
    tree = Tree.from_parents(torch.tensor(parent))
    assert verify(tree, torch.tensor(tokens), torch.tensor(chosen)).tolist() == walk_down(parent, tokens, chosen)


@given(parents(), st.randoms(use_true_random=False))
def test_only_the_first_of_equal_siblings_may_be_accepted(parent: list[int], random) -> None:
    tokens = [random.randrange(2) for _ in parent]
    tree = Tree.from_parents(torch.tensor(parent))
    expected = [any(parent[j] == parent[i] and tokens[j] == tokens[i] for j in range(i)) for i in range(len(parent))]
    assert repeated_siblings(tree, torch.tensor(tokens)).tolist() == expected


def test_the_second_twin_is_not_taken_even_when_its_child_would_fit() -> None:
    tree = Tree.from_parents(torch.tensor([-1, 0, 0, 1, 2]))
    tokens, chosen = torch.tensor([9, 4, 4, 5, 6]), torch.tensor([4, 6, 6, 0, 0])
    assert verify(tree, tokens, chosen).tolist() == [0, 1]


@given(parents(), st.randoms(use_true_random=False))
def test_a_selected_sub_tree_keeps_its_shape(parent: list[int], random) -> None:
    tree = Tree.from_parents(torch.tensor(parent))
    chosen: set[int] = {0}
    for node in range(1, len(parent)):
        if parent[node] in chosen and random.random() < 0.6:
            chosen.add(node)
    keep = torch.zeros(len(parent), dtype=torch.bool)
    keep[sorted(chosen)] = True
    part = tree.select(keep)
    number = {old: new for new, old in enumerate(sorted(chosen))}
    rebuilt = Tree.from_parents(torch.tensor([number.get(parent[i], -1) for i in sorted(chosen)]))
    assert torch.equal(part.parent, rebuilt.parent)
    assert torch.equal(part.depth, rebuilt.depth)
    assert torch.equal(part.ancestors, rebuilt.ancestors)


def test_the_official_template_has_80_nodes_in_the_papers_levels() -> None:
    template = tree_template("2.2.2")
    assert len(template) == 80
    assert [s.stop - s.start for s in template.level_slices] == [8, 21, 25, 15, 8, 3]
    assert template.paths[:8] == tuple((r,) for r in range(8))
    assert template.paths[-3:] == ((0,) * 6, (0, 0, 0, 0, 0, 1), (0, 0, 0, 1, 0, 0))
    assert template.max_rank == 7


@pytest.mark.prop("token-recycling", 6)
@pytest.mark.parametrize("name", NAMES)
def test_templates_describe_their_paths(name: str) -> None:
    template = tree_template(name)
    assert len(template) == (80 if name == "2.2.2" else int(name))
    assert template.parent.shape == template.depth.shape == template.child_rank.shape == (len(template) + 1,)
    for i, path in enumerate(template.paths, 1):
        nodes = walk_up(template.parent.tolist(), i)
        assert tuple(template.child_rank[nodes[1:]].tolist()) == path
    flat = [i for s in template.level_slices for i in range(s.start, s.stop)]
    assert flat == list(range(1, len(template) + 1))
    for depth, s in enumerate(template.level_slices, 1):
        assert bool((template.depth[s] == depth).all())
    assert torch.equal(template.ancestor_mask, Tree.from_parents(template.parent).ancestors)


@pytest.mark.parametrize("name", NAMES)
def test_leaf_paths_run_from_the_root_to_every_leaf(name: str) -> None:
    template = tree_template(name)
    parent = template.parent.tolist()
    leaves = [i for i in range(len(parent)) if i not in parent]
    deepest = int(template.depth.max())
    expected = [path + [-1] * (deepest + 1 - len(path)) for path in (walk_up(parent, leaf) for leaf in leaves)]
    assert template.leaf_paths.tolist() == expected


def test_smaller_templates_are_deep_rather_than_wide() -> None:
    """The first eight nodes of the official tree would all have depth 1, which helps nobody."""
    assert [int(tree_template(name).depth.max()) for name in ("5", "7", "15")] >= [3, 3, 4]
    for small, large in (("5", "7"), ("7", "15"), ("15", "32")):
        assert set(tree_template(small).paths) <= set(tree_template(large).paths)


@pytest.mark.parametrize(
    ("paths", "value", "limit"),
    [
        ([(0,), (0, 0), (1,)], "(1,)", "sorted by depth"),
        ([(0,), (1, 0)], "(1, 0)", "closed under prefixes"),
        ([(0,), (1,), (0,)], "(0,)", "given once"),
        ([(0,), (-1,)], "(-1,)", "ranks >= 0"),
        ([()], "()", "non-empty"),
    ],
)
def test_malformed_templates_are_refused(paths: list[tuple[int, ...]], value: str, limit: str) -> None:
    with pytest.raises(LimitError) as refused:
        TreeTemplate(paths)
    assert value in str(refused.value)
    assert limit in str(refused.value)


def test_an_unknown_tree_is_answered_with_the_known_ones() -> None:
    with pytest.raises(LimitError, match=r"2\.2\.3.*Did you mean 2\.2\.2"):
        tree_template("2.2.3")
