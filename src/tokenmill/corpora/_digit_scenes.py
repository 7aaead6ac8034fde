"""Pictures with questions: coloured handwritten digits on cluttered grey backgrounds, made from a seed.

The digits are scikit-learn's (UCI optical recognition of handwritten digits, 8 x 8 grey levels); those of the test
split appear in no training picture. A picture is 64 x 64 pixels. Its 16 blocks of 16 x 16 hold 2 to 5 digits, each
enlarged twice, shifted by up to two pixels, of its own value and its own colour. Grey strokes, a slope of light and
noise lie behind them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenmill.corpora._corpus import SPLITS
from tokenmill.errors import LimitError, MissingExtraError, unknown_name

SIZE, BLOCK, SIDE = 64, 16, 4  # pixels of a picture, pixels of a block, blocks a side
MOST = 5
SHIFT = 2
LICENCE = "CC BY 4.0 (UCI optical recognition of handwritten digits, as in scikit-learn)"
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (255, 40, 40),
    "green": (50, 220, 50),
    "blue": (70, 90, 255),
    "yellow": (245, 230, 40),
    "magenta": (240, 60, 240),
    "cyan": (40, 230, 235),
}
QUARTERS = ("topleft", "topright", "bottomleft", "bottomright")
KINDS = ("colour", "digit", "count", "position")


@dataclass(frozen=True, slots=True)
class Question:
    """A question about one picture, its one-word answer, and its kind."""

    text: str
    answer: str
    kind: str


@dataclass(frozen=True, slots=True)
class Thing:
    """A digit in a picture: its value, its colour, and the row and column of its block."""

    digit: int
    colour: str
    row: int
    column: int

    @property
    def names(self) -> tuple[str, str]:
        """The words that name it: digit and colour."""
        return str(self.digit), self.colour

    @property
    def quarter(self) -> str:
        """The quarter of the picture that the digit stands in."""
        half = SIDE // 2
        return QUARTERS[2 * (self.row >= half) + (self.column >= half)]


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture.

    Attributes:
        id: unique in its split.
        pixels: (H, W, 3) uint8.
        questions: about it.
        things: what is on it (`Thing` or `Entry`); empty where the data set does not say.
    """

    id: str
    pixels: NDArray[np.uint8]
    questions: tuple[Question, ...]
    things: tuple[Any, ...] = ()


def digit_scenes(
    split: str, count: int, *, seed: int = 0, kinds: Sequence[str] = KINDS, most: int = MOST
) -> list[Picture]:
    """Pictures of coloured digits with their questions.

    Each digit is asked for by colour or asked for its colour, never both, so that no question answers another one.

    Args:
        split: ``"train"`` or ``"test"``; the two share no handwritten digit.
        count: how many pictures, at least 1.
        seed: two seeds give different pictures, one seed the same ones.
        kinds: kinds of questions to ask, of ``KINDS``.
        most: digits on a picture at most; there are at least 2.

    Raises:
        LimitError: another split or kind, or no pictures.
        MissingExtraError: scikit-learn is not installed.
    """
    if split not in SPLITS:
        raise unknown_name("digit_scenes", "split", split, SPLITS)
    if count < 1:
        raise LimitError("digit_scenes", "count", count, "at least 1")
    for kind in kinds:
        if kind not in KINDS:
            raise unknown_name("digit_scenes", "kinds", kind, KINDS)
    if not 2 <= most <= len(COLOURS):
        raise LimitError("digit_scenes", "most", most, f"in [2, {len(COLOURS)}]", "Every digit has its own colour.")
    rng = np.random.default_rng([seed, SPLITS.index(split)])
    return [_scene(f"{split}-{seed}-{number}", split, rng, kinds, most) for number in range(count)]


