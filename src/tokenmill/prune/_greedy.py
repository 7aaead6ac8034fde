"""Greedy walks over tokens: what is chosen next depends on how like the chosen ones a token is.

All walks keep one running value a token (its largest, or summed, similarity to the chosen set), so a step costs O(N).
The similarities lie in one N x N product that is scaled in place; above `STREAM_ABOVE` tokens they are made row by row
and the product is never held.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tokenmill.errors import LimitError, unknown_name

STREAM_ABOVE = 8192
METRICS = ("cosine", "l1", "l2")
_ROWS = 1024  # rows of the product held at once when it is streamed
Metric = Literal["cosine", "l1", "l2"]


def as_items(where: str, x: Tensor, k: int, valid: Tensor | None = None) -> Tensor:
    """Features (N, D) or (B, N, D) as (B, N, D) in float32 or wider, checked together with the count ``k``.

    Raises:
        LimitError: another rank, ``k`` below 1 or above the number of (valid) tokens, NaN or infinity.
    """
    if not isinstance(x, Tensor) or x.dim() not in (2, 3):
        raise LimitError(where, "features", tuple(getattr(x, "shape", ())), "(N, D) or (B, N, D)")
    check_count(where, k, x.shape[-2], valid)
    check_finite(where, "features", x.flatten(0, -2))
    x = x if x.dim() == 3 else x[None]
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def check_count(where: str, k: int, tokens: int, valid: Tensor | None = None) -> None:
    """Refuse a count that is no int in [1, tokens].

    Raises:
        LimitError: naming both numbers.
    """
    limit = tokens if valid is None else int(valid.sum(-1).min())
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= limit:
        raise LimitError(where, "k", k, f"an int in [1, N={limit}]", "Keep at least one token and at most all.")


def check_finite(where: str, name: str, values: Tensor) -> None:
    """Refuse NaN and infinity, with the first bad index along the first axis.

    Raises:
        LimitError: there is one.
    """
    if not values.numel():
        return
    low, high = torch.aminmax(values)  # both are NaN when one value is; nothing is copied
    if not bool(torch.isfinite(low) & torch.isfinite(high)):
        bad = ~torch.isfinite(values)
        at = int(bad.nonzero()[0, 0])
        raise LimitError(where, name, f"NaN or infinity at {at}", "finite")


def check_weights(where: str, name: str, values: Tensor, items: Tensor) -> Tensor:
    """One value a token, (N,) or (B, N), as (B, N) in the dtype of the items (B, N, D).

    Raises:
        LimitError: another shape, NaN or infinity.
    """
    shaped = values if values.dim() == 2 else values[None]
    if shaped.shape != items.shape[:2]:
        raise LimitError(where, name, tuple(values.shape), f"one value for each of {tuple(items.shape[:2])} tokens")
    check_finite(where, name, values)
    return shaped.to(items.dtype)


@dataclass(slots=True)
class Similarity:
    """Similarities among the tokens of each item, whole or made on demand.

    Cosine: in [-1, 1], and values within rounding of 1 are 1, so that copies of a token are ties. l1 and l2: the
    negative distance. A row of zeros has cosine 0 to everything.
    """

    x: Tensor  # (B, N, D)
    metric: Metric
    scale: Tensor  # (B, N), 1 / norm; not used by l1 and l2
    whole: Tensor | None  # (B, N, N)

    @classmethod
    def of(cls, x: Tensor, metric: Metric = "cosine", *, stream: bool | None = None) -> Similarity:
        """Similarities of ``x`` (B, N, D); ``stream=None`` decides by the number of tokens."""
        if metric not in METRICS:
            raise unknown_name("similarity", "metric", metric, METRICS)
        norm = torch.linalg.vector_norm(x, dim=-1)
        scale = torch.where(norm > 0, norm, torch.inf).reciprocal()
        made = cls(x, metric, scale, None)
        if stream is None:
            stream = x.shape[1] > STREAM_ABOVE
        if not stream:
            made.whole = made.matrix()
        return made

    def matrix(self) -> Tensor:
        """All pairs, (B, N, N); row j holds the similarities to token j."""
        return self.whole if self.whole is not None else self._product(slice(None))

    def row(self, at: Tensor) -> Tensor:
        """Similarity of every token to token ``at`` (B,) of its item: (B, N)."""
        rows = torch.arange(len(self.x), device=self.x.device)
        if self.whole is not None:
            return self.whole[rows, at]
        picked = self.x[rows, at]  # (B, D)
        if self.metric != "cosine":
            return -torch.linalg.vector_norm(self.x - picked[:, None], ord=1 if self.metric == "l1" else 2, dim=-1)
        return self._snap((self.x @ picked[:, :, None])[..., 0] * self.scale * self.scale[rows, at, None])

    def nearest(self, valid: Tensor | None = None) -> Tensor:
        """Each token's largest similarity to another (valid) one: (B, N)."""
        count = self.x.shape[1]
        if count == 1:
            return self.x.new_full(self.x.shape[:2], -torch.inf)
        found = []
        step = count if self.whole is not None else _ROWS
        for start in range(0, count, step):
            rows = slice(start, min(start + step, count))
            part = self.whole[:, rows] if self.whole is not None else self._product(rows)  # (B, R, N)
            if valid is not None:
                part = part.masked_fill(~valid[:, None], -torch.inf)
            at = torch.arange(part.shape[1], device=part.device)
            mine = part[:, at, rows.start + at].clone()
            # Hide each token from itself, look, and put its value back: no second matrix.
            part[:, at, rows.start + at] = -torch.inf
            found.append(part.amax(-1))
            part[:, at, rows.start + at] = mine
        return torch.cat(found, dim=1)

    def _product(self, rows: slice) -> Tensor:
        if self.metric != "cosine":
            return -torch.cdist(self.x[:, rows], self.x, p=1.0 if self.metric == "l1" else 2.0)
        # Item by item: a batched product would copy the transposed features.
        product = (
            torch.stack([x[rows] @ x.T for x in self.x]) if len(self.x) > 1 else (self.x[0][rows] @ self.x[0].T)[None]
        )
        product *= self.scale[:, rows, None]
        product *= self.scale[:, None]
        return self._snap(product)

    def _snap(self, product: Tensor) -> Tensor:
        return product.masked_fill_(product > 1 - 16 * torch.finfo(product.dtype).eps, 1)


