"""Needle Threading: can a model follow threads of keys and values through a long haystack?

Roberts, Han, Albanie, "Needle Threading: Can LLMs Follow Threads through Near-Million-Scale Haystacks?"
(arXiv 2411.05000). The haystack is a JSON object of random UUIDs, so that its size and the place of every needle are
exact, nothing can be guessed, and answers are checked by comparison. What is asked goes from one value to several
threads at once, in which each value is the next key.

Use it to find the context length that a model, a served endpoint or an attention method can really use, and to see
what a method loses first. Not for understanding of texts: a model may find every UUID and still miss the point of a
page. Lengths are given in characters, since tokens of different tokenizers are not comparable.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from tokenmill.catalog import Card, Paper, Reported
from tokenmill.errors import LimitError, unknown_name
from tokenmill.probe._answers import Answer, run
from tokenmill.probe._contours import contour, effective_context
from tokenmill.probe._example import TASKS, Example, from_jsonl, to_jsonl
from tokenmill.probe._haystack import Keys, pair_chars, pairs, render
from tokenmill.probe._lengths import TokenProfile, count_tokens, pairs_of, token_profile
from tokenmill.probe._plots import draw_plots
from tokenmill.probe._scores import Score, aggregate, score
from tokenmill.probe._tasks import (
    CHARACTERS,
    KINDS,
    WHERE,
    Asked,
    Branches,
    Direction,
    Placement,
    check_choice,
    check_count,
    check_depth,
    defaults,
)

__all__ = [
    "CARD",
    "Example",
    "NeedleThreading",
    "Score",
    "TokenProfile",
    "aggregate",
    "build_suite",
    "contour",
    "draw_plots",
    "effective_context",
    "from_jsonl",
    "generate",
    "run",
    "score",
    "to_jsonl",
    "token_profile",
]

CARD = Card(
    name="Needle Threading",
    kind="benchmark",
    paper=Paper(
        title="Needle Threading: Can LLMs Follow Threads through Near-Million-Scale Haystacks?",
        date="2024-11-07",
        arxiv="2411.05000",
        code="https://github.com/jonathan-roberts1/needle-threading",
    ),
    summary=(
        "Haystacks of random keys and values are made on the spot, and a model is asked for single values, lists, sets "
        "and the ends of threads in which each value is the next key. "
        "The answers give the context length that a model can really use, in characters."
    ),
    claim=(
        "Many models follow several threads at once with little loss; their effective context is far shorter than the "
        "advertised one; token counts of different tokenizers are not comparable."
    ),
    api=(
        "NeedleThreading",
        "Example",
        "Score",
        "TokenProfile",
        "build_suite",
        "to_jsonl",
        "from_jsonl",
        "effective_context",
        "contour",
        "token_profile",
        "draw_plots",
    ),
    exact=False,
    trains=False,
    task="threads",
    needs=frozenset({"model"}),
    works_with=("llama", "qwen2", "gemma3_text"),
    differs=(
        "values are read out of an answer by rule, where the authors let another model do it",
        "the published rows give the wording of the single needle alone; the other questions follow it",
        "answers may be as long as the values that are asked for, where 100 tokens cut a list of five off",
        "a branch's key is the value and a number, since the keys of a JSON object are unique",
        "which seeds the published rows of later repeats took is not known; here it is the repeat's number",
    ),
    reported=Reported(
        table="effective context",
        setting="GPT-4o, single needle, accuracy 75 %",
        metric="thousand characters",
        value=214.0,
    ),
)
PAPER_CONTEXTS = (2000, 4160, 8320, 16720, 33440, 53440, 106880, 214000, 309000, 417520, 835040, 1052160)
"""Characters of 1.2k to 630k tokens of LLaMA 3.1; 2,000, 214,000 and 309,000 are the paper's, others at its rate."""


