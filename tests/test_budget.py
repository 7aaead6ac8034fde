"""Shares and counts."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenmill.budget import check, to_count
from tokenmill.errors import LimitError


@pytest.mark.parametrize(
    ("keep", "total", "count"),
    [(0.9, 100, 90), (0.1, 100, 10), (0.5, 5, 3), (0.001, 10, 1), (1.0, 7, 7), (0.29, 100, 29), (0.35, 10, 4)],
)
def test_a_share_is_rounded_to_the_nearest_count_halves_up(keep: float, total: int, count: int) -> None:
    assert to_count("here", keep, total) == count


def test_a_count_stays_as_it_is_also_above_the_total() -> None:
    assert to_count("here", 64, 20) == 64
    assert to_count("here", 1, 20) == 1


@given(st.integers(1, 1000), st.integers(1, 5000))
def test_a_share_is_never_off_by_more_than_a_half(thousandths: int, total: int) -> None:
    count = to_count("here", thousandths / 1000, total)
    exact = Fraction(thousandths, 1000) * total
    assert 1 <= count <= total
    assert abs(count - exact) <= Fraction(1, 2) or (count == 1 and exact < Fraction(1, 2))


@pytest.mark.parametrize("keep", [True, False, 0, -1, 0.0, 1.5, -0.1, math.nan, math.inf, "0.5", None])
def test_other_values_are_refused_with_the_name(keep: Any) -> None:
    with pytest.raises(LimitError, match="here: budget = "):
        check("here", keep, parameter="budget")
    with pytest.raises(LimitError):
        to_count("here", keep, 10)


def test_a_share_of_nothing_is_refused() -> None:
    with pytest.raises(LimitError, match="total = 0"):
        to_count("here", 0.5, 0)
