"""Drafts that branch: trees of tokens, and the longest path through one that the target agrees with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from tokenmill.errors import LimitError

Path = tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Tree:
    """The shape of a draft: node 0 is the root (the last committed token), parents come before children.

    Attributes:
        parent: (N,) int64, -1 for the root.
        depth: (N,) int64, 0 for the root, ascending.
        ancestors: (N, N) bool, row i true at i and at all its ancestors; lower-triangular.
    """

    parent: Tensor
    depth: Tensor
    ancestors: Tensor

    @classmethod
    def from_parents(cls, parent: Tensor) -> Tree:
        """Build a tree from ``parent`` (N,) int64; nodes must be sorted by depth."""
        n = parent.shape[0]
        # Doubling: after step i each row knows its ancestors up to 2^i levels up.
        link = torch.eye(n, dtype=torch.float32, device=parent.device)
        link[torch.arange(1, n, device=parent.device), parent[1:]] = 1.0
        reach = link
        while True:
            further = (reach @ reach).clamp_(max=1.0)
            if torch.equal(further, reach):
                break
            reach = further
        ancestors = reach > 0
        return cls(parent, ancestors.sum(1) - 1, ancestors)

    @classmethod
    def root(cls, device: torch.device | str = "cpu") -> Tree:
        """The draft of plain decoding: nothing but the root."""
        return cls.from_parents(torch.tensor([-1], device=device))

    def __len__(self) -> int:
        return self.parent.shape[0]

    def select(self, keep: Tensor) -> Tree:
        """The sub-tree of the nodes where ``keep`` (N,) bool holds; it must be closed under parents."""
        index = keep.nonzero().squeeze(1)
        renumber = keep.cumsum(0) - 1
        old = self.parent[index]
        parent = torch.where(old < 0, old, renumber[old.clamp(min=0)])
        return Tree(parent, self.depth[index], self.ancestors[index][:, index])

    def to(self, device: torch.device | str) -> Tree:
        return Tree(self.parent.to(device), self.depth.to(device), self.ancestors.to(device))

    def paths_to(self, nodes: Tensor) -> Tensor:
        """The nodes from the root to each of ``nodes`` (M,), all of one depth d: (M, d + 1) int64."""
        return self.ancestors[nodes].nonzero()[:, 1].view(nodes.shape[0], -1)


@dataclass(frozen=True)
class TreeTemplate:
    """An unbalanced tree given by the child ranks on the way from the root to each node.

    Args:
        paths: for instance ``[(0,), (1,), (0, 0)]``; the root is implied.

    Attributes:
        tree: the shape, root included.
        parent, depth, ancestor_mask: the tree's tensors.
        child_rank: (n + 1,) int64, which of its parent's successors a node takes; 0 at the root.
        level_slices: one slice of nodes for each depth from 1 on.
        leaf_paths: (P, D + 1) int64, nodes from the root to each leaf, padded with -1.

    Raises:
        LimitError: a path whose prefix is missing, a duplicate, a negative rank, or paths not sorted by depth.
    """

    paths: tuple[Path, ...]
    tree: Tree = field(init=False, compare=False, repr=False)
    child_rank: Tensor = field(init=False, compare=False, repr=False)
    level_slices: tuple[slice, ...] = field(init=False, compare=False, repr=False)
    leaf_paths: Tensor = field(init=False, compare=False, repr=False)

    def __init__(self, paths: Sequence[Sequence[int]]) -> None:
        nodes = tuple(tuple(p) for p in paths)
        _check(nodes)
        number = {(): 0} | {p: i for i, p in enumerate(nodes, 1)}
        parent = torch.tensor([-1] + [number[p[:-1]] for p in nodes])
        tree = Tree.from_parents(parent)
        deepest = int(tree.depth[-1])
        first = torch.searchsorted(tree.depth, torch.arange(1, deepest + 2)).tolist()
        leaves = sorted(set(nodes) - {p[:-1] for p in nodes}, key=lambda p: number[p]) or [()]
        walks = [[number[p[:d]] for d in range(len(p) + 1)] + [-1] * (deepest - len(p)) for p in leaves]
        object.__setattr__(self, "paths", nodes)
        object.__setattr__(self, "tree", tree)
        object.__setattr__(self, "child_rank", torch.tensor([0] + [p[-1] for p in nodes]))
        object.__setattr__(self, "level_slices", tuple(slice(a, b) for a, b in pairwise(first)))
        object.__setattr__(self, "leaf_paths", torch.tensor(walks))

    @property
    def parent(self) -> Tensor:
        return self.tree.parent

    @property
    def depth(self) -> Tensor:
        return self.tree.depth

    @property
    def ancestor_mask(self) -> Tensor:
        return self.tree.ancestors

    @property
    def max_rank(self) -> int:
        """The highest child rank, -1 for a bare root."""
        return max((r for p in self.paths for r in p), default=-1)

    def __len__(self) -> int:
        """Nodes without the root."""
        return len(self.paths)


def _check(paths: tuple[Path, ...]) -> None:
    where = "TreeTemplate"
    known: set[Path] = {()}
    depth = 0
    for path in paths:
        if not path or min(path) < 0:
            raise LimitError(where, "path", path, "a non-empty tuple of ranks >= 0", "The root is implied.")
        if len(path) < depth:
            raise LimitError(where, "path", path, f"sorted by depth (a path of {depth} ranks came before)", "Sort it.")
        if path in known:
            raise LimitError(where, "path", path, "given once", "Remove the duplicate.")
        if path[:-1] not in known:
            raise LimitError(where, "path", path, f"closed under prefixes, {path[:-1]} is missing", "Add the prefix.")
        known.add(path)
        depth = len(path)


def repeated_siblings(tree: Tree, tokens: Tensor) -> Tensor:
    """(N,) bool, true where an earlier child of the same parent carries the same token.

    Only the first of such twins may be accepted: choosing between them by what comes later would bend the law of
    a sampled output.
    """
    same = (tree.parent[:, None] == tree.parent) & (tokens[:, None] == tokens)
    return same.tril(-1).any(1)


def verify(tree: Tree, tokens: Tensor, chosen: Tensor) -> Tensor:
    """The path that the target takes through a draft.

    Args:
        tree: N nodes.
        tokens: (N,) int64, the token of each node.
        chosen: (N,) int64, the token that the target emits after each node (its argmax, or one draw from its law).

    Returns:
        (A,) int64, the accepted nodes from the root down, A >= 1. What is emitted is ``chosen[nodes]``: the tokens
        of the accepted nodes behind the root, and one that the target adds.
    """
    agrees = tokens == chosen[tree.parent.clamp(min=0)]
    agrees &= ~repeated_siblings(tree, tokens)
    agrees[0] = True
    accepted = ~(tree.ancestors & ~agrees[None, :]).any(1)
    last = torch.where(accepted, tree.depth, -1).argmax()
    return tree.ancestors[last].nonzero().squeeze(1)
