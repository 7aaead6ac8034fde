"""Draws from a next-token law without replacement, lazily: no sort and no noise over the vocabulary.

Masses are summed up once for a batch; a draw is one uniform number and one binary search, and a token that was
taken out is drawn again until it is not. That is sampling without replacement, the same law as walking the tokens by
descending Gumbel keys. When little is left of a row's mass, its sums are made anew without the removed tokens, so what
is left is always a sum and never a small difference of large ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from tokenmill.errors import LimitError

STALE = 0.9  # removed share of a row's mass from which its sums are made anew
FIRST, MOST = 8, 256  # draws that are made at once: at first for all rows, later for one row, doubling
TINY = 1e-200  # a sum below this is made anew from the logarithms


class Candidate(NamedTuple):
    """A proposed token and the logarithm of its mass, in the scale of the given row."""

    token: int
    log_mass: float


class Draws(Protocol):
    """A row of tokens to draw from. Proposals are independent draws from the law of what has not been removed."""

    @property
    def log_total(self) -> float:
        """Logarithm of the mass that the row began with; -inf for an empty one."""
        ...

    @property
    def log_left(self) -> float:
        """Logarithm of the mass that has not been removed; -inf when nothing is left."""
        ...

    @property
    def top_share(self) -> float:
        """The largest share that a single token had at the beginning."""
        ...

    def propose(self) -> Candidate | None:
        """Draw a token; None when nothing is left."""
        ...

    def remove(self) -> None:
        """Take out the token that was proposed last."""
        ...

    def phantoms(self) -> float:
        """How many draws with replacement would hit removed tokens before the next one that is not."""
        ...


class DrawTable:
    """The rows of a batch, ready to be drawn from.

    Args:
        logp: (N, V) float64 log-probabilities, up to a constant a row; -inf is never drawn. Not changed.
        generator: of the draws, on the device of ``logp``.
        blocked: (M,) int64, tokens without mass in every row.
        event: ids that count as one token, the first of them, which carries the mass of all (for end tokens).

    Raises:
        LimitError: not (N, V), not float64, NaN or +inf.
    """

    def __init__(
        self,
        logp: Tensor,
        *,
        generator: torch.Generator | None = None,
        blocked: Tensor | None = None,
        event: Sequence[int] = (),
    ) -> None:
        if logp.dim() != 2 or logp.dtype != torch.float64 or logp.shape[1] < 1:
            got = f"{logp.dtype} {tuple(logp.shape)}"
            raise LimitError("DrawTable", "logp", got, "float64 (N, V) with V >= 1", "Use log_softmax in float64.")
        self.logp, self.generator, self.blocked, self.event = logp, generator, blocked, list(event)
        self.scale = logp.amax(1)  # (N,)
        self.scale = torch.where(self.scale == -math.inf, 0.0, self.scale)
        self.mass = self._masses(logp, self.scale)  # (N, V)
        self.sums = self.mass.cumsum(1)  # (N, V)
        totals, self._scales = self.sums[:, -1], self.scale.tolist()
        self._totals, self._tops = totals.tolist(), self.mass.amax(1).tolist()
        if not all(map(math.isfinite, self._totals)):
            row = next(i for i, total in enumerate(self._totals) if not math.isfinite(total))
            raise LimitError("DrawTable", f"logp[{row}]", "NaN or +inf", "below +inf everywhere", "Check the logits.")
        # A sum rounds: a draw at or above the last one would find no token.
        self._last = torch.nextafter(totals, torch.zeros_like(totals))[:, None]  # (N, 1)
        uniform = self.uniform(logp.shape[0], FIRST) * totals[:, None]
        tokens = torch.searchsorted(self.sums, torch.minimum(uniform, self._last), right=True)
        tokens.clamp_(max=logp.shape[1] - 1)  # rows without mass, which are not drawn from
        self._tokens, self._drawn = tokens.tolist(), self.mass.gather(1, tokens).tolist()

    def __len__(self) -> int:
        return self.logp.shape[0]

    def row(self, i: int) -> Row:
        """Row ``i``, to be walked once."""
        total = self._totals[i]
        share = self._tops[i] / total if total > 0 else 0.0
        return Row(self, i, total, self._scales[i], share, (self._tokens[i], self._drawn[i]))

    def ranked(self, i: int) -> Ranked:
        """Row ``i`` in order of probability, for greedy walks."""
        return Ranked(self.mass[i], self._scales[i])

    def uniform(self, *shape: int) -> Tensor:
        """Uniform float64 numbers in [0, 1)."""
        return torch.rand(shape, generator=self.generator, dtype=torch.float64, device=self.logp.device)

    def without(self, i: int, removed: Sequence[int]) -> tuple[Tensor, float]:
        """Masses (V,) of row ``i`` and their scale, from the logarithms, without the removed tokens."""
        logp = self.logp[i : i + 1].clone()
        if self.event:
            logp[:, self.event[0]] = logp[:, self.event].logsumexp(1)
            logp[:, self.event[1:]] = -math.inf
        if self.blocked is not None:
            logp[:, self.blocked] = -math.inf
        logp[:, list(removed)] = -math.inf
        scale = logp.amax(1)
        if float(scale) == -math.inf:
            return torch.zeros_like(logp[0]), 0.0
        return (logp - scale[:, None]).exp_()[0], float(scale)

    def _masses(self, logp: Tensor, scale: Tensor) -> Tensor:
        mass = (logp - scale[:, None]).exp_()
        if len(self.event) > 1:
            mass[:, self.event[0]] = mass[:, self.event].sum(1)
            mass[:, self.event[1:]] = 0.0
        if self.blocked is not None:
            mass.index_fill_(1, self.blocked, 0.0)
        return mass


class Row:
    """One row of a `DrawTable`: lazily drawn, without replacement of what was removed."""

    def __init__(
        self, table: DrawTable, i: int, total: float, scale: float, share: float, drawn: tuple[list[int], list[float]]
    ) -> None:
        self._table, self._i, self._total, self._scale = table, i, total, scale
        self._sums, self._last = table.sums[i], table._last[i, 0]
        self._block, self._place, self._size = drawn, 0, FIRST
        self._gone = 0.0  # mass removed since the sums were made
        self._removed: set[int] = set()
        self._proposed = (-1, 0.0)
        self._coins: list[float] = []
        if total < TINY:
            self._make_anew()
            share = 1.0 / self._total if self._total > 0 else 0.0  # the largest mass is 1 in its new scale
        self.top_share = share
        self.log_total = self.log_left

    @property
    def log_left(self) -> float:
        """Logarithm of the mass that is left."""
        left = self._total - self._gone
        return math.log(left) + self._scale if left > 0 else -math.inf

    def propose(self) -> Candidate | None:
        """Draw from what is left; None when that is nothing."""
        while self._total > 0:
            if self._place == len(self._block[0]):
                self._draw()
            token, mass = self._block[0][self._place], self._block[1][self._place]
            self._place += 1
            if token not in self._removed:
                self._proposed = (token, mass)
                return Candidate(token, math.log(mass) + self._scale)
        return None

    def remove(self) -> None:
        """Take out what was proposed last."""
        token, mass = self._proposed
        self._removed.add(token)
        self._gone += mass
        if self._gone > STALE * self._total:
            self._make_anew()

    def phantoms(self) -> float:
        """Draws that hit removed tokens: P(k or more) = (removed share) ** k."""
        if not self._removed:
            return 0.0
        share = math.exp(min(self.log_left - self.log_total, 0.0))
        if share >= 1.0:  # what was removed is below the last digit
            return 0.0
        if not self._coins:
            self._coins = self._table.uniform(16).tolist()
        coin = 1.0 - self._coins.pop()  # in (0, 1]
        return math.floor(math.log(coin) / math.log1p(-share)) if share > 1e-300 else math.inf

    def _draw(self) -> None:
        """A block of draws from the sums, removed tokens among them."""
        self._size = min(2 * self._size, MOST)
        uniform = torch.minimum(self._table.uniform(self._size) * self._total, self._last)
        tokens = torch.searchsorted(self._sums, uniform, right=True)
        self._block, self._place = (tokens.tolist(), self._table.mass[self._i][tokens].tolist()), 0

    def _make_anew(self) -> None:
        """Sums without the removed tokens. The draws that are left over belong to the old ones."""
        mass = self._table.mass[self._i]  # this row's own: nobody else reads it
        mass[list(self._removed)] = 0.0
        self._sums = mass.cumsum(0)
        if float(self._sums[-1]) < TINY:
            fresh, self._scale = self._table.without(self._i, list(self._removed))
            mass.copy_(fresh)
            self._sums = mass.cumsum(0)
        total = self._sums[-1]
        self._total, self._gone = float(total), 0.0
        self._last = torch.nextafter(total, torch.zeros_like(total))
        self._block, self._place = ([], []), 0


class Ranked:
    """A row in order of probability, the lower id first among equals that are looked up together."""

    def __init__(self, mass: Tensor, scale: float) -> None:
        self._mass, self._scale = mass, scale
        self._seen: set[int] = set()
        self._walk: list[tuple[int, float]] = []

    def propose(self) -> Candidate | None:
        """The next token; None when the others have no mass."""
        if not self._walk and len(self._seen) < self._mass.shape[0]:
            mass, tokens = self._mass.topk(min(max(64, 8 * len(self._seen)), self._mass.shape[0]))
            found = zip(tokens.tolist(), mass.tolist(), strict=True)
            # Among equals at the cut another token may come up than before, so what was seen is asked by id.
            new = [one for one in found if one[0] not in self._seen]
            self._walk = sorted(new, key=lambda one: (one[1], -one[0]))
            self._seen.update(token for token, _ in new)
        if not self._walk or self._walk[-1][1] <= 0:
            return None
        token, mass = self._walk.pop()
        return Candidate(token, math.log(mass) + self._scale)

    def remove(self) -> None:
        """A walk never comes back."""
