"""Exercises with answers that can be checked exactly: short, long and hard ones, and gaps in Python source.

Made from a seed. A prompt belongs to one of three splits by a hash of its text, so that no prompt of one split is ever
asked in another. ``mixed`` has short answers: sums, strings to reverse, and sets of letters that may be named in any
order, for which a model that writes several tokens at once has to be careful. ``long`` has answers of varied length up
to 120 characters, each line of which follows from the one before: numbers counted up, and verses counted down.
``hard`` has answers whose parts differ in difficulty: running totals of a sum of many terms, and 4 x 4 Sudoku.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import permutations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenmill.corpora._stdlib import load
from tokenmill.errors import LimitError, unknown_name

SPLITS = ("train", "validation", "test")
LETTERS = "abcdefghijklmnop"
WINDOW = 128  # characters of Python source around a gap, gap included
GAP = (4, 8)  # least and most characters of a gap
_SIDE = 4  # of a Sudoku
_BOX = 2
_PATIENCE = 5_000  # draws in a row without anything new, after which a split counts as exhausted


@dataclass(frozen=True, slots=True)
class Exercise:
    """A prompt, one right answer, and the kind that says which other answers are right."""

    id: str
    kind: str
    prompt: str
    answer: str

    def check(self, text: str) -> bool:
        """Whether an answer is right: letters count in any order, every other answer character by character."""
        if self.kind == "permutation":
            return sorted(text) == sorted(self.answer)
        if self.kind == "sudoku":
            return _solves(self.prompt[1:-1], text)
        return text == self.answer


@dataclass(frozen=True, slots=True)
class ExerciseTask:
    """What a model of one task has to hold.

    Attributes:
        kinds: of its exercises.
        alphabet: every character of its prompts and answers.
        prompt: characters of the longest prompt.
        answer: tokens of the answer's buffer; each answer leaves room for an end-of-text token.
        block: length of a block for semi-autoregressive decoding.
    """

    kinds: tuple[str, ...]
    alphabet: str
    prompt: int
    answer: int
    block: int


EXERCISE_TASKS = {
    "mixed": ExerciseTask(("add", "permutation", "reverse"), "0123456789+=PC" + LETTERS, 7, 12, 12),
    "long": ExerciseTask(("count", "verse"), "0123456789;" + LETTERS, 6, 128, 16),
    "hard": ExerciseTask(("totals", "sudoku"), "0123456789+=;_S", 18, 24, 24),
}


@dataclass(frozen=True, slots=True)
class Gap:
    """A window of Python source with a gap: what stands before it, what it holds, and what stands behind it."""

    id: str
    before: str
    gap: str
    after: str

    @property
    def text(self) -> str:
        """The whole window."""
        return self.before + self.gap + self.after

    def check(self, text: str) -> bool:
        """Whether the gap is filled character by character."""
        return text == self.gap


def answer_text(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of an answer's ids up to the first end-of-text token."""
    end = tokenizer.eos_token_id
    return tokenizer.decode(ids[: ids.index(end)] if end in ids else ids, skip_special_tokens=True)


def exercises(
    task: str, split: str, count: int, *, seed: int = 0, kinds: Sequence[str] | None = None
) -> list[Exercise]:
    """Exercises of a task, the kinds drawn at random; prompts of ``"validation"`` and ``"test"`` come once each.

    Args:
        task: of ``EXERCISE_TASKS``.
        split: ``"train"``, ``"validation"`` or ``"test"``; no prompt is in two of them.
        count: how many, at least 1.
        seed: two seeds give different exercises, one seed the same ones.
        kinds: some of the task's kinds.

    Raises:
        LimitError: unknown task, split or kind, or more exercises than the split has.
    """
    if task not in EXERCISE_TASKS:
        raise unknown_name("exercises", "task", task, EXERCISE_TASKS)
    if split not in SPLITS:
        raise unknown_name("exercises", "split", split, SPLITS)
    if count < 1:
        raise LimitError("exercises", "count", count, "at least 1")
    wanted = EXERCISE_TASKS[task].kinds if kinds is None else tuple(kinds)
    for kind in wanted:
        if kind not in EXERCISE_TASKS[task].kinds:
            raise unknown_name("exercises", "kinds", kind, EXERCISE_TASKS[task].kinds)
    rng = np.random.default_rng([seed, SPLITS.index(split), *task.encode()])
    found: list[Exercise] = []
    seen: set[str] = set()
    missed = 0
    while len(found) < count and missed < _PATIENCE:
        kind = wanted[int(rng.integers(len(wanted)))]
        prompt, answer = _MAKERS[kind](rng)
        missed += 1
        if split_of(prompt) == split and (split == "train" or prompt not in seen):
            seen.add(prompt)
            found.append(Exercise(f"{split}-{seed}-{len(found)}", kind, prompt, answer))
            missed = 0
    if len(found) == count:
        return found
    raise LimitError("exercises", "count", count, f"at most about {len(found)}, the prompts of {split}")


def split_of(prompt: str) -> str:
    """The split of a prompt: one of ten for validation, two for testing, by a hash of its text."""
    side = zlib.crc32(f"exercise {prompt}".encode()) % 10
    return "test" if side < 2 else "validation" if side == 2 else "train"


