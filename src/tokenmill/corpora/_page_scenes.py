"""Small pages of rendered text with questions: entries such as ``K4`` on paper, from nearly blank to nearly full.

A page is 64 x 64 pixels with 16 places in a grid; each is blank or holds an entry, a letter and a digit, in black on
noisy paper, some of it ruled. No letter comes twice on a page. Pages are drawn from a seed; those of the two splits
come from different streams of the same law.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenmill.corpora._corpus import SPLITS
from tokenmill.corpora._digit_scenes import BLOCK, SIDE, SIZE, Picture, Question
from tokenmill.errors import LimitError, MissingExtraError, unknown_name

LETTERS = tuple("abcdefghijklmnop")
KINDS = ("number", "there")
MOST = 14  # entries of the fullest page


@dataclass(frozen=True, slots=True)
class Entry:
    """An entry of a page: its letter, its digit, and its row and column."""

    letter: str
    digit: int
    row: int
    column: int

    @property
    def names(self) -> tuple[str, str]:
        """The words that name it: digit and letter."""
        return str(self.digit), self.letter


def page_scenes(
    split: str, count: int, *, seed: int = 0, kinds: Sequence[str] = KINDS, most: int = MOST
) -> list[Picture]:
    """Pages with questions: which number stands at a letter, and whether a letter is there.

    Args:
        split: ``"train"`` or ``"test"``.
        count: how many pages, at least 1.
        seed: two seeds give different pages, one seed the same ones.
        kinds: kinds of questions to ask, of ``"number"`` and ``"there"``.
        most: entries of a page at most; there is at least 1.

    Raises:
        LimitError: another split or kind, or no pages.
        MissingExtraError: Pillow is not installed.
    """
    if split not in SPLITS:
        raise unknown_name("page_scenes", "split", split, SPLITS)
    if count < 1:
        raise LimitError("page_scenes", "count", count, "at least 1")
    if not 1 <= most <= SIDE * SIDE:
        raise LimitError("page_scenes", "most", most, f"in [1, {SIDE * SIDE}]")
    for kind in kinds:
        if kind not in KINDS:
            raise unknown_name("page_scenes", "kinds", kind, KINDS)
    rng = np.random.default_rng([seed, 2 + SPLITS.index(split)])
    return [_page(f"{split}-page-{seed}-{number}", rng, kinds, most) for number in range(count)]


def _page(name: str, rng: np.random.Generator, kinds: Sequence[str], most: int) -> Picture:
    number = int(rng.integers(1, most + 1))
    places = rng.choice(SIDE * SIDE, number, replace=False)
    letters = rng.choice(len(LETTERS), number, replace=False)
    digits = rng.integers(0, 10, number)
    pixels = _paper(rng)
    entries = []
    for place, letter, digit in zip(places, letters, digits, strict=True):
        row, column = divmod(int(place), SIDE)
        top, left = (at * BLOCK + int(rng.integers(0, 2)) for at in (row, column))
        ink = _ink(LETTERS[letter].upper(), int(digit))[: SIZE - top, : SIZE - left]
        part = pixels[top : top + ink.shape[0], left : left + ink.shape[1]]
        part *= 1 - rng.uniform(0.75, 1.0) * ink[:, :, None]
        entries.append(Entry(LETTERS[letter], int(digit), row, column))
    questions = [q for q in _questions(entries, rng) if q.kind in kinds]
    return Picture(name, pixels.clip(0, 255).astype(np.uint8), tuple(questions), tuple(entries))


def _paper(rng: np.random.Generator) -> NDArray[np.float64]:
    """Light paper with noise; one page in three is ruled. (H, W, 3)."""
    light = rng.uniform(205, 245) + rng.normal(0, 6, (SIZE, SIZE))
    if rng.random() < 1 / 3:
        light[BLOCK - 1 :: BLOCK] -= rng.uniform(20, 70)
    return np.repeat(light[:, :, None], 3, axis=2)


def _questions(entries: list[Entry], rng: np.random.Generator) -> list[Question]:
    there = {entry.letter for entry in entries}
    absent = [letter for letter in LETTERS if letter not in there]
    found = [Question(f"which number is at {e.letter} ?", str(e.digit), "number") for e in entries]
    # As many letters that are there as letters that are not, and none of those that a number is asked for.
    found += [Question(f"is there a {letter} ?", "no", "there") for letter in rng.permutation(absent)[:2]]
    asked = [int(at) for at in rng.permutation(len(entries))[: min(2, len(entries) - 1)]]
    for at in asked:
        found[at] = Question(f"is there a {entries[at].letter} ?", "yes", "there")
    return [found[at] for at in rng.permutation(len(found))]


@cache
def _ink(letter: str, digit: int) -> NDArray[np.float64]:
    """Letter and digit in Pillow's own font, (14, 16) in [0, 1]."""
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError as error:
        raise MissingExtraError("corpora.page_scenes", "pillow", "prune") from error
    page = Image.new("L", (BLOCK, BLOCK - 2), 0)
    font: Any = ImageFont.load_default(size=10)
    ImageDraw.Draw(page).text((0, 0), f"{letter}{digit}", fill=255, font=font)
    return np.asarray(page) / 255
