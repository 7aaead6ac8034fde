"""Statistics of paired timings."""

from __future__ import annotations

import numpy as np
import pytest

from tokenmill.bench.measure import means, percentiles, ratio_of_medians, timed, turned


def test_turned_rotates() -> None:
    assert [turned("abc", i) for i in range(4)] == [list("abc"), list("bca"), list("cab"), list("abc")]
    assert turned([], 3) == []


def test_timed_gives_the_result_and_a_time() -> None:
    ms, value = timed(lambda: sum(range(1000)))
    assert value == 499500
    assert ms > 0


def test_percentiles() -> None:
    assert percentiles(list(range(101))) == {"ms_p20": 20.0, "ms_p50": 50.0, "ms_p80": 80.0}


def test_ratio_of_medians_and_its_interval() -> None:
    draws = np.random.default_rng(1)
    plain = (100 + draws.normal(size=60)).tolist()
    ours = [ms * 0.5 + float(draws.normal()) * 0.2 for ms in plain]
    ratio, low, high = ratio_of_medians(ours, plain, seed=0)
    assert ratio == pytest.approx(np.median(ours) / np.median(plain))
    assert low <= ratio <= high
    assert 0.49 < low < high < 0.51
    assert ratio_of_medians(ours, plain, seed=0) == [ratio, low, high]
    assert ratio_of_medians([2.0, 2.0], [1.0, 1.0], seed=0) == [2.0, 2.0, 2.0]


def test_the_interval_is_of_pairs() -> None:
    """Items differ a hundredfold, but the ratio does not: pairs know it, and unpaired draws would not."""
    plain = np.geomspace(1, 100, 41).tolist()
    assert ratio_of_medians([2 * ms for ms in plain], plain, seed=3) == pytest.approx([2.0, 2.0, 2.0])


def test_means_are_over_the_rows_that_have_the_key() -> None:
    assert means([{"a": 1.0}, {"a": 3.0, "b": 5.0}]) == {"a": 2.0, "b": 5.0}
