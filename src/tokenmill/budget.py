"""Shares to counts: the one place that turns `keep` into a number of tokens."""

from __future__ import annotations

from decimal import ROUND_HALF_UP, Decimal

from .errors import LimitError

_LIMIT = "a share in (0, 1] given as a float, or a count >= 1 given as an int"


def check(where: str, keep: float, *, parameter: str = "keep") -> None:
    """Refuse a budget that is neither a share nor a count.

    Raises:
        LimitError: for a bool, another type, a share outside (0, 1] or a count below 1.
    """
    if isinstance(keep, bool) or not isinstance(keep, int | float):
        raise LimitError(where, parameter, keep, _LIMIT)
    if isinstance(keep, int):
        if keep < 1:
            raise LimitError(where, parameter, keep, _LIMIT)
    elif not 0.0 < keep <= 1.0:  # false for NaN as well
        raise LimitError(where, parameter, keep, _LIMIT, "A float is a share; write an int for a count.")


def to_count(where: str, keep: float, total: int, *, parameter: str = "keep") -> int:
    """Turn a budget into a count of tokens out of `total`.

    A share is multiplied as the decimal number that was written and rounded to the nearest integer, halves up, and
    at least one token is kept: 0.9 of 100 is 90, 0.1 of 100 is 10, 0.5 of 5 is 3, 0.001 of 10 is 1. A count comes
    back as it is, also above `total`: whoever clamps it records that in the report.

    Raises:
        LimitError: for a bad budget, or for a share of nothing.
    """
    check(where, keep, parameter=parameter)
    if isinstance(keep, int):
        return keep
    if total < 1:
        raise LimitError(where, "total", total, "at least 1", "There is nothing to take a share of.")
    exact = Decimal(repr(float(keep))) * total
    return max(1, int(exact.to_integral_value(rounding=ROUND_HALF_UP)))
