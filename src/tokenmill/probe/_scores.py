"""Scoring answers by rule, and tables of accuracy with Wilson intervals.

Where the authors let another model read the values out of a free answer, a regular expression does it here: what is
looked for are UUIDs (or names of four letters), and there is one way to write them.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tokenmill.errors import LimitError
from tokenmill.probe._example import TASKS, Example
from tokenmill.probe._haystack import CONSONANTS, VOWELS

if TYPE_CHECKING:
    from tokenmill.probe._answers import Answer

Z95 = 1.96
_UUID = re.compile(r"(?<![0-9a-f*&-])[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}(?![0-9a-f*&-])")
_NAME = re.compile(rf"(?<![\w*&-])(?:[{CONSONANTS}][{VOWELS}]){{2}}(?![\w*&-])")
_WRAPPING = " \t\r\n\"'`[("
_FENCE = re.compile(r"^\s*```\w*\s*")
_LONGEST = 100_000  # characters of an answer that are read as a list


@dataclass(frozen=True, slots=True)
class Score:
    """How right an answer is.

    Attributes:
        correct: share of the values that are right, in [0, 1].
        parsed: what was read out of the answer.
        wrong: how many of those are no value that was asked for; a model that lists everything has many.
    """

    correct: float
    parsed: list[str]
    wrong: int


def score(example: Example, text: str) -> Score:
    """Score an answer.

    A single value is right when the answer starts with it, apart from blanks, quotes, brackets and code fences; else
    the first UUID that was not itself asked about counts. Lists are read as lists, else as the UUIDs in their order;
    they are compared place by place, or as a set where the question lists no keys.

    >>> one = Example(0, '{"a": "b"}', "?", ["a"], ["b"], {"task": "single"})
    >>> score(one, ' "b". That is the value.').correct
    1.0
    """
    gold = example.values
    if len(gold) == 1 and example.ordered:
        parsed = [_one(text, example)]
        right = float(parsed[0] == gold[0])
        return Score(right, [p for p in parsed if p], int(bool(parsed[0]) and not right))
    parsed = _several(text, example)
    if example.ordered:
        right = sum(said[: len(value)] == value for said, value in zip(parsed, gold, strict=False))
        wrong = len(parsed) - right
    else:
        said = {p[: len(gold[0])] for p in parsed}
        right, wrong = len(said.intersection(gold)), len(said.difference(gold))
    return Score(right / len(gold), parsed, wrong)


def _one(text: str, example: Example) -> str:
    gold = example.values[0]
    bare = _FENCE.sub("", text).lstrip(_WRAPPING)
    if bare.startswith(gold):
        return gold
    found = _written(text, example)
    return found[0] if found else ""


def _written(text: str, example: Example) -> list[str]:
    """Everything in a text that looks like a value and is no key of the question."""
    pattern = _NAME if example.meta.get("key_kind") == "name" else _UUID
    return [one for one in pattern.findall(text) if one not in example.keys]


def _several(text: str, example: Example) -> list[str]:
    bare = _FENCE.sub("", text)[:_LONGEST]
    start, end = bare.find("["), bare.find("]")
    if 0 <= start < end:
        try:
            listed = ast.literal_eval(bare[start : end + 1])
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            listed = None  # no list after all: single values are read below
        if isinstance(listed, list) and listed and all(isinstance(value, str) for value in listed):
            return [value.strip() for value in listed]
    return _written(bare, example)


def wilson(p: float, n: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's interval of a share `p` of `n` trials, inside [0, 1].

    Raises:
        LimitError: no trials, or a share outside [0, 1].
    """
    if n < 1:
        raise LimitError("wilson", "n", n, "at least 1")
    if not 0 <= p <= 1:
        raise LimitError("wilson", "p", p, "in [0, 1]")
    middle = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, min(p, (middle - half) / scale)), min(1.0, max(p, (middle + half) / scale))


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell of the table: a task at a context length.

    Attributes:
        task: one of the tasks.
        context: characters of the haystack.
        n: answers.
        accuracy: their mean share of right values; None when there is no answer at all.
        low: of the 95 % interval.
        high: of the 95 % interval.
        failed: examples without an answer, such as prompts that do not fit the model; they are not in `n`.
        prompt_tokens: of whole prompts as the model counts them, in the mean; None when nobody said.
    """

    task: str
    context: int
    n: int
    accuracy: float | None
    low: float | None
    high: float | None
    failed: int
    prompt_tokens: float | None


def cell(task: str, context: int, answers: Sequence[Answer]) -> Cell:
    """The cell of these answers."""
    scores = [a.correct for a in answers if not a.error]
    failed = len(answers) - len(scores)
    counts = [a.prompt_tokens for a in answers if a.prompt_tokens is not None]
    tokens = math.fsum(counts) / len(counts) if counts else None
    if not scores:
        return Cell(task, context, 0, None, None, None, failed, tokens)
    mean = math.fsum(scores) / len(scores)
    low, high = wilson(mean, len(scores))
    return Cell(task, context, len(scores), mean, low, high, failed, tokens)


def aggregate(answers: Iterable[Answer]) -> list[Cell]:
    """The table of tasks and context lengths, tasks in the paper's order and lengths rising."""
    groups: dict[tuple[int, int], list[Answer]] = {}
    for answer in answers:
        groups.setdefault((TASKS.index(answer.task), answer.context), []).append(answer)
    return [cell(TASKS[task], context, group) for (task, context), group in sorted(groups.items())]