def _scene(name: str, split: str, rng: np.random.Generator, kinds: Sequence[str], most: int) -> Picture:
    glyphs, labels = _digits(split)
    number = int(rng.integers(2, most + 1))
    blocks = rng.choice(SIDE * SIDE, number, replace=False)
    colours = rng.choice(len(COLOURS), number, replace=False)
    values = rng.choice(10, number, replace=False)
    pixels = _background(rng)
    things: list[Thing] = []
    for block, colour, value in zip(blocks, colours, values, strict=True):
        row, column = divmod(int(block), SIDE)
        shown = glyphs[rng.choice(np.flatnonzero(labels == value))]
        top, left = (at * BLOCK + int(rng.integers(-SHIFT, SHIFT + 1)) for at in (row, column))
        _paint(pixels, shown, list(COLOURS.values())[colour], top, left, rng)
        things.append(Thing(int(value), list(COLOURS)[colour], row, column))
    questions = tuple(q for q in _questions(things, rng) if q.kind in kinds)
    return Picture(name, pixels.clip(0, 255).astype(np.uint8), questions, tuple(things))


def _background(rng: np.random.Generator) -> NDArray[np.float64]:
    """Grey: a slope of light, 3 to 7 strokes, noise; (H, W, 3)."""
    x, y = np.meshgrid(np.linspace(-1, 1, SIZE), np.linspace(-1, 1, SIZE))
    slope = rng.uniform(-25, 25, 2)
    grey = rng.uniform(20, 70) + slope[0] * x + slope[1] * y
    for _ in range(int(rng.integers(3, 8))):
        angle, offset, width = rng.uniform(0, np.pi), rng.uniform(-0.9, 0.9), rng.uniform(0.02, 0.06)
        along = np.cos(angle) * y - np.sin(angle) * x  # runs along the stroke
        start, length = rng.uniform(-1, 0.5), rng.uniform(0.3, 1.0)
        near = np.abs(np.cos(angle) * x + np.sin(angle) * y - offset) < width
        grey = np.where(near & (along > start) & (along < start + length), grey + rng.uniform(30, 110), grey)
    tint = rng.normal(0, 4, (SIZE, SIZE, 3))
    return grey[:, :, None] + rng.normal(0, 6, (SIZE, SIZE, 1)) + tint


def _paint(
    pixels: NDArray[np.float64],
    glyph: NDArray[np.float64],
    colour: tuple[int, int, int],
    top: int,
    left: int,
    rng: np.random.Generator,
) -> None:
    """Lay the enlarged glyph (16, 16) in [0, 1] over the picture, cut at its edges."""
    y0, x0 = max(top, 0), max(left, 0)
    y1, x1 = min(top + BLOCK, SIZE), min(left + BLOCK, SIZE)
    ink = glyph[y0 - top : y1 - top, x0 - left : x1 - left, None]
    shade = np.asarray(colour) * rng.uniform(0.8, 1.0)
    pixels[y0:y1, x0:x1] = (1 - ink) * pixels[y0:y1, x0:x1] + ink * shade


def _questions(things: list[Thing], rng: np.random.Generator) -> list[Question]:
    found = [Question("how many digits are there ?", str(len(things)), "count")]
    for thing in things:
        if rng.random() < 0.5:
            found.append(Question(f"what colour is the {thing.digit} ?", thing.colour, "colour"))
        else:
            found.append(Question(f"which digit is {thing.colour} ?", str(thing.digit), "digit"))
        found.append(Question(f"where is the {thing.colour} digit ?", thing.quarter, "position"))
    return [found[at] for at in rng.permutation(len(found))]


@cache
def _digits(split: str) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The split's handwritten digits, (n, 16, 16) in [0, 1], and their values: every fifth one is for testing."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtraError("corpora.digit_scenes", "scikit-learn", "prune") from error
    data: Any = load_digits()
    mine = (np.arange(len(data.target)) % 5 == 0) == (split == "test")
    return _enlarge(data.images[mine] / 16), data.target[mine]


def _enlarge(glyphs: NDArray[np.float64]) -> NDArray[np.float64]:
    """Twice as large, bilinear: (n, 8, 8) -> (n, 16, 16)."""
    for axis in (1, 2):
        padded = np.pad(glyphs, [(1, 1) if at == axis else (0, 0) for at in range(3)], mode="edge")
        inner = glyphs.shape[axis]
        before, here, after = (np.take(padded, np.arange(inner) + shift, axis) for shift in range(3))
        pair = np.stack([0.25 * before + 0.75 * here, 0.75 * here + 0.25 * after], axis + 1)
        shape = list(glyphs.shape)
        shape[axis] *= 2
        glyphs = pair.reshape(shape)
    return glyphs
