"""The last selection of every layer, used again while queries stay similar."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenmill.errors import LimitError


@dataclass(slots=True)
class _Entry:
    query: Tensor  # (B, H * D), the query that chose
    index: Tensor  # (B, k)
    since: Tensor  # (B,), how many slots there were


class SelectionCache:
    """What each row of each layer selected last, and with which query (Algorithm 1 of TokenSelect).

    A row may use its selection again while the cosine of its query to the one that chose is at least ``theta``. The
    stored query is not moved on by a hit, so that similarity cannot drift. Rows do not influence each other.
    """

    def __init__(self, theta: float) -> None:
        """``theta`` above 1 never hits, -1 always does.

        Raises:
            LimitError: NaN.
        """
        if math.isnan(theta):
            raise LimitError("SelectionCache", "theta", theta, "a number")
        self.theta = theta
        self._entries: dict[int, _Entry] = {}

    def get(self, layer: int, query: Tensor) -> Tensor | None:
        """The selections that may be used again.

        Args:
            layer: which layer.
            query: (B, H * D), all heads in one vector.

        Returns:
            (B, k) int64, with -1 in the rows that have to select; ``None`` when all have to.
        """
        entry = self._entries.get(layer)
        if entry is None or entry.query.shape != query.shape:
            return None
        hit = similar(query, entry.query, self.theta) & (entry.since >= 0)
        return entry.index.masked_fill(~hit[:, None], -1) if bool(hit.any()) else None

    def put(
        self, layer: int, query: Tensor, index: Tensor, *, since: Tensor | None = None, rows: Tensor | None = None
    ) -> None:
        """Store a selection.

        Args:
            layer: which layer.
            query: (B, H * D), or (R, H * D) with ``rows``.
            index: (B, k), or (R, k) in the width of what is stored.
            since: (B,) or (R,) slots that there were; 0 when nobody asks.
            rows: (B,) bool, R of them true: replace these only.
        """
        since = torch.zeros(len(query), dtype=torch.long, device=query.device) if since is None else since
        if rows is None:
            self._entries[layer] = _Entry(query, index, since)
            return
        old = self._entries[layer]
        entry = _Entry(old.query.clone(), old.index.clone(), old.since.clone())
        entry.query[rows], entry.index[rows], entry.since[rows] = query, index, since
        self._entries[layer] = entry

    def stored(self, layer: int) -> tuple[Tensor, Tensor]:
        """What lies there: selections (B, k), and the numbers of slots that they were made from, (B,)."""
        entry = self._entries[layer]
        return entry.index, entry.since

    def reset(self) -> None:
        """Forget everything: a new prompt."""
        self._entries.clear()

    def each(self, change: Callable[[Tensor], Tensor]) -> None:
        """Follow a change of the batch or the device."""
        for layer, entry in self._entries.items():
            self._entries[layer] = _Entry(change(entry.query), change(entry.index), change(entry.since))

    def crop(self, length: int) -> None:
        """The text was cut back to ``length``: what was selected behind that place goes, and so does its query."""
        for entry in self._entries.values():
            stale = (entry.since > length) | (entry.index >= length).any(-1)
            entry.since = entry.since.masked_fill(stale, -1)


def similar(query: Tensor, other: Tensor, theta: float) -> Tensor:
    """Whether the cosine of two vectors reaches ``theta``: (B, W) twice -> (B,) bool.

    Equal vectors have a cosine of exactly 1, others less; a zero vector is similar to nothing.
    """
    a, b = query.double(), other.double()
    lengths = a.norm(dim=-1) * b.norm(dim=-1)
    cosine = (a * b).sum(-1) / lengths
    below = 1 - torch.finfo(torch.float64).eps
    cosine = torch.where((a == b).all(-1), 1.0, cosine.clamp(-1.0, below))
    return (cosine >= theta) & (lengths > 0)
