"""Haystacks: a JSON object of random UUIDs, and draws that are the same on every platform and Python."""

from __future__ import annotations

import random
from uuid import UUID

from tokenmill.errors import LimitError

PAIR_CHARS = 80  # two UUIDs of 36, four quotes, ": " and ", "; the braces take the place of the last ", "
Pairs = list[tuple[str, str]]


def pairs(n: int, seed: int = 0) -> Pairs:
    """N pairs of UUIDs that are not seen twice, drawn in the order k0, v0, k1, v1, ...

    With seed 0 these are the pairs of the published rows; the pairs of n are the first n of those of n + 1.

    Raises:
        LimitError: fewer than one pair.
    """
    if n < 1:
        raise LimitError("haystack", "n_pairs", n, "at least 1")
    rng = random.Random(seed)
    drawn = [str(UUID(int=rng.getrandbits(128))) for _ in range(2 * n)]
    return list(zip(drawn[::2], drawn[1::2], strict=True))


def render(content: Pairs) -> str:
    """The pairs as ``json.dumps(dict(pairs))`` writes them: 80 characters a pair where keys and values have 36."""
    return "{" + ", ".join(f'"{key}": "{value}"' for key, value in content) + "}"


def haystack(n: int, seed: int = 0) -> str:
    """A haystack of N pairs as text, 80 N characters long.

    >>> haystack(1)
    '{"e3e70682-c209-4cac-629f-6fbed82c07cd": "f728b4fa-4248-5e3a-0a5d-2f346baa9455"}'
    """
    return render(pairs(n, seed))


def draw(rng: random.Random, n: int, k: int) -> list[int]:
    """k of n numbers without replacement, in the order of the draw.

    It uses `Random.random` alone, whose sequence Python promises to keep; `sample` and `shuffle` have no such promise.
    """
    pool = list(range(n))
    for at in range(k):
        other = at + int(rng.random() * (n - at))
        pool[at], pool[other] = pool[other], pool[at]
    return pool[:k]
