"""Answers are scored for what they say, not for how they are wrapped; tables, intervals and contours by hand."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.probe.solvers import guess
from tokenmill.errors import LimitError
from tokenmill.probe import Answer, Example, effective_context, oracle, wilson
from tokenmill.probe._contours import contour, crossing
from tokenmill.probe._oracle import follow
from tokenmill.probe._scores import aggregate
from tokenmill.probe.needle_threading import TASKS, generate, score

WRAPPINGS = ("{}", "  {}\n", '"{}"', "'{}'", "`{}`", "```\n{}\n```", "```json\n{}\n```", " \n\t{}", "{}\nThat is all.")
ASKED: dict[str, list[dict[str, Any]]] = {
    "single": [{"depth": d} for d in (0, 37, 100)],
    "multiple": [{"num_needles": n, "placement": p} for n in (1, 2, 9) for p in ("random", "clustered")],
    "conditional": [{"num_needles": n, "character": c} for n in (1, 2, 9) for c in "*&"],
    "threading": [{"thread_length": n, "direction": d} for n in (1, 2, 7) for d in ("forward", "backward", "random")],
    "multi-threading": [{"num_threads": t, "thread_length": n} for t in (1, 4) for n in (1, 5)],
    "branched": [
        {"branching_factor": b, "thread_length": n, "branches": w}
        for b in (2, 3) for n in (3, 5) for w in ("final", "all")
    ],
}  # fmt: skip


def answer(task: str, context: int, correct: float, **meta: Any) -> Answer:
    error = "" if correct >= 0 else "too long"
    return Answer("k", "m", 0, task, context, meta, "", [], max(correct, 0.0), 0, error)


@pytest.mark.prop("needle-threading", 2)
@pytest.mark.parametrize("task", TASKS)
def test_the_oracle_is_right_every_time_and_chance_hardly_ever(task: str) -> None:
    """A thousand examples of each task; guesses of single values of 40 pairs are right once in 40 times."""
    right, n = 0.0, 0
    rng = random.Random(task)
    for seed in range(math.ceil(1000 / len(ASKED[task]))):
        for params in ASKED[task]:
            example = generate(task, n_pairs=40, seed=seed, **params)
            assert score(example, oracle(example)).correct == 1.0
            assert score(example, oracle(example)).wrong == 0
            if len(example.values) == 1:
                n += 1
                right += score(example, guess(example, rng)).correct
    if n:
        assert right / n < 1 / 40 + 4 * math.sqrt(1 / 40 / n)


@pytest.mark.prop("needle-threading", 2)
@given(data=st.data(), length=st.integers(1, 10), seed=st.integers(0, 2**32))
def test_exactly_so_many_lookups_reach_the_end_of_a_thread(data: Any, length: int, seed: int) -> None:
    n = data.draw(st.integers(2 * length, 2 * length + 30))
    example = generate("multi-threading", n_pairs=n, seed=seed, num_threads=2, thread_length=length, direction="random")
    held = json.loads(example.haystack)
    for key, gold in zip(example.keys, example.values, strict=True):
        assert follow(held, key, length) == gold
        assert all(follow(held, key, steps) != gold for steps in range(length))
        assert follow(held, key, length + 1) is None
        assert gold not in held
        # What a thread passes is in the haystack too, and is not the answer.
        partial = [follow(held, key, steps) or "" for steps in range(length)]
        alone = replace(example, keys=[key], values=[gold], meta={**example.meta, "task": "threading"})
        assert [score(alone, value).correct for value in partial] == [0.0] * length


@pytest.mark.prop("needle-threading", 6)
@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("task", ["single", "threading"])
def test_wrapping_does_not_change_the_score_of_a_single_value(task: str, wrapping: str) -> None:
    example = generate(task, n_pairs=30, seed=3)
    other = generate("single", n_pairs=30, seed=4).values[0]
    assert score(example, wrapping.format(example.values[0])).correct == 1.0
    assert score(example, wrapping.format(other)).correct == 0.0
    assert score(example, wrapping.format(example.keys[0])).correct == 0.0
    assert score(example, f"The value of {example.keys[0]} is {example.values[0]}, not {other}.").correct == 1.0
    assert score(example, json.dumps({example.keys[0]: example.values[0]})).correct == 1.0
    assert score(example, example.values[0][:-1]).correct == 0.0


@pytest.mark.prop("needle-threading", 6)
@pytest.mark.parametrize("wrapping", [*WRAPPINGS[:2], *WRAPPINGS[5:]])
def test_order_counts_for_keys_and_not_for_sets(wrapping: str) -> None:
    lists = generate("multiple", n_pairs=30, num_needles=4)
    sets = generate("conditional", n_pairs=30, num_needles=4)
    for example, turned in ((lists, 0.0), (sets, 1.0)):
        told = wrapping.format(json.dumps(example.values))
        assert score(example, told).correct == 1.0
        assert score(example, wrapping.format(str(example.values))).correct == 1.0, "Python's quotes"
        assert score(example, wrapping.format("\n".join(example.values))).correct == 1.0
        assert score(example, wrapping.format(json.dumps(example.values)[:-1])).correct == 1.0, "no closing bracket"
        assert score(example, wrapping.format(json.dumps(example.values[::-1]))).correct == turned
        assert score(example, wrapping.format(json.dumps(example.values[:3]))).correct == 0.75
        pairs = zip(example.keys or ["?"] * 4, example.values, strict=True)
        assert score(example, "\n".join(f"{key}: {value}" for key, value in pairs)).correct == 1.0


@pytest.mark.prop("needle-threading", 6)
def test_repeating_does_not_help_and_nothing_is_nothing() -> None:
    for task in TASKS:
        example = generate(task, n_pairs=60, seed=1)
        assert score(example, json.dumps(example.values * 3)).correct <= 1.0
        for empty in ("", " \n", "[]", "```json\n```", '""', "I do not know."):
            assert score(example, empty).correct == 0.0
    sets = generate("conditional", n_pairs=30, num_needles=4)
    assert score(sets, json.dumps([sets.values[0]] * 4)).correct == 0.25
    everything = json.dumps(list(json.loads(sets.haystack).values()))
    assert score(sets, everything).wrong == 26, "whoever lists all is found out"


@given(text=st.text(alphabet="[]{}()'\",:-0123456789abcdef\\ \n*`", max_size=300))
def test_no_answer_can_break_the_scorer(text: str) -> None:
    for task in ("single", "multiple", "conditional"):
        scored = score(generate(task, n_pairs=12), text)
        assert 0 <= scored.correct <= 1
    hostile = ["[" * 50_000 + "]", "[" + "1+" * 20_000 + "1]", "[__import__('os').getcwd()]", "['\x00']", "[1, 2]"]
    assert all(score(generate("multiple", n_pairs=12), one).correct == 0 for one in hostile)


@pytest.mark.prop("needle-threading", 7)
def test_wilsons_interval_by_hand() -> None:
    assert wilson(1.0, 5) == (pytest.approx(0.566, abs=5e-4), 1.0)
    low, high = wilson(0.5454, 55)
    assert (low, high) == (pytest.approx(0.415, abs=5e-4), pytest.approx(0.670, abs=5e-4))
    for bad in ((0.5, 0), (1.1, 3), (-0.1, 3), (float("nan"), 3)):
        with pytest.raises(LimitError):
            wilson(*bad)


@pytest.mark.prop("needle-threading", 7)
@given(p=st.floats(0, 1), n=st.integers(1, 10**6))
def test_wilsons_interval_lies_in_0_to_1_and_holds_the_share(p: float, n: int) -> None:
    low, high = wilson(p, n)
    assert 0 <= low <= p <= high <= 1
    assert high - low < 4 / math.sqrt(n)


def test_the_table_has_tasks_in_order_and_counts_what_failed() -> None:
    given_ = [answer("threading", 800, 0.0), answer("single", 1600, 1.0), answer("single", 800, 1.0)]
    given_ += [answer("single", 800, 0.0), answer("single", 800, -1), answer("single", 3200, -1)]
    cells = aggregate(given_)
    assert [(c.task, c.context, c.n, c.accuracy, c.failed) for c in cells] == [
        ("single", 800, 2, 0.5, 1), ("single", 1600, 1, 1.0, 0), ("single", 3200, 0, None, 1),
        ("threading", 800, 1, 0.0, 0),
    ]  # fmt: skip
    assert (cells[0].low, cells[0].high) == wilson(0.5, 2)
    assert aggregate([]) == []


@pytest.mark.prop("needle-threading", 7)
def test_the_effective_context_is_where_accuracy_first_falls() -> None:
    assert crossing({800: 1.0, 1600: 1.0}, 0.75) == 1600
    assert crossing({1600: 1.0, 800: 0.7}, 0.75) == 0, "the first length is too long already"
    assert crossing({800: 1.0, 1600: 0.5}, 0.75) == 1200
    assert crossing({800: 1.0, 1600: 0.0, 3200: 1.0}, 0.75) == 1000, "what comes back later does not count"
    assert crossing({800: 0.75, 1600: 0.0}, 0.75) == 800
    assert crossing({800: 1.0, 1600: None, 3200: 1.0}, 0.75) == 800
    assert crossing({800: None}, 0.75) == 0


@pytest.mark.prop("needle-threading", 7)
def test_the_contour_runs_along_positions_and_its_worst_point_counts() -> None:
    table = {"0": (1, 1, 1), "50": (1, 0.5, 0), "100": (1, 1, 0)}
    given_ = [
        answer("single", context, value, needle_depth=depth)
        for depth, values in table.items()
        for context, value in zip((800, 1600, 3200), values, strict=True)
    ]
    assert contour(given_, "needle_depth") == {"0": 3200, "50": 1200, "100": 2000}
    assert effective_context(given_) == 1200
    assert effective_context(given_, at=100) == 2000
    assert effective_context(given_, 1.0, at="50") == 800
    assert effective_context(given_, along="num_needles") == pytest.approx(1600 + 1600 / 6), "all depths as one"
    threads = [answer("multi-threading", 800, 1.0 - t / 10, num_threads=t) for t in (2, 3, 10)]
    assert effective_context(threads, at=2) == 800
    assert effective_context(threads) == 0
    assert list(contour(threads, "num_threads")) == ["2", "3", "10"]
    for bad in ({"threshold": 0}, {"threshold": 1.5}, {"at": 7}, {"along": "depth"}):
        with pytest.raises(LimitError):
            effective_context(given_, **bad)
    for answers in ([], [*given_, *threads]):
        with pytest.raises(LimitError, match="one task"):
            effective_context(answers)


def test_an_oracle_needs_no_more_than_the_example() -> None:
    example = generate("branched", n_pairs=30, branching_factor=3, thread_length=4, branches="all")
    bare = Example(0, example.haystack, "", example.keys, [], example.meta)
    assert sorted(json.loads(oracle(bare))) == sorted(example.values)


def test_names_are_read_out_of_an_answer_like_uuids() -> None:
    example = generate("multiple", n_pairs=9, seed=2, keys="name", num_needles=2)
    first, second = example.values
    assert score(example, f"{first} , {second}").correct == 1.0
    assert score(example, f"the values are: {first}; {second}.").parsed == [first, second]
    assert score(example, f"{second} {first}").correct == 0.0
    assert score(example, f"{example.keys[0]} {first}x").parsed == []
    single = generate("single", n_pairs=9, seed=2, keys="name")
    assert score(single, f"of {single.keys[0]} it is {single.values[0]}").correct == 1.0
    other = generate("single", n_pairs=9, seed=2, keys="uuid")
    assert score(other, f"it is {other.values[0]}").correct == 1.0
