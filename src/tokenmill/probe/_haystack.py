"""Haystacks: a JSON object of random UUIDs or names, and draws that are the same on every platform and Python."""

from __future__ import annotations

import random
from typing import Literal, get_args
from uuid import UUID

from tokenmill.errors import LimitError, unknown_name

Keys = Literal["uuid", "name"]
Pairs = list[tuple[str, str]]
PAIR_CHARS = 80  # two UUIDs of 36, four quotes, ": " and ", "; the braces take the place of the last ", "
NAME_PAIR_CHARS = 16  # the same with two names of 4
CONSONANTS, VOWELS = "bdfghjklmnprstvz", "aiou"
NAMES = (len(CONSONANTS) * len(VOWELS)) ** 2


def name(number: int) -> str:
    """One of the 4,096 names of two syllables, 4 letters long.

    >>> name(0), name(1), name(4095)
    ('baba', 'babi', 'zuzu')
    """
    first, second = divmod(number, len(CONSONANTS) * len(VOWELS))
    letters = (divmod(syllable, len(VOWELS)) for syllable in (first, second))
    return "".join(CONSONANTS[consonant] + VOWELS[vowel] for consonant, vowel in letters)


def pair_chars(keys: Keys) -> int:
    """Characters of a pair of such keys in the haystack."""
    return PAIR_CHARS if keys == "uuid" else NAME_PAIR_CHARS


def pairs(n: int, seed: int = 0, keys: Keys = "uuid") -> Pairs:
    """N pairs of UUIDs (or names) that are not seen twice, drawn in the order k0, v0, k1, v1, ...

    With UUIDs and seed 0 these are the pairs of the published rows; the pairs of n are the first n of those of n + 1.

    Raises:
        LimitError: fewer than one pair, more pairs than there are names, an unknown kind of keys.
    """
    if keys not in get_args(Keys):
        raise unknown_name("haystack", "keys", keys, get_args(Keys))
    if n < 1:
        raise LimitError("haystack", "n_pairs", n, "at least 1")
    rng = random.Random(seed)
    if keys == "name":
        if 2 * n > NAMES:
            limit = f"at most {NAMES // 2} with keys='name', since there are {NAMES} names"
            raise LimitError("haystack", "n_pairs", n, limit, "Use keys='uuid'.")
        drawn = [name(number) for number in draw(rng, NAMES, 2 * n)]
    else:
        drawn = [str(UUID(int=rng.getrandbits(128))) for _ in range(2 * n)]
    return list(zip(drawn[::2], drawn[1::2], strict=True))


def render(content: Pairs) -> str:
    """The pairs as ``json.dumps(dict(pairs))`` writes them: 80 characters a pair of UUIDs, 16 a pair of names."""
    return "{" + ", ".join(f'"{key}": "{value}"' for key, value in content) + "}"


def haystack(n: int, seed: int = 0, keys: Keys = "uuid") -> str:
    """A haystack of N pairs as text, 80 N characters long; 16 N with names.

    >>> haystack(1)
    '{"e3e70682-c209-4cac-629f-6fbed82c07cd": "f728b4fa-4248-5e3a-0a5d-2f346baa9455"}'
    """
    return render(pairs(n, seed, keys))


def draw(rng: random.Random, n: int, k: int) -> list[int]:
    """k of n numbers without replacement, in the order of the draw.

    It uses `Random.random` alone, whose sequence Python promises to keep; `sample` and `shuffle` have no such promise.
    """
    pool = list(range(n))
    for at in range(k):
        other = at + int(rng.random() * (n - at))
        pool[at], pool[other] = pool[other], pool[at]
    return pool[:k]
