"""Adaptive weighted rejection sampling: a valid token, and an unbiased estimate of how much mass is valid.

Lipkin et al., "Fast Controlled Generation from Language Models with Adaptive Weighted Rejection Sampling" (arXiv
2504.05410). Tokens are proposed from the model's law p without replacement and only they are checked. Of a valid set
A a step returns a token x and a weight w with ``E[w 1{x = t}] = p(t) 1{t in A}`` for every t: properly weighted.
Three estimators do so; the weights below are written with the mass that is left, ``left = p(not yet rejected)``:

- ``paper``: R tokens are rejected before the first valid x, then, without them and with x still there, n more before
  the next valid one (any, also x): w = left behind the first loop / (R + n + 1).
- ``recursive``: one more token y is looked at behind x, without x: w = left before x if y is valid, else p(x). (The
  product of the (1 - q) of the rejected tokens is the share that is left, so no product is needed.)
- ``geometric``: draws with replacement, in which hits of rejected tokens are counted and not checked, until
  ``max_accepts`` valid or ``max_rejects`` other ones: w = min(max_accepts - 1, accepted) / (accepted + rejected - 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from tokenmill.decode._draws import Candidate, Draws, DrawTable
from tokenmill.errors import LimitError, unknown_name

__all__ = ["Method", "Step", "awrs_step"]

Method = Literal["auto", "paper", "recursive", "geometric", "lcd"]
METHODS: tuple[str, ...] = get_args(Method)
PEAKED = 2 / 3  # above this share of one token the geometric estimator needs fewer than two checks on average
Accept = Callable[[int], bool]


@dataclass(frozen=True, slots=True)
class Step:
    """One constrained token.

    Attributes:
        token: the id; -1 when none was accepted.
        logw: logarithm of the weight; -inf when none was accepted.
        n_checks: tokens that the constraint was asked about.
    """

    token: int
    logw: float
    n_checks: int


def awrs_step(
    logp: Tensor,
    accept: Accept,
    *,
    method: Method = "auto",
    max_accepts: int = 2,
    max_rejects: int | None = None,
    generator: torch.Generator | None = None,
) -> Step:
    """Draw a valid token with a proper weight (Lipkin et al., algorithms 1 and 2).

    Args:
        logp: (V,) float64 log-probabilities, an entry for the end of the text among them. They need not be
            normalised: the weight scales with their total. Entries of -inf are never proposed.
        accept: whether an id is valid here. Asked at most once an id.
        method: ``"recursive"``, ``"geometric"``, ``"paper"`` (see the module); ``"auto"`` takes the geometric one
            when ``max_accepts`` > 2 or one token has 2/3 of the mass, else the recursive one; ``"lcd"`` returns the
            first valid token with weight 1, which is masked sampling and not properly weighted.
        max_accepts: valid tokens that the geometric estimator counts; more of them lower its variance.
        max_rejects: give up after as many rejected ones. The weight stays unbiased, the token may be missing.
        generator: of the draws, on the device of ``logp``.

    Raises:
        LimitError: another dtype or shape, NaN, an unknown method, ``max_accepts`` or ``max_rejects`` below 2 or
            given to a method that has no use for it.
    """
    check_limits("awrs_step", method, max_accepts, max_rejects)
    if logp.dim() != 1:
        raise LimitError("awrs_step", "logp.shape", tuple(logp.shape), "(V,)", "Pass one row.")
    row = DrawTable(logp[None], generator=generator).row(0)
    return weighted_step(row, accept, method=method, max_accepts=max_accepts, max_rejects=max_rejects)


def check_limits(where: str, method: str, max_accepts: int, max_rejects: int | None) -> None:
    """Refuse settings under which no estimator is properly weighted.

    Raises:
        LimitError: see `awrs_step`.
    """
    if method not in METHODS:
        raise unknown_name(where, "method", str(method), METHODS)
    for name, value in (("max_accepts", max_accepts), ("max_rejects", max_rejects)):
        if value is None and name == "max_rejects":
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 2:
            raise LimitError(where, name, value, "an integer >= 2", "With fewer the weights would be biased.")
    if max_accepts > 2 and method not in ("auto", "geometric"):
        raise LimitError(where, "max_accepts", max_accepts, f"2 for method={method!r}", "Use 'geometric' or 'auto'.")
    if max_rejects is not None and method == "paper":
        mend = "Cutting this estimator short biases it: use 'recursive' or 'geometric'."
        raise LimitError(where, "max_rejects", max_rejects, "None for method='paper'", mend)


def weighted_step(
    row: Draws, accept: Accept, *, method: Method = "auto", max_accepts: int = 2, max_rejects: int | None = None
) -> Step:
    """`awrs_step` on a row that is ready to be drawn from; the settings were checked by `check_limits`."""
    asked = _Asked(accept)
    limit = math.inf if max_rejects is None else max_rejects
    if method == "auto":
        method = "geometric" if max_accepts > 2 or row.top_share >= PEAKED else "recursive"
    if method == "geometric":
        token, logw = _geometric(row, asked, max_accepts, limit)
    elif method == "recursive":
        token, logw = _recursive(row, asked, limit)
    elif method == "paper":
        token, logw = _paper(row, asked)
    else:
        token, logw = _first(row, asked, limit)
    return Step(token, logw, asked.checks)


def first_valid(walk: Walk, accept: Accept, max_rejects: int | None = None) -> Step:
    """The first valid token of a walk, with weight 1."""
    asked = _Asked(accept)
    return Step(*_first(walk, asked, math.inf if max_rejects is None else max_rejects), asked.checks)


class Walk(Protocol):
    """What proposes tokens and can leave them out from then on."""

    def propose(self) -> Candidate | None:
        """The next token, None at the end."""
        ...

    def remove(self) -> None:
        """Leave out the token that was proposed last."""
        ...


class _Asked:
    """A check that remembers what it accepted; rejected tokens are not proposed twice."""

    def __init__(self, accept: Accept) -> None:
        self._accept, self._accepted, self.checks = accept, set[int](), 0

    def __call__(self, token: int) -> bool:
        if token in self._accepted:
            return True
        self.checks += 1
        found = bool(self._accept(token))
        if found:
            self._accepted.add(token)
        return found


NOTHING = (-1, -math.inf)


def _first(walk: Walk, accept: Accept, limit: float) -> tuple[int, float]:
    rejects = 0
    while rejects < limit and (candidate := walk.propose()) is not None:
        if accept(candidate.token):
            return candidate.token, 0.0
        walk.remove()
        rejects += 1
    return NOTHING


def _recursive(row: Draws, accept: Accept, limit: float) -> tuple[int, float]:
    rejects = 0
    while (candidate := row.propose()) is not None:
        left = row.log_left
        if accept(candidate.token):
            if rejects == limit - 1:
                # The next rejection would have ended it: here the token stands for all that is left.
                return candidate.token, left
            row.remove()
            behind = row.propose()  # None: x is all that was left, and its mass is what is left
            return candidate.token, left if behind is not None and accept(behind.token) else candidate.log_mass
        row.remove()
        rejects += 1
        if rejects == limit:
            break
    return NOTHING


def _paper(row: Draws, accept: Accept) -> tuple[int, float]:
    token, left, rejects = -1, -math.inf, 0
    while (candidate := row.propose()) is not None:
        if not accept(candidate.token):
            row.remove()
            rejects += 1
        elif token < 0:
            # The second loop draws afresh, and the accepted token is not taken out.
            token, left = candidate.token, row.log_left
        else:
            return token, left - math.log(rejects + 1)
    return NOTHING


def _geometric(row: Draws, accept: Accept, max_accepts: int, limit: float) -> tuple[int, float]:
    token, accepts, rejects = -1, 0, 0.0
    while accepts < max_accepts:
        rejects += row.phantoms()
        if rejects >= limit or (candidate := row.propose()) is None:
            break
        if accept(candidate.token):
            token = candidate.token if token < 0 else token
            accepts += 1
        else:
            row.remove()
            rejects += 1
    if accepts == 0:
        return NOTHING
    counted = accepts + min(rejects, limit) - 1
    share = math.log(min(max_accepts - 1, accepts)) - math.log(counted) if counted < math.inf else -math.inf
    return token, row.log_total + share