def python_gaps(split: str, count: int, *, seed: int = 0) -> list[Gap]:
    """Windows of 128 ASCII characters of Python's standard library with a gap of 4 to 8, in files of one split.

    Args:
        split: ``"train"`` or ``"test"``, the corpus's own.
        count: how many, at least 1.
        seed: of the windows and gaps.
    """
    if count < 1:
        raise LimitError("python_gaps", "count", count, "at least 1")
    files = load("python-stdlib").split(split)
    sizes = np.array([len(record.text) - WINDOW for record in files], float).clip(0)
    rng = np.random.default_rng([seed, len(split)])
    found: list[Gap] = []
    while len(found) < count:
        record = files[int(rng.choice(len(files), p=sizes / sizes.sum()))]
        start = int(rng.integers(0, len(record.text) - WINDOW + 1))
        length = int(rng.integers(GAP[0], GAP[1] + 1))
        at = int(rng.integers(WINDOW // 4, WINDOW - WINDOW // 4 - length))
        window = record.text[start : start + WINDOW]
        if window.isascii():
            before, gap, after = window[:at], window[at : at + length], window[at + length :]
            found.append(Gap(f"{record.id}@{start + at}", before, gap, after))
    return found


def _digits(rng: np.random.Generator, count: int) -> str:
    return "".join(map(str, rng.integers(0, 10, count)))


def _add(rng: np.random.Generator) -> tuple[str, str]:
    a, b = rng.integers(0, 100, 2)
    return f"{a:02d}+{b:02d}=", f"{a + b:03d}"


def _permutation(rng: np.random.Generator) -> tuple[str, str]:
    size = int(rng.integers(3, 7))
    chosen = [LETTERS[at] for at in rng.permutation(len(LETTERS))[:size]]
    return "P" + "".join(sorted(chosen)), "".join(chosen)


def _reverse(rng: np.random.Generator) -> tuple[str, str]:
    text = _digits(rng, int(rng.integers(3, 7)))
    return "C" + text, text[::-1]


def _count(rng: np.random.Generator) -> tuple[str, str]:
    """From a number on by ones up to the next whole hundred, 8 to 20 numbers."""
    last, terms = 100 * int(rng.integers(1, 1000)), int(rng.integers(8, 21))
    return f"{last - terms:05d};", "".join(f"{value:05d};" for value in range(last - terms + 1, last + 1))


def _verse(rng: np.random.Generator) -> tuple[str, str]:
    """Three letters and a number, again and again until the number is down at nothing, 10 to 24 times."""
    name = "".join(LETTERS[at] for at in rng.integers(0, len(LETTERS), 3))
    times = int(rng.integers(10, 25))
    return f"{name}{times:02d}", "".join(f"{name}{left:02d}" for left in reversed(range(times)))


def _totals(rng: np.random.Generator) -> tuple[str, str]:
    """The running totals of 3 to 5 terms of two digits, the first term among them."""
    terms = rng.integers(0, 100, int(rng.integers(3, 6)))
    return "+".join(f"{term:02d}" for term in terms) + "=", "".join(f"{total:03d};" for total in terms.cumsum())


@cache
def _grids() -> NDArray[np.str_]:
    """The 288 filled 4 x 4 grids, (288, 16) digits."""
    rows = ["".join(row) for row in permutations("1234")]
    found: list[tuple[str, ...]] = [()]
    for _ in range(_SIDE):
        found = [(*grid, row) for grid in found for row in rows if _fits(grid, row)]
    return np.array([list("".join(grid)) for grid in found])


def _fits(grid: tuple[str, ...], row: str) -> bool:
    """Whether a row may stand below the rows of a grid: no column and no box holds a digit twice."""
    if any(above[at] == row[at] for above in grid for at in range(_SIDE)):
        return False
    box = grid[len(grid) // _BOX * _BOX :]
    return not any(set(above[at : at + _BOX]) & set(row[at : at + _BOX]) for above in box for at in (0, _BOX))


def _sudoku(rng: np.random.Generator) -> tuple[str, str]:
    """A grid with 4 to 9 clues that has one solution."""
    grids = _grids()
    while True:
        grid = grids[int(rng.integers(len(grids)))]
        clues = rng.permutation(_SIDE**2)[: int(rng.integers(4, 10))]
        if (grids[:, clues] == grid[clues]).all(1).sum() == 1:
            shown = np.full(_SIDE**2, "_")
            shown[clues] = grid[clues]
            return f"S{''.join(shown)}=", "".join(grid)


def _solves(shown: str, text: str) -> bool:
    """Whether a text is a filled grid that keeps the clues."""
    if len(text) != _SIDE**2 or any(clue not in ("_", digit) for clue, digit in zip(shown, text, strict=True)):
        return False
    return bool((_grids() == list(text)).all(1).any())


_MAKERS: dict[str, Callable[[np.random.Generator], tuple[str, str]]] = {
    "add": _add,
    "permutation": _permutation,
    "reverse": _reverse,
    "count": _count,
    "verse": _verse,
    "totals": _totals,
    "sudoku": _sudoku,
}
