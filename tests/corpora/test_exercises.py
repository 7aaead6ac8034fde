"""Exercises that can be checked exactly, and gaps in Python source."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenmill import corpora
from tokenmill.corpora import _exercises
from tokenmill.errors import LimitError

TASKS = list(corpora.EXERCISE_TASKS)


@pytest.mark.parametrize("task", TASKS)
def test_one_seed_gives_one_list_and_its_beginning_stays(task: str) -> None:
    first, again, other = (corpora.exercises(task, "train", 20, seed=s) for s in (1, 1, 2))
    assert first == again
    assert first != other
    assert corpora.exercises(task, "train", 30, seed=1)[:20] == first
    assert {x.kind for x in first} == set(corpora.EXERCISE_TASKS[task].kinds)


@pytest.mark.parametrize("task", TASKS)
def test_no_prompt_is_in_two_splits_and_none_is_asked_twice(task: str) -> None:
    drawn = {split: corpora.exercises(task, split, 300) for split in ("train", "validation", "test")}
    prompts = {split: {x.prompt for x in found} for split, found in drawn.items()}
    for one, other in itertools.combinations(prompts.values(), 2):
        assert not one & other
    assert len(prompts["test"]) == len(prompts["validation"]) == 300
    assert len({x.id for found in drawn.values() for x in found}) == 900


@pytest.mark.parametrize("task", TASKS)
def test_prompts_and_answers_fit_the_task(task: str) -> None:
    about = corpora.EXERCISE_TASKS[task]
    found = corpora.exercises(task, "train", 600, seed=3)
    for x in found:
        assert set(x.prompt + x.answer) <= set(about.alphabet)
        assert len(x.prompt) <= about.prompt
        assert len(x.answer) < about.answer  # an end-of-text token follows
        assert x.check(x.answer)
        assert not x.check(x.answer[:-1])
        assert not x.check("")
    assert max(len(x.prompt) for x in found) == about.prompt
    assert max(len(x.answer) for x in found) >= about.answer * 0.5
    assert about.answer % about.block == 0


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000))
def test_answers_are_true(seed: int) -> None:
    for task in TASKS:
        (x,) = corpora.exercises(task, "train", 1, seed=seed)
        match x.kind:
            case "add":
                assert int(x.answer) == sum(map(int, x.prompt[:-1].split("+")))
            case "reverse":
                assert x.answer == x.prompt[:0:-1]
            case "permutation":
                assert sorted(x.answer) == list(x.prompt[1:])
                assert len(set(x.answer)) == len(x.answer)
                assert x.check(x.prompt[1:])
                assert not x.check(x.answer[0] * len(x.answer))
            case "count":
                values = list(map(int, (x.prompt + x.answer).split(";")[:-1]))
                assert [b - a for a, b in itertools.pairwise(values)] == [1] * (len(values) - 1)
                assert [v % 100 == 0 for v in values] == [False] * (len(values) - 1) + [True]
                assert 48 <= len(x.answer) <= 120
            case "verse":
                lines = [(x.prompt + x.answer)[at : at + 5] for at in range(0, 5 + len(x.answer), 5)]
                assert {line[:3] for line in lines} == {x.prompt[:3]}
                assert [int(line[3:]) for line in lines] == list(range(int(x.prompt[3:]), -1, -1))
                assert 50 <= len(x.answer) <= 120
            case "totals":
                terms = list(map(int, x.prompt[:-1].split("+")))
                assert x.answer == "".join(f"{total:03d};" for total in itertools.accumulate(terms))
            case _:
                _is_sudoku(x)


def _is_sudoku(x: corpora.Exercise) -> None:
    shown, grid = x.prompt[1:-1], np.array(list(x.answer)).reshape(4, 4)
    boxes = [grid[r : r + 2, c : c + 2].ravel() for r in (0, 2) for c in (0, 2)]
    assert all(set(group) == set("1234") for group in (*grid, *grid.T, *boxes))
    assert all(c in ("_", d) for c, d in zip(shown, x.answer, strict=True))
    assert 4 <= 16 - shown.count("_") <= 9
    other = x.answer.translate(str.maketrans("1234", "2143"))
    assert not x.check(other)  # a filled grid that keeps no clue


def test_there_are_288_grids_and_a_puzzle_has_one_solution() -> None:
    grids = {"".join(row) for row in _exercises._grids()}
    assert len(grids) == 288
    for x in corpora.exercises("hard", "test", 40, kinds=["sudoku"]):
        clues = x.prompt[1:-1]
        fitting = [g for g in grids if all(c in ("_", d) for c, d in zip(clues, g, strict=True))]
        assert fitting == [x.answer]


def test_the_kinds_can_be_chosen() -> None:
    assert {x.kind for x in corpora.exercises("long", "test", 20, kinds=["verse"])} == {"verse"}


def test_answers_end_at_the_first_end_of_text() -> None:
    class Words:
        eos_token_id = 1

        def decode(self, ids: Any, skip_special_tokens: bool) -> str:
            assert skip_special_tokens
            return " ".join(map(str, ids))

    assert corpora.answer_text(Words(), [5, 6, 1, 7, 1]) == "5 6"
    assert corpora.answer_text(Words(), [5, 6]) == "5 6"
    assert corpora.answer_text(Words(), [1, 5]) == ""


def test_gaps_lie_inside_windows_of_files_of_their_split() -> None:
    gaps = corpora.python_gaps("test", 40, seed=2)
    assert gaps == corpora.python_gaps("test", 40, seed=2)
    assert gaps != corpora.python_gaps("test", 40, seed=3)
    files = {record.id: record.text for record in corpora.load("python-stdlib").split("test")}
    for gap in gaps:
        name, _, at = gap.id.partition("@")
        assert files[name][int(at) : int(at) + len(gap.gap)] == gap.gap
        assert gap.text in files[name]
        assert len(gap.text) == corpora.PYTHON_WINDOW
        assert 4 <= len(gap.gap) <= 8
        assert min(len(gap.before), len(gap.after)) >= corpora.PYTHON_WINDOW // 4
        assert gap.check(gap.gap)
        assert not gap.check(gap.gap + " ")


def test_what_is_not_there_is_refused() -> None:
    with pytest.raises(LimitError, match="task"):
        corpora.exercises("easy", "train", 1)
    with pytest.raises(LimitError, match="split"):
        corpora.exercises("mixed", "dev", 1)
    with pytest.raises(LimitError, match="kinds"):
        corpora.exercises("mixed", "train", 1, kinds=["verse"])
    with pytest.raises(LimitError, match="count = 0"):
        corpora.exercises("mixed", "train", 0)
    with pytest.raises(LimitError, match="at most about"):
        corpora.exercises("mixed", "validation", 5_000, kinds=["add"])
    with pytest.raises(LimitError, match="count = 0"):
        corpora.python_gaps("train", 0)
