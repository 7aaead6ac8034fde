from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenmill import corpora
from tokenmill.corpora import _digit_scenes
from tokenmill.errors import LimitError


def test_one_seed_gives_one_set_of_pictures() -> None:
    first, again, other = (corpora.digit_scenes("train", 4, seed=s) for s in (1, 1, 2))
    assert all((a.pixels == b.pixels).all() and a.questions == b.questions for a, b in zip(first, again, strict=True))
    assert not (first[0].pixels == other[0].pixels).all()
    longer = corpora.digit_scenes("train", 6, seed=1)
    assert (longer[3].pixels == first[3].pixels).all()


def test_splits_share_no_handwritten_digit() -> None:
    train, test = (_digit_scenes._digits(split) for split in ("train", "test"))
    assert len(train[0]) + len(test[0]) == 1797
    seen = {glyph.tobytes() for glyph in train[0]}
    assert not any(glyph.tobytes() in seen for glyph in test[0])
    assert set(test[1].tolist()) == set(range(10))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(["train", "test"]), st.integers(2, 6))
def test_questions_are_true_and_no_two_answer_each_other(seed: int, split: Any, most: int) -> None:
    (picture,) = corpora.digit_scenes(split, 1, seed=seed, most=most)
    assert picture.pixels.shape == (64, 64, 3)
    assert picture.pixels.dtype == np.uint8
    things = picture.things
    assert 2 <= len(things) <= most
    assert len({t.digit for t in things}) == len({t.colour for t in things}) == len(things)
    asked = {}
    for question in picture.questions:
        words = question.text.split()
        if question.kind == "count":
            assert question.answer == str(len(things))
            continue
        (thing,) = [t for t in things if t.colour in words or str(t.digit) in words]
        want = {"colour": thing.colour, "digit": str(thing.digit), "position": thing.quarter}[question.kind]
        assert question.answer == want
        assert (thing.digit, question.kind) not in asked
        asked[thing.digit, question.kind] = question
    # A digit is asked for by its colour, or for its colour, never both.
    assert len(picture.questions) == 1 + 2 * len(things)


def test_digits_are_painted_where_the_things_say() -> None:
    for picture in corpora.digit_scenes("test", 20, seed=3):
        colourful = np.ptp(picture.pixels.astype(int), axis=2)  # the background is grey
        for thing in picture.things:
            block = colourful[16 * thing.row : 16 * thing.row + 16, 16 * thing.column : 16 * thing.column + 16]
            assert block.max() > 80
        blocks = colourful.reshape(4, 16, 4, 16).max((1, 3))
        bare = [(r, c) for r in range(4) for c in range(4) if (r, c) not in {(t.row, t.column) for t in picture.things}]
        # Ink may reach two pixels into a neighbour; the middle of a block without a digit stays grey.
        inner = colourful.reshape(4, 16, 4, 16)[:, 4:12, :, 4:12].max((1, 3))
        assert all(inner[r, c] < 60 for r, c in bare)
        assert blocks.shape == (4, 4)


def test_bad_input() -> None:
    with pytest.raises(LimitError, match="split"):
        corpora.digit_scenes("valid", 1)
    with pytest.raises(LimitError, match="count = 0"):
        corpora.digit_scenes("test", 0)
    with pytest.raises(LimitError, match="kinds"):
        corpora.digit_scenes("test", 1, kinds=["size"])
    with pytest.raises(LimitError, match="most = 9"):
        corpora.digit_scenes("test", 1, most=9)
