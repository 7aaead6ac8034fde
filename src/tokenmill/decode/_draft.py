"""A tree template, filled with tokens from the state."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from tokenmill.decode._plan import Ints, Plan, Rows
from tokenmill.decode._tree import TreeTemplate


@dataclass(frozen=True, slots=True, eq=False)
class Shape:
    """Nodes to be filled, sorted by depth.

    Attributes:
        parent: (N,) int64, -1 at the root.
        rank: (N,) int64, which successor of its parent a node takes; -1 for a node of the n-gram chain.
        depth: (N,) int64.
    """

    parent: Ints
    rank: Ints
    depth: Ints


def template_shape(template: TreeTemplate, spine: int = 0) -> Shape:
    """The nodes of a template, and beside them a chain of ``spine`` nodes for n-gram continuations."""
    parent, depth, rank = template.parent.numpy(), template.depth.numpy(), template.child_rank.numpy().copy()
    rank[0] = -1
    n, chain = len(parent), np.arange(spine)
    parent = np.concatenate([parent, np.where(chain == 0, 0, n + chain - 1)])
    depth = np.concatenate([depth, chain + 1])
    rank = np.concatenate([rank, np.full(spine, -1)])
    order = np.argsort(depth, kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(order.size)
    parent = np.where(parent[order] < 0, -1, place[np.maximum(parent[order], 0)])
    return Shape(parent, rank[order], depth[order])


def fill(shape: Shape, rows: Rows, root: int, chain: Ints, depth_limit: int) -> Plan:
    """Give each node its token, level by level.

    Nodes whose row is not known, chain nodes behind the end of ``chain`` and nodes below ``depth_limit`` are left
    out with what hangs from them. Siblings that carry the same token become one node with the children of both.

    Args:
        shape: N nodes.
        rows: the adjacency matrix.
        root: the last committed token.
        chain: (C,) n-gram continuation of the root.
        depth_limit: of the nodes that are kept.
    """
    n, vocabulary = shape.parent.shape[0], rows.table.shape[0]
    tokens = np.full(n, root, dtype=np.int64)
    valid = np.ones(n, dtype=bool)
    same = np.arange(n)  # the node that stands for this one
    edges = np.searchsorted(shape.depth, np.arange(1, int(shape.depth[-1]) + 2))
    for depth, (start, end) in enumerate(pairwise(edges), 1):
        at = np.arange(start, end)
        parent, rank = same[shape.parent[at]], shape.rank[at]
        on_chain, before = rank < 0, tokens[parent]
        tokens[at] = rows.table[before, np.maximum(rank, 0)]
        if depth <= chain.size:
            tokens[at[on_chain]] = chain[depth - 1]
        valid[at] = valid[parent] & np.where(on_chain, depth <= chain.size, rank < rows.count[before])
        valid[at] &= depth <= depth_limit
        key = np.where(valid[at], parent * vocabulary + tokens[at], -1 - at)
        _, first, inverse = np.unique(key, return_index=True, return_inverse=True)
        same[at] = at[first[inverse]]
    parent = np.where(shape.parent < 0, -1, same[np.maximum(shape.parent, 0)])
    return Plan(tokens, parent, shape.depth, np.ones(n)).select(valid & (same == np.arange(n)))
