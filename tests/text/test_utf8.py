from __future__ import annotations

import unicodedata

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tokenmill.errors import LimitError
from tokenmill.text import ByteTrie
from tokenmill.text._utf8 import Continuations, Spelled, likely_character, split, state_after

ALL = [chr(p).encode() for p in range(0x110000) if not 0xD800 <= p < 0xE000]
BEGINNINGS = {data[:k] for data in ALL for k in range(len(data))}


@example(b"a\xed\xa0")
@given(st.binary(max_size=6) | st.text(max_size=3).map(str.encode))
def test_a_cut_character_is_what_some_text_goes_on_from(data: bytes) -> None:
    ends = [(data[: len(data) - k], data[len(data) - k :]) for k in range(min(3, len(data)) + 1)]
    if any(head.decode(errors="ignore").encode() == head and end in BEGINNINGS for head, end in ends):
        text, rest = split("here", data)
        assert text.encode() + rest == data
        assert rest in BEGINNINGS
    else:
        with pytest.raises(LimitError, match=r"here: data = 'byte 0x[0-9A-F]{2} at position \d'"):
            split("here", data)


def test_tokens_that_can_follow_an_unfinished_character() -> None:
    tokens = [letter.encode()[k:] for letter in ("é", "ह", "한", "🙂", "\U0010ffff", "a") for k in range(4)]
    tokens += [bytes([b]) for b in range(256)]
    tokens += [b"\xa0\x80z", b"\x80\x80\x80", b"\x9f\xbf\xe0\xa0", b"\x90\x80\x80\xff"]
    found = Continuations(ByteTrie(tokens))
    for beginning in (b"", b"\xc3", b"\xe0", b"\xe1\x80", b"\xed", b"\xf0", b"\xf0\x9f", b"\xf4", b"\xf1\x80\x80"):
        mask = found.after(state_after(beginning))
        for i, token in enumerate(tokens):
            if not token:
                continue
            try:
                split("here", beginning + token)
                assert mask[i], (beginning, token)
            except LimitError:
                assert not mask[i], (beginning, token)


@pytest.mark.parametrize("unknown", [{0x41}, {0x7FF}, {0x7FF, 0xFFF0}, {0xE000}, {0x10000, 0x10FFFF}, {0xFFF}])
def test_beginnings_of_unknown_characters(unknown: set[int]) -> None:
    known = np.ones(0x110000, dtype=bool)
    known[list(unknown)] = False
    known[0:0x80:2] = False  # must not count for E0, whose bits alone are theirs
    known[0xD800:0xE000] = False  # nor surrogates for ED
    spelled = Spelled(known)
    points = {*unknown, *range(0, 0x80, 2)}
    expected = {chr(p).encode()[:k] for p in points for k in range(1, 5)}
    for prefix in (BEGINNINGS - {b""}) | expected | {b"\xed\xa0", b"\x80", b"\xff", b"\xe0\x80"}:
        assert spelled.starts(prefix) == (prefix in expected), prefix


def test_a_likely_character_begins_like_that_and_is_of_the_commonest_kind() -> None:
    for beginning in BEGINNINGS - {b""}:
        character = likely_character(beginning)
        assert character.encode().startswith(beginning)
        assert len(character) == 1
    assert unicodedata.category(likely_character(b"\xd1"))[0] == "L"
    assert unicodedata.category(likely_character(b"\xe2\x80"))[0] == "P"
    assert unicodedata.category(likely_character(b"\xf0\x9f\x99"))[0] == "S"