def walk(
    similarity: Similarity,
    k: int,
    first: Tensor,
    value: Callable[[Tensor], Tensor],
    *,
    join: Literal["max", "sum"] = "max",
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose ``k`` tokens of each item, one after another; the first index wins a tie.

    Args:
        similarity: among the tokens.
        k: how many.
        first: (B,) int64, the first choice of each item.
        value: ``value(m)`` -> (B, N), larger is better, for the running similarities m (B, N) to the chosen set.
        join: how m grows, by the largest or by the sum.
        valid: (B, N) bool, tokens that may be chosen.

    Returns:
        (B, k) int64 in the order of choice, and (B, k) the running similarity that each had when it was chosen
        (minus infinity for the first).
    """
    rows = torch.arange(len(first), device=first.device)
    chosen = torch.zeros(similarity.x.shape[:2], dtype=torch.bool, device=first.device)
    if valid is not None:
        chosen |= ~valid
    order = first.new_empty(len(first), k)
    trace = similarity.x.new_full((len(first), k), -torch.inf)
    running, at = None, first
    for step in range(k):
        if running is not None:
            at = value(running).masked_fill(chosen, -torch.inf).argmax(-1)
            trace[:, step] = running[rows, at]
        order[:, step] = at
        chosen[rows, at] = True
        if step + 1 < k:
            row = similarity.row(at)
            running = row.clone() if running is None else (running + row if join == "sum" else running.maximum(row))
    return order, trace


def squeeze(x: Tensor, order: Tensor) -> Tensor:
    """Without the batch axis when the features ``x`` had none."""
    return order[0] if x.dim() == 2 else order
