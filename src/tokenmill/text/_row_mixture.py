"""Rows of a new embedding as weighted sums of old rows, kept as weights so that one estimate serves every matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class RowMixture:
    """U new rows, each a sum of old rows with weights that are at least 0 and add up to 1, or no row at all.

    Attributes:
        indices: (E,) int64, old ids; those of new row u are ``indices[offsets[u]:offsets[u + 1]]``.
        weights: (E,) float32.
        offsets: (U + 1,) int64.
    """

    indices: Tensor
    weights: Tensor
    offsets: Tensor

    @classmethod
    def of(cls, bags: Tensor, indices: Tensor, weights: Tensor, count: int) -> RowMixture:
        """From parallel entries in any order: the row, the old id and the weight of each.

        Args:
            bags: (E,) int64 in [0, count).
            indices: (E,) int64.
            weights: (E,) floating.
            count: U, rows.
        """
        order = bags.argsort(stable=True)
        offsets = F.pad(torch.bincount(bags, minlength=count).cumsum(0), (1, 0))
        return cls(indices[order], weights[order].float(), offsets)

    def __len__(self) -> int:
        return self.offsets.shape[0] - 1

    @property
    def found(self) -> Tensor:
        """(U,) bool: the rows that there are."""
        return self.offsets.diff() > 0

    @property
    def bags(self) -> Tensor:
        """(E,) int64: the new row of each entry."""
        return torch.repeat_interleave(torch.arange(len(self), device=self.offsets.device), self.offsets.diff())

    def rows(self, matrix: Tensor) -> Tensor:
        """The new rows in float32; a row that is not `found` is zero.

        Args:
            matrix: (V_old, D) floating, or (V_old,) for a bias.

        Returns:
            (U, D) float32, or (U,).
        """
        used, entry = self.indices.unique(return_inverse=True)
        table = matrix.detach().reshape(matrix.shape[0], -1)[used.to(matrix.device)].float()
        if not used.numel():
            return table.new_zeros(len(self), *matrix.shape[1:])
        at = matrix.device
        out = F.embedding_bag(
            entry.to(at), table, self.offsets.to(at), mode="sum",
            per_sample_weights=self.weights.to(at), include_last_offset=True,
        )  # fmt: skip
        return out.reshape(len(self), *matrix.shape[1:])

    def mixed(self, other: RowMixture, share: float) -> RowMixture:
        """``(1 - share) self + share other``; where only one of them has a row, that row at full weight."""
        mine = torch.where(other.found, 1.0 - share, 1.0)  # (U,)
        theirs = torch.where(self.found, share, 1.0)
        ours, its = self.bags, other.bags
        bags = torch.cat([ours, its])
        weights = torch.cat([self.weights * mine[ours], other.weights * theirs[its]])
        kept = weights > 0  # with share 0 or 1, only one of them is left, bit for bit
        return RowMixture.of(bags[kept], torch.cat([self.indices, other.indices])[kept], weights[kept], len(self))


def bag_softmax(scores: Tensor, bags: Tensor, count: int) -> Tensor:
    """Softmax inside each bag.

    Args:
        scores: (E,) floating.
        bags: (E,) int64 in [0, count), in any order.
        count: number of bags.

    Returns:
        (E,) of the scores' dtype.
    """
    top = scores.new_full((count,), -torch.inf).scatter_reduce(0, bags, scores, "amax")
    exps = (scores - top[bags]).exp()
    return exps / scores.new_zeros(count).index_add(0, bags, exps)[bags]
