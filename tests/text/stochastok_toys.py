"""Slow twins of StochasTok: the paper's loop, its exact law, and the table by brute force."""

from __future__ import annotations

import random
from collections.abc import Sequence
from fractions import Fraction
from math import floor

from tokenmill.text import ExpansionTable

TOY: list[bytes | None] = [b"a", b"b", b"ab", b"abb", b"bb", None]
RUNS: list[bytes | None] = [b"a", b"aa", b"aaa", b"aaaa", b"aaaaaaa"]


def brute_force(tokens: Sequence[bytes | None]) -> list[set[tuple[int, int]]]:
    """The pairs of every token, by trying all pairs of tokens."""
    known = [(i, t) for i, t in enumerate(tokens) if t and t not in tokens[:i]]
    return [{(i, j) for i, a in known for j, b in known if t is not None and a + b == t} for t in tokens]


def loop(table: ExpansionTable, ids: list[int], p: float, rng: random.Random, most: int | None = None) -> list[int]:
    """The paper's process, an attempt at a time."""
    ids, won = list(ids), 0
    for _ in range(floor(p * len(ids))):
        if most is not None and won >= most:
            break
        at = rng.randrange(len(ids))
        pairs = table.pairs(ids[at])
        if pairs:
            ids[at : at + 1] = rng.choice(pairs)
            won += 1
    return ids


State = tuple[tuple[int, int], ...]


def start(ids: Sequence[int]) -> State:
    """A sequence with, for every token, its source."""
    return tuple((token, i) for i, token in enumerate(ids))


def exact_law(
    table: ExpansionTable,
    state: State,
    attempts: int,
    most: int | None = None,
    protected: frozenset[int] = frozenset(),
) -> dict[State, Fraction]:
    """The law of the outcome of so many attempts, as fractions."""
    law: dict[tuple[State, int], Fraction] = {(state, 0): Fraction(1)}
    for _ in range(attempts):
        following: dict[tuple[State, int], Fraction] = {}
        for (leaves, won), mass in law.items():
            if most is not None and won >= most:
                following[leaves, won] = following.get((leaves, won), Fraction(0)) + mass
                continue
            for at, (token, source) in enumerate(leaves):
                pairs = [] if source in protected else table.pairs(token)
                after = [((*leaves[:at], (a, source), (b, source), *leaves[at + 1 :]), won + 1) for a, b in pairs]
                for one in after or [(leaves, won)]:
                    share = mass / len(leaves) / len(after or [0])
                    following[one] = following.get(one, Fraction(0)) + share
        law = following
    found: dict[State, Fraction] = {}
    for (leaves, _), mass in law.items():
        found[leaves] = found.get(leaves, Fraction(0)) + mass
    return found
