"""A KV cache that contexts share: a tree of tokens over one prompt, each row of the cache one token of the tree.

A node sees its own ancestors only, whatever else the cache holds. Rows of nodes that nobody refers to any more are
written anew, so that a long run of branching contexts needs little more than the rows of the longest one.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from tokenmill import hf
from tokenmill.errors import LimitError
from tokenmill.hf.layout import SLIDING
from tokenmill.trace import Trace

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CHUNK = 512  # tokens of one prefill forward


class Node:
    """One token in its context. It keeps its ancestors' rows alive; its own row is free once nobody refers to it.

    Attributes:
        row: of the cache.
        depth: tokens before it in its own context, its position.
        parent: the token before it; None for the prompt's last one.
        head: rows ``0 .. head`` of the prompt are seen.
        rows: (R,) int64, the rows beyond the prompt that it sees, its own last.
    """

    __slots__ = ("__weakref__", "depth", "head", "parent", "row", "rows")

    def __init__(self, row: int, depth: int, parent: Node | None, head: int, rows: Tensor) -> None:
        self.row, self.depth, self.parent, self.head, self.rows = row, depth, parent, head, rows


class TokenTree:
    """Contexts of one model that branch behind a prompt.

    Args:
        where: the method, for messages.
        model: a causal model with full or sliding attention, sdpa or eager.
        trace: counts model calls and positions.

    Raises:
        UnsupportedError: layers or attention that cannot take a mask of ancestors.
    """

    def __init__(self, where: str, model: PreTrainedModel, trace: Trace) -> None:
        self.where, self.model, self.trace = where, model, trace
        self.kinds = hf.layer_kinds(where, model)
        self.form = hf.mask_form(where, model)
        self.cache = hf.IndexedCache(model)
        self.limit = getattr(hf.text_config(model), "max_position_embeddings", None)
        self._free: list[int] = []
        self._depth = torch.zeros(0, dtype=torch.long, device=model.device)  # of the token in each row

    @property
    def rows(self) -> int:
        """Rows in use or free."""
        return self._depth.shape[0]

    def prefill(self, ids: Sequence[int]) -> tuple[Node, Tensor]:
        """Read a prompt. Its rows stay for as long as the tree does.

        Args:
            ids: at least one token.

        Returns:
            The node of the last token, and the logits (V,) behind it.

        Raises:
            LimitError: no tokens, or more than the model has positions.
        """
        self._check_depth(len(ids) - 1)
        if not ids:
            raise LimitError(self.where, "prompt length", 0, "at least 1", "Give a token to start from, such as bos.")
        logits = torch.zeros(0)
        for start in range(0, len(ids), _CHUNK):
            part = torch.tensor([list(ids[start : start + _CHUNK])], device=self.model.device)
            positions = torch.arange(start, start + part.shape[1], device=self.model.device)
            self.cache.plan()
            logits = self._forward(part, positions, None, keep=1)
        self._depth = torch.arange(len(ids), device=self.model.device)
        none = torch.zeros(0, dtype=torch.long, device=self.model.device)
        last = len(ids) - 1
        return Node(last, last, None, last, none), logits[-1]

    def extend(self, parents: Sequence[Node | int], tokens: Sequence[int]) -> tuple[list[Node], Tensor]:
        """Append tokens to contexts, all in one forward.

        Args:
            parents: the context of each token: a node, or the index of an earlier token of this call.
            tokens: N ids.

        Returns:
            N nodes, and the logits (N, V) behind each.

        Raises:
            LimitError: a context longer than the model's positions.
        """
        nodes: list[Node] = []
        for parent in parents:
            over = nodes[parent] if isinstance(parent, int) else parent
            self._check_depth(over.depth + 1)
            nodes.append(self._node(over))
        device = self.model.device
        depth = torch.tensor([node.depth for node in nodes], device=device)
        write = torch.tensor([node.row for node in nodes], device=device)
        self._depth[write] = depth
        self.cache.plan(write=write)
        logits = self._forward(
            torch.tensor([list(tokens)], device=device), depth, self._masks(nodes, depth), keep=len(nodes)
        )
        return nodes, logits

    def _node(self, parent: Node) -> Node:
        """A new node with a row of its own."""
        if self._free:
            row = self._free.pop()
        else:
            row = self.rows
            self._depth = torch.nn.functional.pad(self._depth, (0, 1))
        node = Node(row, parent.depth + 1, parent, parent.head, torch.cat([parent.rows, parent.rows.new_tensor([row])]))
        weakref.finalize(node, self._free.append, row).atexit = False
        return node

    def _masks(self, nodes: Sequence[Node], depth: Tensor) -> Tensor | dict[str, Tensor]:
        """(1, 1, N, rows) for each kind of layer; a sliding layer counts distance in tokens of the node's context."""
        seen = torch.zeros(len(nodes), self.rows, dtype=torch.bool, device=depth.device)
        for line, node in zip(seen, nodes, strict=True):
            line[: node.head + 1] = True
            line[node.rows] = True
        masks: dict[str, Tensor] = {}
        for kind in dict.fromkeys(self.kinds):
            mask = seen
            if kind == SLIDING:
                mask = seen & (depth[:, None] - self._depth[None, :] < hf.text_config(self.model).sliding_window)
            masks[kind] = hf.as_form(mask[None, None], self.form, self.model.dtype)
        return masks if len(masks) > 1 else next(iter(masks.values()))

    @torch.no_grad()
    def _forward(self, ids: Tensor, positions: Tensor, mask: Any, *, keep: int) -> Tensor:
        out = cast("Any", self.model)(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions[None],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=keep,
            return_dict=True,
        )
        self.trace.model_calls += 1
        self.trace.positions += ids.shape[1]
        return out.logits[0, -keep:]

    def _check_depth(self, depth: int) -> None:
        if self.limit and depth >= self.limit:
            raise LimitError(
                self.where, "prompt length", depth + 1, f"at most {self.limit}, the model's positions", "Cut the text."
            )
