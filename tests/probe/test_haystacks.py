"""Haystacks and the needles in them: sizes, golden bytes, where needles and threads lie."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenmill.errors import LimitError
from tokenmill.probe import Example, haystack, oracle
from tokenmill.probe._haystack import NAMES, draw, name, pairs, render
from tokenmill.probe.needle_threading import generate, score

SEEDS = st.integers(0, 2**64)
DIRECTIONS = ("forward", "backward", "random")


def content(example: Example) -> dict[str, str]:
    return json.loads(example.haystack)


def chain(example: Example, start: str) -> list[int]:
    """Indices of the pairs that a thread passes."""
    held = content(example)
    places = {key: i for i, key in enumerate(held)}
    found = [places[start]]
    while (at := held[start]) in places:
        found.append(places[at])
        start = at
    return found


@given(n=st.integers(1, 300), seed=SEEDS)
@pytest.mark.prop("needle-threading", 1)
def test_a_haystack_is_80_characters_a_pair_and_json_with_unique_keys(n: int, seed: int) -> None:
    text = haystack(n, seed)
    held = json.loads(text)
    assert len(text) == 80 * n
    assert len({*held, *held.values()}) == 2 * n
    assert text == json.dumps(held)
    assert text == json.dumps(dict(pairs(n, seed)))
    assert haystack(n, seed) == text
    assert haystack(n + 1, seed).startswith(text[:-1])


@pytest.mark.prop("needle-threading", 1)
def test_the_published_example_comes_out_byte_for_byte() -> None:
    example = generate("single", n_pairs=25, depth=50)
    held = list(content(example).items())
    assert held[0] == ("e3e70682-c209-4cac-629f-6fbed82c07cd", "f728b4fa-4248-5e3a-0a5d-2f346baa9455")
    assert held[-1][1] == "964a870c-7c87-9b74-1d87-8f9f9cdf5a86"
    assert held[12] == ("247a8333-f7b0-b7d2-cda8-056c3d15eef7", "1759edc3-72ae-2244-8b01-63c1cd9d2b7d")
    question = "Extract the value corresponding to the specified key in the JSON object. "
    question += 'Key: "247a8333-f7b0-b7d2-cda8-056c3d15eef7"\n Corresponding value: '
    published = {
        "id": 0, "haystack": haystack(25), "keys": held[12][0], "values": held[12][1], "question": question,
        "context_length": 2000, "num_kv_pairs": 25, "repeat_number": 0, "needle_depth": "50", "num_needles": 1,
        "needle_placement": "depthwise", "conditional_character": "N/A", "thread_length": 1,
        "thread_direction": "N/A", "num_threads": 0,
    }  # fmt: skip
    assert example.row() == published | {"task": "single"}
    assert example.prompt == f"{haystack(25)}\n{question}"


@pytest.mark.prop("needle-threading", 1)
def test_bytes_are_the_same_in_every_process_and_stay_what_they_are() -> None:
    """What other versions of Python must give as well: digests of examples of every task."""
    digests = {
        task: hashlib.sha256(json.dumps(generate(task, n_pairs=40, seed=7).row()).encode()).hexdigest()[:12]
        for task in GOLDEN
    }
    assert digests == GOLDEN
    code = "from tokenmill.probe.needle_threading import generate; print(generate('branched', n_pairs=40).row())"
    runs = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, env=env).stdout
        for env in ({"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(filter(None, sys.path))} for seed in ("1", "2"))
    }
    assert len(runs) == 1


GOLDEN = {
    "single": "9652acb204a7",
    "multiple": "9eb68877d556",
    "conditional": "467dceac08bf",
    "threading": "011b9f446f27",
    "multi-threading": "0743a52c5d6c",
    "branched": "fc40895631e9",
}


@pytest.mark.prop("needle-threading", 3)
@given(n=st.integers(1, 200), depth=st.sampled_from([0, 10, 33.3, 50, 90, 100]), seed=SEEDS)
def test_depth_0_is_the_first_pair_and_100_the_last(n: int, depth: float, seed: int) -> None:
    example = generate("single", n_pairs=n, depth=depth, seed=seed)
    at = list(content(example)).index(example.keys[0])
    assert at == int(depth * (n - 1) / 100)
    assert depth not in (0, 100) or at == (n - 1) * (depth == 100)


@pytest.mark.prop("needle-threading", 3)
@given(data=st.data(), n=st.integers(1, 120), seed=SEEDS)
def test_clustered_needles_lie_side_by_side_and_random_ones_anywhere(data: Any, n: int, seed: int) -> None:
    k = data.draw(st.integers(1, n))
    for task in ("multiple", "conditional"):
        for placement in ("random", "clustered"):
            example = generate(task, n_pairs=n, num_needles=k, placement=placement, seed=seed)
            held = list(content(example).values())
            places = sorted(held.index(value) for value in example.values)
            assert len(set(places)) == k
            if placement == "clustered":
                assert places == list(range(places[0], places[0] + k))


@pytest.mark.prop("needle-threading", 3)
@given(data=st.data(), length=st.integers(1, 12), seed=SEEDS)
def test_forward_threads_rise_and_backward_ones_fall(data: Any, length: int, seed: int) -> None:
    threads = data.draw(st.integers(1, 5))
    n = data.draw(st.integers(threads * length, threads * length + 40))
    for direction in DIRECTIONS:
        how: dict[str, Any] = {"num_threads": threads, "thread_length": length, "direction": direction}
        example = generate("multi-threading", n_pairs=n, seed=seed, **how)
        for key in example.keys:
            places = chain(example, key)
            assert len(places) == length
            if direction == "forward":
                assert places == sorted(places)
            if direction == "backward":
                assert places == sorted(places, reverse=True)


@pytest.mark.prop("needle-threading", 3)
def test_random_threads_go_both_ways() -> None:
    """Of 300 random threads of 6 steps, all but the few in 6! that a draw happens to sort turn at least once."""
    turning = 0
    for seed in range(300):
        example = generate("threading", n_pairs=60, thread_length=6, direction="random", seed=seed)
        places = chain(example, example.keys[0])
        turning += places not in (sorted(places), sorted(places, reverse=True))
    assert turning >= 295


@pytest.mark.prop("needle-threading", 4)
@given(data=st.data(), length=st.integers(1, 8), seed=SEEDS)
def test_threads_share_no_pair_and_nothing_else_links(data: Any, length: int, seed: int) -> None:
    threads = data.draw(st.integers(1, 6))
    n = data.draw(st.integers(threads * length, threads * length + 40))
    example = generate("multi-threading", n_pairs=n, seed=seed, num_threads=threads, thread_length=length)
    held = content(example)
    passed = [chain(example, key) for key in example.keys]
    flat = [at for places in passed for at in places]
    assert len(flat) == len(set(flat)) == threads * length
    keys = list(held)
    by_design = {keys[at] for places in passed for at in places[1:]}
    assert {value for value in held.values() if value in held} == by_design
    assert len(set(held.values())) == n
    assert not set(example.values) & set(held)


@pytest.mark.prop("needle-threading", 4)
@given(data=st.data(), n=st.integers(1, 80), seed=SEEDS, character=st.sampled_from(["*", "&"]))
def test_exactly_the_needles_keys_contain_the_character(data: Any, n: int, seed: int, character: str) -> None:
    k = data.draw(st.integers(1, n))
    example = generate("conditional", n_pairs=n, num_needles=k, character=character, seed=seed)
    held = content(example)
    assert example.haystack.count(character) == k
    assert [value for key, value in held.items() if key.count(character) == 1] == example.values
    assert all(len(key) == 36 for key in held)
    assert len(example.haystack) == 80 * n
    assert example.keys == []
    assert f'"{character}"' in example.question


@pytest.mark.prop("needle-threading", 5)
@given(data=st.data(), length=st.integers(2, 10), seed=SEEDS)
def test_the_haystack_in_reverse_turns_forward_into_backward_with_the_same_answer(
    data: Any, length: int, seed: int
) -> None:
    n = data.draw(st.integers(length, length + 60))
    forward = generate("threading", n_pairs=n, thread_length=length, seed=seed)
    places = chain(forward, forward.keys[0])
    turned = Example(0, render(list(content(forward).items())[::-1]), "", forward.keys, forward.values, forward.meta)
    back = chain(turned, forward.keys[0])
    assert back == [n - 1 - at for at in places]
    assert back == sorted(back, reverse=True)
    assert list(content(turned).values())[back[-1]] == forward.values[0]
    # What is generated as backward passes the same pairs the other way.
    backward = generate("threading", n_pairs=n, thread_length=length, direction="backward", seed=seed)
    assert chain(backward, backward.keys[0]) == places[::-1]


@given(data=st.data(), factor=st.integers(2, 4), length=st.integers(3, 6), seed=SEEDS)
def test_branches_fork_and_one_goes_on(data: Any, factor: int, length: int, seed: int) -> None:
    how: dict[str, Any] = {"branching_factor": factor, "thread_length": length}
    n = data.draw(st.integers(length * factor, length * factor + 30))
    for branches, direction in zip(("final", "all"), data.draw(st.permutations(DIRECTIONS)), strict=False):
        example = generate("branched", n_pairs=n, seed=seed, branches=branches, direction=direction, **how)
        held = content(example)
        values, level, passed = held, [held[example.keys[0]]], 1
        while after := [v for v in level for i in range(factor + 1) if f"{v}-{i + 1}" in values]:
            assert len(after) == 1 or len(set(after)) == 1, "one value goes on"
            stem = after[0]
            level = [held[f"{stem}-{i + 1}"] for i in range(len(after))]
            passed += 1
            ends = passed == length and branches == "final"
            assert len(level) == (1 if ends else factor)
        assert passed == length
        assert sorted(example.values) == sorted(level)
        extra = sum(len(key) - 36 for key in held)
        assert len(example.haystack) == 80 * n + extra


@given(n=st.integers(1, 50), seed=SEEDS)
def test_a_draw_is_without_replacement_and_a_shorter_one_is_its_beginning(n: int, seed: int) -> None:
    whole = draw(random.Random(seed), n, n)
    assert sorted(whole) == list(range(n))
    assert draw(random.Random(seed), n, n // 2) == whole[: n // 2]


@pytest.mark.parametrize(
    ("task", "params", "words"),
    [
        ("threads", {}, "did you mean"),
        ("single", {"depth": 101}, "depth = 101"),
        ("single", {"depth": -1}, "depth = -1"),
        ("single", {"dept": 5}, "dept"),
        ("multiple", {"num_needles": 0}, "num_needles = 0"),
        ("multiple", {"num_needles": True}, "num_needles = True"),
        ("multiple", {"num_needles": 26}, "26"),
        ("multiple", {"placement": "clusterd"}, "clustered"),
        ("multiple", {"placement": "clustered", "num_needles": 30}, "30"),
        ("conditional", {"character": "a"}, "character = 'a'"),
        ("threading", {"thread_length": 0}, "thread_length = 0"),
        ("threading", {"thread_length": 2.5}, "thread_length = 2.5"),
        ("threading", {"direction": "up"}, "direction = 'up'"),
        ("multi-threading", {"num_threads": 5, "thread_length": 25}, "125.*25 pairs"),
        ("branched", {"branching_factor": 1}, "branching_factor = 1"),
        ("branched", {"thread_length": 2}, "thread_length = 2"),
        ("branched", {"branches": "some"}, "branches = 'some'"),
    ],
)
def test_bad_questions_are_refused_by_name(task: str, params: dict[str, Any], words: str) -> None:
    with pytest.raises(LimitError, match=f"(?i){words}"):
        generate(task, n_pairs=25, **params)


@pytest.mark.parametrize(
    ("lengths", "words"),
    [
        ({}, "exactly one"),
        ({"n_pairs": 3, "n_chars": 800}, "exactly one"),
        ({"n_pairs": 0}, "n_pairs = 0"),
        ({"n_pairs": -3}, "n_pairs = -3"),
        ({"n_pairs": True}, "n_pairs = True"),
        ({"n_chars": 79}, "n_chars = 79.*80"),
        ({"n_chars": 80.5}, "n_chars = 80.5"),
        ({"n_tokens": 100}, "tokenizer"),
        ({"n_pairs": 2, "seed": -1}, "seed = -1"),
        ({"n_pairs": 2, "seed": 0.5}, "seed = 0.5"),
    ],
)
def test_bad_lengths_are_refused_by_name(lengths: dict[str, Any], words: str) -> None:
    with pytest.raises(LimitError, match=words):
        generate("single", **lengths)


@given(n=st.integers(1, NAMES // 2), seed=SEEDS)
def test_a_haystack_of_names_is_16_characters_a_pair_and_nothing_comes_twice(n: int, seed: int) -> None:
    text = haystack(n, seed, "name")
    held = json.loads(text)
    assert len(text) == 16 * n
    assert len({*held, *held.values()}) == 2 * n
    assert text == json.dumps(held)
    if n < NAMES // 2:
        assert haystack(n + 1, seed, "name").startswith(text[:-1])


def test_names_are_all_different_and_run_out() -> None:
    assert len({name(number) for number in range(NAMES)}) == NAMES == 4096
    assert haystack(2, 0, "name") == '{"tobo": "sama", "kovu": "hano"}'
    with pytest.raises(LimitError, match="at most 2048"):
        haystack(NAMES // 2 + 1, 0, "name")
    with pytest.raises(LimitError, match="uuid"):
        haystack(2, 0, "uid")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("task", GOLDEN)
def test_every_task_can_be_asked_with_names(task: str) -> None:
    example = generate(task, n_pairs=40, seed=3, keys="name")
    assert score(example, oracle(example)).correct == 1.0
    assert score(example, "nothing here").correct == 0.0
    assert example.meta["key_kind"] == "name"
    assert len(example.haystack) >= 16 * 40
    found = generate(task, n_chars=640, seed=3, keys="name")
    assert len(found.haystack) <= 640