def generate(
    task: str,
    *,
    n_pairs: int | None = None,
    n_chars: int | None = None,
    n_tokens: int | None = None,
    tokenizer: Any = None,
    seed: int = 0,
    keys: Keys = "uuid",
    **params: Any,
) -> Example:
    """Make one example; the same arguments give the same bytes on every platform.

    Args:
        task: single, multiple, conditional, threading, multi-threading or branched.
        n_pairs: length of the haystack in pairs; or
        n_chars: in characters, at most; or
        n_tokens: in tokens of `tokenizer`, at most, counted on the haystack that is made.
        tokenizer: of transformers or tokenizers, or an object with ``encode(text)``.
        seed: of the haystack and of the needles' places, 0 or more.
        keys: what keys and values are: "uuid" as published, or "name", short ones for small vocabularies.
        params: of the task: depth; num_needles, placement, character; thread_length, direction, num_threads;
            branching_factor, branches.

    Raises:
        LimitError: an unknown task or parameter, a value outside its limit, a haystack too small for what is asked.

    >>> example = generate("single", n_pairs=25, depth=50)
    >>> example.keys, len(example.haystack)
    (['247a8333-f7b0-b7d2-cda8-056c3d15eef7'], 2000)
    """
    check_count("seed", seed, 0)  # `Random` takes -1 for 1
    check_choice("keys", keys, Keys)
    asked = _asked(task, params)
    n = pairs_of(n_pairs, n_chars, n_tokens, tokenizer, seed, keys)
    if n_chars is not None:
        n = _pairs_in(asked, n_chars, keys)
    made = _made(asked, n, seed, keys)
    # What is asked changes the haystack, so the one that is asked about may have a few tokens more than the bare one.
    while n_tokens is not None and count_tokens(tokenizer, made.haystack) > n_tokens:
        n -= 1
        made = _made(asked, n, seed, keys)
    return made


def _pairs_in(asked: Asked, characters: int, keys: Keys) -> int:
    return max(0, characters - asked.extra_chars) // pair_chars(keys)


def _asked(task: str, params: Mapping[str, Any]) -> Asked:
    if task not in KINDS:
        raise unknown_name(WHERE, "task", task, TASKS)
    known = KINDS[task].__dataclass_fields__
    for name in params:
        if name not in known:
            raise unknown_name(WHERE, f"parameter of {task}", name, known)
    return cast(Asked, KINDS[task](**params))


def _made(asked: Asked, n: int, seed: int, keys: Keys, *, number: int = 0, repeat: int = 0) -> Example:
    if asked.pairs_needed > n:
        limit = f"at most the {n} pairs of the haystack"
        raise LimitError(WHERE, f"pairs needed by {asked}", asked.pairs_needed, limit, "Ask for less or lengthen it.")
    content, named, values = asked.place(pairs(n, seed, keys), random.Random(f"{seed} {asked.task}"))
    text = render(content)
    meta = {"task": asked.task, "context_length": len(text), "num_kv_pairs": n, "repeat_number": repeat}
    if keys != "uuid":
        meta["key_kind"] = keys
    return Example(number, text, asked.question(named), named, values, {**meta, **defaults(), **asked.columns()})


def build_suite(
    tasks: Sequence[str] = TASKS[:5],
    contexts: Sequence[int] = PAPER_CONTEXTS,
    repeats: int = 5,
    seed: int = 0,
    **grid: Any,
) -> Iterator[Example]:
    """All examples of a suite, one after another, with ids from 0 on. `grid` are fields of `NeedleThreading`."""
    return NeedleThreading(tasks=tuple(tasks), contexts=tuple(contexts), repeats=repeats, seed=seed, **grid).suite()


