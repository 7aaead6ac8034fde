"""A vocabulary's bytes as a sorted list, whose subtrees are contiguous ranges, and as a trie in flat arrays.

For masses over tokens: which tokens start with given bytes, and what each next byte weighs.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from tokenmill.errors import LimitError

END = 256
"""The slot beside the 256 bytes: a token that ends here."""


@dataclass(frozen=True, slots=True)
class Nodes:
    """The trie's nodes level by level, the root (empty prefix) first; children of a node ascend by byte.

    Attributes:
        parent: (nodes,) int64, -1 for the root.
        byte: (nodes,) int64, the byte that leads to the node, -1 for the root.
        depth: (nodes,) int64, bytes from the root.
        lo, hi: (nodes,) int64, the node's tokens are ``order[lo:hi]``.
        levels: (deepest + 2,) int64, level d is ``levels[d]:levels[d + 1]``.
        ends: (M,) int64, the node where each token of ``order`` ends.
    """

    parent: Tensor
    byte: Tensor
    depth: Tensor
    lo: Tensor
    hi: Tensor
    levels: tuple[int, ...]
    ends: Tensor


class ByteTrie:
    """Tokens sorted by their bytes, so that the tokens below a prefix are one range.

    Attributes:
        order: (M,) int64, ids of the tokens that have at least one byte, by bytes, ties by id.
        bytes: flat uint8, the tokens' bytes in that order.
        offsets: (M + 1,) int64, token i has ``bytes[offsets[i]:offsets[i + 1]]``.
    """

    def __init__(self, tokens: Sequence[bytes | None]) -> None:
        """Sort the tokens; ``None`` and empty ones are left out. O(V log V)."""
        pairs = sorted((token, i) for i, token in enumerate(tokens) if token)
        order = [i for _, i in pairs]
        self._sorted: list[bytes] = [token for token, _ in pairs]
        lengths = np.fromiter(map(len, self._sorted), dtype=np.int64, count=len(order))
        self._flat = np.frombuffer(b"".join(self._sorted), dtype=np.uint8)
        self._starts = np.concatenate([np.zeros(1, dtype=np.int64), lengths.cumsum()])
        self.vocab_size = len(tokens)
        self.order = torch.tensor(order, dtype=torch.int64)
        self.bytes = torch.from_numpy(self._flat.copy())
        self.offsets = torch.from_numpy(self._starts)
        self._nodes_on: dict[torch.device, Nodes] = {}

    def __len__(self) -> int:
        return len(self._sorted)

    def range(self, prefix: bytes) -> tuple[int, int]:
        """[lo, hi) of `order` that start with `prefix`; lo == hi when there is none. O(length log M)."""
        lo = bisect_left(self._sorted, prefix)
        stem = prefix.rstrip(b"\xff")
        if not stem:  # nothing but 0xff comes behind it
            return lo, len(self._sorted)
        return lo, bisect_left(self._sorted, stem[:-1] + bytes([stem[-1] + 1]), lo)

    def narrow(self, lo: int, hi: int, depth: int, byte: int) -> tuple[int, int]:
        """Of a range whose tokens share their first `depth` bytes, those whose next byte is `byte`. O(log M)."""

        def at(token: bytes) -> int:
            return token[depth] if len(token) > depth else -1

        below = bisect_left(self._sorted, byte, lo, hi, key=at)
        return below, bisect_left(self._sorted, byte + 1, below, hi, key=at)

    def byte_at(self, lo: int, hi: int, depth: int) -> Tensor:
        """(hi - lo,) int64: the byte at `depth` of each token of the range, 256 where a token ends there."""
        start = self.offsets[lo:hi] + depth  # (hi - lo,)
        inside = start < self.offsets[lo + 1 : hi + 1]
        found = self.bytes[start.clamp(max=max(self.bytes.shape[0] - 1, 0))].long()
        return torch.where(inside, found, END)

    def next_byte_sums(self, weights: Tensor, lo: int, hi: int, depth: int) -> Tensor:
        """Mass of each next byte in a range whose tokens share `depth` bytes.

        Args:
            weights: (hi - lo,) floating, in `order`'s order, on any device.
            lo, hi, depth: as of `range` and `narrow`.

        Returns:
            (257,) of the same dtype; [256] is the mass of the tokens that end at `depth`. Summed in float32 or wider.

        Raises:
            LimitError: another number of weights.
        """
        if weights.shape != (hi - lo,):
            raise LimitError("ByteTrie.next_byte_sums", "weights.shape", tuple(weights.shape), f"({hi - lo},)")
        wide = _wide(weights)
        sums = wide.new_zeros(END + 1)
        return sums.index_add(0, self.byte_at(lo, hi, depth).to(weights.device), wide).to(weights.dtype)

    def subtree_sums(self, weights: Tensor) -> Tensor:
        """Mass below each node of `nodes`, tokens that end at the node included.

        Added up from the leaves, not by differences of a running total, in which small masses would drown.

        Args:
            weights: (..., V) floating, by token id, on any device.

        Returns:
            (..., nodes) of the same dtype; entry 0 is the root, the mass of all tokens with bytes.

        Raises:
            LimitError: weights for another vocabulary.
        """
        if weights.shape[-1:] != (self.vocab_size,):
            limit = f"(..., V={self.vocab_size})"
            raise LimitError("ByteTrie.subtree_sums", "weights.shape", tuple(weights.shape), limit)
        nodes = self.nodes_on(weights.device)
        wide = _wide(weights)[..., self.order.to(weights.device)]  # (..., M)
        own = wide.new_zeros(*wide.shape[:-1], nodes.parent.shape[0]).index_add(-1, nodes.ends, wide)
        bounds = nodes.levels
        sums = [own[..., bounds[-2] : bounds[-1]]]
        for level in range(len(bounds) - 3, -1, -1):
            here = own[..., bounds[level] : bounds[level + 1]]
            parents = nodes.parent[bounds[level + 1] : bounds[level + 2]] - bounds[level]
            sums.append(here.index_add(-1, parents, sums[-1]))
        return torch.cat(sums[::-1], dim=-1).to(weights.dtype)

    @property
    def parent(self) -> Tensor:
        """(nodes,) int64, see `Nodes`."""
        return self.nodes.parent

    @property
    def byte(self) -> Tensor:
        """(nodes,) int64, see `Nodes`."""
        return self.nodes.byte

    @property
    def depth(self) -> Tensor:
        """(nodes,) int64, see `Nodes`."""
        return self.nodes.depth

    @property
    def lo(self) -> Tensor:
        """(nodes,) int64, see `Nodes`."""
        return self.nodes.lo

    @property
    def hi(self) -> Tensor:
        """(nodes,) int64, see `Nodes`."""
        return self.nodes.hi

    def nodes_on(self, device: torch.device) -> Nodes:
        """`nodes` on a device, copied once."""
        if device.type == "cpu":
            return self.nodes
        if device not in self._nodes_on:
            n = self.nodes
            moved = [t.to(device) for t in (n.parent, n.byte, n.depth, n.lo, n.hi)]
            self._nodes_on[device] = Nodes(*moved, levels=n.levels, ends=n.ends.to(device))
        return self._nodes_on[device]

    @cached_property
    def nodes(self) -> Nodes:
        """The trie in flat arrays, built level by level over all tokens at once on first use."""
        count = len(self._sorted)
        starts, stops = self._starts[:-1], self._starts[1:]
        ends = np.zeros(count, dtype=np.int64)
        arrays: list[list[np.ndarray]] = [[np.array([-1])], [np.array([-1])], [np.array([0])], [np.array([count])]]
        levels = [0, 1]
        alive = np.arange(count)  # tokens longer than the level's depth, in order
        group = np.zeros(count, dtype=np.int64)  # the node each of them is in
        depth = 0
        while alive.size:
            byte = self._flat[starts[alive] + depth].astype(np.int64)
            fresh = np.ones(alive.size, dtype=bool)
            fresh[1:] = (group[1:] != group[:-1]) | (byte[1:] != byte[:-1])
            first = fresh.nonzero()[0]
            last = np.append(first[1:], alive.size) - 1
            for column, values in zip(arrays, (group[first], byte[first], alive[first], alive[last] + 1), strict=True):
                column.append(values)
            group = levels[-1] + fresh.cumsum() - 1
            levels.append(levels[-1] + first.size)
            depth += 1
            ends[alive] = group
            longer = stops[alive] - starts[alive] > depth
            alive, group = alive[longer], group[longer]
        parent, byte, lo, hi = (torch.from_numpy(np.concatenate(column).astype(np.int64)) for column in arrays)
        widths = torch.tensor(levels).diff()
        depths = torch.repeat_interleave(torch.arange(len(levels) - 1), widths)
        return Nodes(parent, byte, depths, lo, hi, tuple(levels), torch.from_numpy(ends))


def _wide(weights: Tensor) -> Tensor:
    """At least float32: a sum of hundreds of thousands of half-precision masses keeps nothing of the small ones."""
    return weights.float() if weights.dtype in (torch.float16, torch.bfloat16) else weights
