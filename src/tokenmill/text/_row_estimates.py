"""What a new token's row may be made of: its pieces, its neighbours in a space of texts, or both."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tokenmill.text._row_mixture import RowMixture, bag_softmax

_SMALL = 1e-5  # beside the temperature, in the authors' code
_BLOCK = 1024


def local_mixture(pieces: RowMixture, similarity: Tensor, share: Tensor, *, temperature: float) -> RowMixture:
    """Pieces by likeness to the whole and by length (TokenAdapt, local estimate).

    ``a = softmax(similarity)``, ``weights = softmax((a + share) / 2 / (T + 1e-5))``, both inside each token.

    Args:
        pieces: the old pieces of each new token; their weights are not read.
        similarity: (E,) cosine between the whole token and each piece, 0 where it is not known.
        share: (E,) a piece's part of the token's length.
        temperature: T.
    """
    bags, count = pieces.bags, len(pieces)
    likeness = bag_softmax(similarity.double(), bags, count)
    weights = bag_softmax((likeness + share.double()) / 2 / (temperature + _SMALL), bags, count)
    return RowMixture(pieces.indices, weights.float(), pieces.offsets)


def piece_mean(pieces: RowMixture) -> RowMixture:
    """The plain mean of the pieces."""
    each = 1.0 / pieces.offsets.diff().clamp(min=1)
    return RowMixture(pieces.indices, each[pieces.bags].float(), pieces.offsets)


def global_mixture(
    new: Tensor, old: Tensor, old_ids: Tensor, *, top_k: int, temperature: float, threshold: float
) -> RowMixture:
    """The nearest old tokens in a space of texts (TokenAdapt, global estimate).

    ``softmax(cosine / (T + 1e-5))`` over the `top_k` nearest; those below the threshold count nothing, the others add
    up to 1; a token without one has no row.

    Args:
        new: (U, d) unit vectors; a zero vector stands for a text that has none.
        old: (O, d) unit vectors of old tokens.
        old_ids: (O,) int64, their ids.
        top_k: neighbours; at most O.
        temperature: T.
        threshold: least cosine of a neighbour.
    """
    bags, indices, weights = [], [], []
    for start, cosine in _cosines(new, old):
        near, at = cosine.topk(min(top_k, old.shape[0]), dim=1)  # (b, k)
        w = (near.double() / (temperature + _SMALL)).softmax(dim=1)
        known = new[start : start + cosine.shape[0]].any(dim=1, keepdim=True)
        w = w * ((near >= threshold) & known)
        row, column = w.nonzero(as_tuple=True)
        total = w.sum(dim=1)
        bags.append(row + start)
        indices.append(old_ids[at[row, column]])
        weights.append(w[row, column] / total[row])
    return _joined(bags, indices, weights, new.shape[0])


def focus_mixture(new: Tensor, shared: Tensor, shared_ids: Tensor) -> RowMixture:
    """Sparsemax over the tokens that both vocabularies have (as FOCUS does, in this space of texts).

    Args:
        new: (U, d) unit vectors, zero where a text has none.
        shared: (S, d) unit vectors.
        shared_ids: (S,) int64, their old ids.
    """
    bags, indices, weights = [], [], []
    for start, cosine in _cosines(new, shared, block=128):
        w = sparsemax(cosine.double()) * new[start : start + cosine.shape[0]].any(dim=1, keepdim=True)
        row, column = w.nonzero(as_tuple=True)
        bags.append(row + start)
        indices.append(shared_ids[column])
        weights.append(w[row, column])
    return _joined(bags, indices, weights, new.shape[0])


def sparsemax(scores: Tensor) -> Tensor:
    """The point of the simplex nearest to each row of scores (..., S); most entries of the result are 0."""
    ordered = scores.sort(dim=-1, descending=True).values
    total = ordered.cumsum(dim=-1) - 1
    rank = torch.arange(1, scores.shape[-1] + 1, device=scores.device, dtype=scores.dtype)
    support = (ordered * rank > total).sum(dim=-1, keepdim=True)  # at least 1
    return (scores - total.gather(-1, support - 1) / support).clamp(min=0)


def _cosines(new: Tensor, old: Tensor, block: int = _BLOCK) -> Iterator[tuple[int, Tensor]]:
    """(first row, (b, O) cosines) block by block: the whole matrix may not fit."""
    for start in range(0, new.shape[0], block):
        yield start, new[start : start + block] @ old.T


def _joined(bags: list[Tensor], indices: list[Tensor], weights: list[Tensor], count: int) -> RowMixture:
    if not bags:
        empty = torch.zeros(0, dtype=torch.int64)
        return RowMixture(empty, torch.zeros(0), torch.zeros(count + 1, dtype=torch.int64))
    return RowMixture.of(torch.cat(bags), torch.cat(indices), torch.cat(weights), count)