@dataclass(frozen=True, slots=True, kw_only=True)
class NeedleThreading:
    """A suite of questions: tasks x context lengths x repeats x the grid of each task.

    Points of a grid that need more pairs than a context has are left out of that context. The haystack of a context
    and repeat is the same for all points, as published; with `fresh` each example has its own, so that a server's
    prefix cache cannot help. Depths that are closer than a pair ask the same question, which is asked once.

    Attributes:
        tasks: which of single, multiple, conditional, threading, multi-threading, branched.
        contexts: lengths of the haystack in characters, at most.
        repeats: haystacks of each length.
        depths: of the single needle, in percent.
        num_needles: how many keys are asked, or have the character.
        placements: of those needles: random, clustered.
        character: of conditional needles: * or &.
        thread_lengths: steps of a thread.
        directions: of a thread: forward, backward, random.
        num_threads: of multi-threading.
        branching_factors: of branched threads.
        branches: what is asked of a branched thread: final, all.
        fresh: a haystack of its own for each example.
        keys: what keys and values are: uuid, as published, or name.
        seed: of the first repeat; the others follow it.

    Raises:
        LimitError: a value outside its limit, or a context in which nothing of a task has room.
    """

    tasks: tuple[str, ...] = TASKS[:5]
    contexts: tuple[int, ...] = PAPER_CONTEXTS
    repeats: int = 5
    depths: tuple[float, ...] = tuple(range(0, 101, 10))
    num_needles: tuple[int, ...] = (1, 2, 3, 4, 5, 10, 15, 20, 25)
    placements: tuple[Placement, ...] = ("random", "clustered")
    character: str = "*"
    thread_lengths: tuple[int, ...] = (2, 3, 4, 5, 10, 15, 20, 25)
    directions: tuple[Direction, ...] = ("forward", "backward", "random")
    num_threads: tuple[int, ...] = (2, 3, 4, 5)
    branching_factors: tuple[int, ...] = (2, 3)
    branches: tuple[Branches, ...] = ("final",)
    fresh: bool = False
    keys: Keys = "uuid"
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("keys", self.keys, Keys)
        for name, check in _CHECKS.items():
            values = getattr(self, name)
            if isinstance(values, str) or not isinstance(values, Iterable) or not values:
                raise LimitError(WHERE, name, values, "a tuple with at least one value")
            if len(set(values)) < len(tuple(values)):
                raise LimitError(WHERE, name, values, "a tuple in which each value comes once")
            for value in values:
                check(value)
        for context in self.contexts:
            check_count("contexts", context, pair_chars(self.keys))
        check_count("repeats", self.repeats)
        check_count("seed", self.seed, 0)
        check_choice("character", self.character, CHARACTERS)

    def points(self, task: str) -> list[Asked]:
        """The grid of a task: what is asked of each haystack, the innermost parameter running fastest."""
        if task not in KINDS:
            raise unknown_name(WHERE, "task", task, TASKS)
        threads: dict[str, tuple[Any, ...]] = {"thread_length": self.thread_lengths, "direction": self.directions}
        needles: dict[str, tuple[Any, ...]] = {"num_needles": self.num_needles, "placement": self.placements}
        axes: dict[str, dict[str, tuple[Any, ...]]] = {
            "single": {"depth": self.depths},
            "multiple": needles,
            "conditional": {**needles, "character": (self.character,)},
            "threading": threads,
            "multi-threading": {"num_threads": self.num_threads, **threads},
            "branched": {"branching_factor": self.branching_factors, "branches": self.branches, **threads},
        }
        named = axes[task]
        found = []
        for values in itertools.product(*named.values()):
            point = dict(zip(named, values, strict=True))
            shortest = {"final": 3, "all": 2}.get(point.get("branches", ""), 1)  # a shorter one has no place to fork
            if point.get("thread_length", shortest) >= shortest:
                found.append(_asked(task, point))
        return found

    def suite(self) -> Iterator[Example]:
        """The examples, one after another; ids are dense, and the grid runs fastest within a context and repeat."""
        number = 0
        for task in self.tasks:
            points = self.points(task)
            for context in self.contexts:
                fitting = [point for point in points if _pairs_in(point, context, self.keys) >= point.pairs_needed]
                if not fitting:
                    least = min((pair_chars(self.keys) * p.pairs_needed + p.extra_chars for p in points), default=None)
                    limit = f"at least {least} for {task}" if least else f"used with a grid of {task} that has points"
                    raise LimitError(WHERE, "contexts", context, limit)
                for repeat in range(self.repeats):
                    for point in fitting:
                        seed = (self.seed << 32) + number if self.fresh else self.seed + repeat
                        n = _pairs_in(point, context, self.keys)
                        yield _made(point, n, seed, self.keys, number=number, repeat=repeat)
                        number += 1

    def run(self, model: Any, tokenizer: Any = None, *, out: str | Path | None = None, **how: Any) -> list[Answer]:
        """Ask a model the whole suite; see `run`."""
        return run(model, tokenizer, self.suite(), out=out, **how)


def _check_task(value: Any) -> None:
    check_choice("tasks", value, TASKS)


def _check_context(value: Any) -> None:
    check_count("contexts", value)


_CHECKS: Mapping[str, Callable[[Any], None]] = {
    "tasks": _check_task,
    "contexts": _check_context,
    "depths": check_depth,
    "num_needles": lambda value: check_count("num_needles", value),
    "placements": lambda value: check_choice("placements", value, Placement),
    "thread_lengths": lambda value: check_count("thread_lengths", value),
    "directions": lambda value: check_choice("directions", value, Direction),
    "num_threads": lambda value: check_count("num_threads", value),
    "branching_factors": lambda value: check_count("branching_factors", value, 2),
    "branches": lambda value: check_choice("branches", value, Branches),
}


def small() -> NeedleThreading:
    """A suite on one short haystack."""
    return NeedleThreading(
        tasks=TASKS, contexts=(480,), repeats=1, depths=(0, 100), num_needles=(2,), placements=("random",),
        thread_lengths=(2, 3), directions=("forward",), num_threads=(2,), branching_factors=(2,),
    )  # fmt: skip
