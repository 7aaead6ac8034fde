"""Suites: their size and order, files with the published columns, settings that are refused, and plots."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.probe.solvers import characters, solving
from tokenmill import method
from tokenmill.errors import LimitError
from tokenmill.probe import NeedleThreading, build_suite, draw_plots, from_jsonl, haystack, to_jsonl, token_profile
from tokenmill.probe.needle_threading import PAPER_CONTEXTS, TASKS, generate, run, small

COLUMNS = [
    "id", "haystack", "keys", "values", "question", "context_length", "num_kv_pairs", "repeat_number", "needle_depth",
    "num_needles", "needle_placement", "conditional_character", "thread_length", "thread_direction", "num_threads",
]  # fmt: skip


@pytest.mark.prop("needle-threading", 9)
def test_single_needles_are_twelve_contexts_times_eleven_depths_times_the_repeats() -> None:
    assert len(PAPER_CONTEXTS) == 12
    contexts = tuple(80 * n for n in range(25, 37))
    found = list(build_suite(("single",), contexts, 5))
    assert len(found) == 12 * 11 * 5 == 660
    assert [e.id for e in found] == list(range(660))
    assert [e.meta["needle_depth"] for e in found[:12]] == [*(str(d) for d in range(0, 101, 10)), "0"]
    assert [e.meta["repeat_number"] for e in found[:55:11]] == [0, 1, 2, 3, 4]
    assert [e.meta["context_length"] for e in found[::55]] == list(contexts)
    assert found[5].haystack == haystack(25)
    assert found[5].values == ["1759edc3-72ae-2244-8b01-63c1cd9d2b7d"]


@pytest.mark.prop("needle-threading", 9)
def test_ids_are_dense_over_all_tasks_and_points_without_room_are_left_out() -> None:
    suite = NeedleThreading(tasks=TASKS, contexts=(2000, 4000), repeats=2)
    found = list(suite.suite())
    assert [e.id for e in found] == list(range(len(found)))
    assert list(dict.fromkeys(e.task for e in found)) == list(TASKS)
    for context, most in ((2000, 25), (4000, 50)):
        threads = [e for e in found if e.task == "multi-threading" and e.meta["context_length"] == context]
        sizes = {e.meta["num_threads"] * e.meta["thread_length"] for e in threads}
        wanted = {t * n for t in suite.num_threads for n in suite.thread_lengths if t * n <= most}
        assert sizes == wanted
    assert all(e.meta["context_length"] <= 4000 for e in found)
    assert list(suite.suite()) == found


def test_the_haystack_is_shared_by_a_repeat_or_fresh() -> None:
    how: dict[str, Any] = {"tasks": ("single", "threading"), "contexts": (800,), "repeats": 2, "thread_lengths": (2,)}
    shared, fresh = (list(NeedleThreading(**how, fresh=fresh).suite()) for fresh in (False, True))
    assert len({e.haystack for e in shared if e.task == "single"}) == 2
    assert len({e.haystack for e in fresh}) == len(fresh) == len(shared)
    assert {e.haystack for e in NeedleThreading(**how, seed=1).suite()} & {e.haystack for e in shared}


def test_a_file_has_the_published_columns_and_comes_back(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "suite.jsonl"
    made = list(small().suite())
    assert to_jsonl(iter(made), file) == len(made)
    assert list(from_jsonl(file)) == made
    assert [p.name for p in file.parent.iterdir()] == ["suite.jsonl"]
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert all(list(row)[:15] == COLUMNS for row in rows)
    assert isinstance(rows[0]["keys"], str)

    def broken() -> Any:
        yield made[0]
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError):
        to_jsonl(broken(), file)
    assert list(from_jsonl(file)) == made, "all or nothing"
    assert [p.name for p in file.parent.iterdir()] == ["suite.jsonl"]


def test_published_rows_do_not_name_their_task(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    made = [generate(task, n_pairs=40, seed=2) for task in TASKS[:5]]
    rows = [{k: v for k, v in e.row().items() if k in COLUMNS} for e in made]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    read = list(from_jsonl(file))
    assert [e.task for e in read] == list(TASKS[:5])
    assert read == made


@pytest.mark.parametrize(
    "line",
    ["{", "[]", "{}", '"a"', '{"id": 0, "haystack": "{", "question": "", "keys": [], "values": ["a"]}',
     '{"id": 0, "haystack": "[]", "question": "", "keys": [], "values": ["a"]}',
     '{"id": 0, "haystack": "{}", "question": "", "keys": [], "values": []}',
     '{"id": 0, "haystack": "{}", "question": "", "keys": [1], "values": ["a"]}',
     '{"id": "x", "haystack": "{}", "question": "", "keys": [], "values": ["a"]}',
     '{"id": 0, "haystack": "{}", "question": "", "keys": [], "values": ["a"], "task": "other"}'],
)  # fmt: skip
def test_a_line_that_is_no_example_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text(json.dumps(generate("single", n_pairs=2).row()) + "\n" + line + "\n")
    with pytest.raises(LimitError, match=r"bad\.jsonl:2"):
        list(from_jsonl(file))
    with pytest.raises(LimitError, match="nowhere"):
        list(from_jsonl(tmp_path / "nowhere.jsonl"))


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"tasks": ()}, "tasks"),
        ({"tasks": "single"}, "tasks"),
        ({"tasks": ("single", "thread")}, "thread"),
        ({"tasks": ("single", "single")}, "once"),
        ({"contexts": (79,)}, "contexts = 79"),
        ({"contexts": (0,)}, "contexts = 0"),
        ({"contexts": (15,), "keys": "name"}, "contexts = 15"),
        ({"keys": "words"}, "keys"),
        ({"repeats": 0}, "repeats = 0"),
        ({"seed": -1}, "seed = -1"),
        ({"depths": (50, 120)}, "depth = 120"),
        ({"num_needles": (0,)}, "num_needles = 0"),
        ({"placements": ("near",)}, "placements = 'near'"),
        ({"character": "#"}, "character = '#'"),
        ({"thread_lengths": (0,)}, "thread_lengths = 0"),
        ({"directions": ("up",)}, "directions = 'up'"),
        ({"num_threads": (-1,)}, "num_threads = -1"),
        ({"branching_factors": (1,)}, "branching_factors = 1"),
        ({"branches": ("one",)}, "branches = 'one'"),
    ],
)
def test_bad_settings_are_refused_by_name(bad: dict[str, Any], words: str) -> None:
    with pytest.raises(LimitError, match=words):
        NeedleThreading(**bad)


def test_a_context_in_which_nothing_has_room_is_refused() -> None:
    with pytest.raises(LimitError, match="at least 320 for multi-threading"):
        list(NeedleThreading(tasks=("multi-threading",), contexts=(240,)).suite())
    with pytest.raises(LimitError, match="branched"):
        list(NeedleThreading(tasks=("branched",), contexts=(800,), thread_lengths=(2,)).suite())


def test_threads_too_short_to_fork_are_left_out_of_the_grid() -> None:
    suite = NeedleThreading(thread_lengths=(1, 2, 3), directions=("forward",), branches=("final", "all"))
    found = {(p.branches, p.thread_length) for p in suite.points("branched")}  # type: ignore[attr-defined]
    assert found == {("final", 3), ("all", 2), ("all", 3)}


def test_the_method_of_the_catalog_is_the_suite() -> None:
    assert method("needle-threading") is NeedleThreading
    suite = small()
    answers = suite.run(solving(suite.suite()))
    assert [a.correct for a in answers] == [1.0] * len(answers)


def test_plots_are_drawn_for_every_task() -> None:
    suite = NeedleThreading(
        tasks=TASKS, contexts=(800, 1600), repeats=1, depths=(0, 100), num_needles=(2, 3), thread_lengths=(2, 3),
        num_threads=(2,), branching_factors=(2,),
    )  # fmt: skip
    made = list(suite.suite())
    answers = run(solving(made), None, made)
    drawn = draw_plots(answers, token_profile({"characters": characters()}))
    assert list(drawn) == ["accuracy", *(f"contour-{task}" for task in TASKS), "tokens"]
    assert all(svg.startswith("<svg") for svg in drawn.values())
    assert all(task in drawn["accuracy"] for task in TASKS)
    assert "needle depth" in drawn["contour-single"]
    with pytest.raises(LimitError, match="at least one"):
        draw_plots()


def test_a_suite_of_names_comes_back_from_its_file(tmp_path: Path) -> None:
    suite = NeedleThreading(tasks=TASKS, contexts=(640,), repeats=1, keys="name")
    made = list(suite.suite())
    assert all(example.meta["key_kind"] == "name" for example in made)
    to_jsonl(made, tmp_path / "names.jsonl")
    again = list(from_jsonl(tmp_path / "names.jsonl"))
    assert [(e.prompt, e.values, e.meta["key_kind"]) for e in again] == [(e.prompt, e.values, "name") for e in made]
