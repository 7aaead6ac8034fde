"""From a planned draft and the state to the tokens of a tree."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tokenmill.decode._adjacency import AdjacencyMatrix
from tokenmill.decode._plan import Draft, Ints, draft_tree
from tokenmill.decode._tree import Tree, TreeTemplate


def template_draft(template: TreeTemplate, spine: int = 0) -> Draft:
    """The nodes of a template, and beside them a chain of ``spine`` nodes for n-gram continuations."""
    parent, depth = template.parent.numpy(), template.depth.numpy()
    rank = template.child_rank.numpy().copy()
    rank[0] = -1
    n = len(parent)
    chain = np.arange(spine)
    parent = np.concatenate([parent, np.where(chain == 0, 0, n + chain - 1)])
    depth = np.concatenate([depth, chain + 1])
    rank = np.concatenate([rank, np.full(spine, -1)])
    order = np.argsort(depth, kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(order.size)
    parent = np.where(parent[order] < 0, -1, place[np.maximum(parent[order], 0)])
    return Draft(parent, rank[order], depth[order])


def fill(draft: Draft, matrix: AdjacencyMatrix, root: int, chain: Ints) -> tuple[Tensor, Tree]:
    """Give each node of a draft its token, level by level.

    Nodes whose row of the matrix is not known, and chain nodes behind the end of ``chain``, are left out with what
    hangs below them. Siblings that carry the same token become one node, with the children of both.

    Args:
        draft: N nodes.
        matrix: the state.
        root: the last committed token.
        chain: (C,) n-gram continuation of the root.

    Returns:
        tokens (M,) int64 and the tree of the M <= N nodes that are left.
    """
    table, count = matrix.table.numpy(), matrix.count.numpy()
    n = draft.parent.shape[0]
    tokens = np.full(n, root, dtype=np.int64)
    valid = np.ones(n, dtype=bool)
    same = np.arange(n)  # the node that stands for this one
    edges = np.searchsorted(draft.depth, np.arange(1, int(draft.depth[-1]) + 2))
    for start, end in zip(edges[:-1], edges[1:], strict=True):
        at = np.arange(start, end)
        parent, rank, depth = same[draft.parent[at]], draft.rank[at], int(draft.depth[start])
        on_chain = rank < 0
        before = tokens[parent]
        tokens[at] = table[before, np.maximum(rank, 0)]
        if depth <= chain.shape[0]:
            tokens[at[on_chain]] = chain[depth - 1]
        valid[at] = valid[parent] & np.where(on_chain, depth <= chain.shape[0], rank < count[before])
        key = np.where(valid[at], parent * matrix.vocab_size + tokens[at], -1 - at)
        first, inverse = np.unique(key, return_index=True, return_inverse=True)[1:]
        same[at] = at[first[inverse]]
    keep = valid & (same == np.arange(n))
    number = np.cumsum(keep) - 1
    parent = draft.parent[keep]
    parent = np.where(parent < 0, -1, number[same[np.maximum(parent, 0)]])
    kept = Draft(parent, draft.rank[keep], draft.depth[keep])
    return torch.from_numpy(tokens[keep]), draft_tree(kept)
