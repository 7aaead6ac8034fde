from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tokenmill.decode._ngram import longest_match


def slow_match(ids: list[int], length: int, longest: int) -> tuple[list[int], int]:
    """Try every earlier end, later ones winning; copy token by token, over what was copied as well."""
    best, end = 0, -1
    for candidate in range(len(ids) - 1):
        matched = 0
        while matched < min(longest, candidate + 1) and ids[candidate - matched] == ids[len(ids) - 1 - matched]:
            matched += 1
        if matched and matched >= best:
            best, end = matched, candidate
    if not best:
        return [], 0
    text = list(ids)
    for i in range(length):
        text.append(text[end + 1 + i])
    return text[len(ids) :], best


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 12), st.integers(1, 8))
def test_equals_the_slow_search(ids: list[int], length: int, longest: int) -> None:
    found, matched = longest_match(np.array(ids), length=length, longest=longest)
    assert (found.tolist(), matched) == slow_match(ids, length, longest)


def test_the_longest_match_beats_a_later_shorter_one() -> None:
    ids = np.array([1, 2, 3, 7, 9, 3, 8, 1, 2, 3])
    continuation, matched = longest_match(ids, length=2)
    assert continuation.tolist() == [7, 9]
    assert matched == 3


def test_of_equally_long_matches_the_latest_counts() -> None:
    assert longest_match(np.array([5, 1, 5, 2, 5]), length=1)[0].tolist() == [2]


def test_a_match_at_the_end_goes_on_periodically() -> None:
    continuation, matched = longest_match(np.array([4, 1, 2, 3, 1, 2, 3, 1, 2]), length=7)
    assert continuation.tolist() == [3, 1, 2, 3, 1, 2, 3]
    assert matched == 5


def test_nothing_is_found_in_new_text() -> None:
    continuation, matched = longest_match(np.array([1, 2, 3]), length=4)
    assert continuation.size == 0
    assert matched == 0
    assert longest_match(np.array([1, 1, 1]), length=0)[0].size == 0
    assert longest_match(np.array([1]), length=3)[1] == 0
