"""What can be asked of a haystack: one class a task, which places its needles, words its question and knows the answer.

The wording of the single needle is the published one; the others follow it. Placement draws from a stream of its own,
so that the haystack's bytes do not depend on what is asked, and forward and backward threads take the same pairs.
"""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, get_args

from tokenmill.errors import LimitError, unknown_name
from tokenmill.probe._example import NOT_APPLICABLE
from tokenmill.probe._haystack import Pairs, draw

Placement = Literal["random", "clustered"]
Direction = Literal["forward", "backward", "random"]
Branches = Literal["final", "all"]
CHARACTERS = ("*", "&")
WHERE = "needle-threading"
_LIST = "Give them as a list of strings"
_THREAD = (
    "A value in the JSON object may itself be a key with a value of its own, and so on: a thread. "
    "A thread ends at a value that is not a key."
)


class Asked(Protocol):
    """A task with its parameters."""

    task: ClassVar[str]

    @property
    def pairs_needed(self) -> int: ...
    @property
    def extra_chars(self) -> int: ...
    def place(self, content: Pairs, rng: random.Random, /) -> tuple[Pairs, list[str], list[str]]: ...
    def question(self, keys: list[str], /) -> str: ...
    def columns(self) -> dict[str, Any]: ...


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Refuse what is not a whole number of at least so many."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise LimitError(WHERE, name, value, f"a whole number, at least {least}")


def check_choice(name: str, value: Any, choices: Any) -> None:
    """Refuse what is not one of the values of a Literal, or of a tuple."""
    known = get_args(choices) or choices
    if value not in known:
        raise unknown_name(WHERE, name, str(value), known)


def check_depth(value: Any) -> None:
    """Refuse what is not a percentage."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 100:
        raise LimitError(WHERE, "depth", value, "in [0, 100]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Single:
    """One value. `depth` is where its pair stands: 0 is the first pair, 100 the last."""

    task: ClassVar[str] = "single"
    extra_chars: ClassVar[int] = 0
    depth: float = 50

    def __post_init__(self) -> None:
        check_depth(self.depth)

    @property
    def pairs_needed(self) -> int:
        return 1

    def place(self, content: Pairs, rng: random.Random) -> tuple[Pairs, list[str], list[str]]:  # noqa: ARG002
        key, value = content[int(self.depth * (len(content) - 1) / 100)]
        return content, [key], [value]

    def question(self, keys: list[str]) -> str:
        asked = f'Extract the value corresponding to the specified key in the JSON object. Key: "{keys[0]}"'
        return f"{asked}\n Corresponding value: "

    def columns(self) -> dict[str, Any]:
        return {"needle_depth": f"{self.depth:g}", "num_needles": 1, "needle_placement": "depthwise"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Multiple:
    """The values of `num_needles` keys, in the order in which they are asked; pairs anywhere, or in one block."""

    task: ClassVar[str] = "multiple"
    extra_chars: ClassVar[int] = 0
    num_needles: int = 10
    placement: Placement = "random"

    def __post_init__(self) -> None:
        check_count("num_needles", self.num_needles)
        check_choice("placement", self.placement, Placement)

    @property
    def pairs_needed(self) -> int:
        return self.num_needles

    def positions(self, n: int, rng: random.Random) -> list[int]:
        """Which pairs are needles, in the order of the draw."""
        if self.placement == "random":
            return draw(rng, n, self.num_needles)
        first = int(rng.random() * (n - self.num_needles + 1))
        return [first + at for at in draw(rng, self.num_needles, self.num_needles)]

    def place(self, content: Pairs, rng: random.Random) -> tuple[Pairs, list[str], list[str]]:
        needles = [content[at] for at in self.positions(len(content), rng)]
        return content, [key for key, _ in needles], [value for _, value in needles]

    def question(self, keys: list[str]) -> str:
        asked = f"Extract the values corresponding to the specified keys in the JSON object. {_LIST}"
        return f"{asked}, in the order of the keys. Keys: {json.dumps(keys)}\n Corresponding values: "

    def columns(self) -> dict[str, Any]:
        return {"num_needles": self.num_needles, "needle_placement": self.placement}


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditional(Multiple):
    """The values of all keys that contain a character; it takes the place of one digit of each needle's key."""

    task: ClassVar[str] = "conditional"
    character: str = "*"

    def __post_init__(self) -> None:
        Multiple.__post_init__(self)
        check_choice("character", self.character, CHARACTERS)

    def place(self, content: Pairs, rng: random.Random) -> tuple[Pairs, list[str], list[str]]:
        made = list(content)
        needles = sorted(self.positions(len(content), rng))
        for at in needles:
            key, value = made[at]
            digits = [i for i, letter in enumerate(key) if letter != "-"]
            spot = digits[int(rng.random() * len(digits))]
            made[at] = (key[:spot] + self.character + key[spot + 1 :], value)
        return made, [], [made[at][1] for at in needles]

    def question(self, keys: list[str]) -> str:  # noqa: ARG002
        asked = f'Extract all values in the JSON object whose key contains the character "{self.character}".'
        return f"{asked} {_LIST}.\n Corresponding values: "

    def columns(self) -> dict[str, Any]:
        return Multiple.columns(self) | {"conditional_character": self.character}


@dataclass(frozen=True, slots=True, kw_only=True)
class Threading:
    """The last value of a chain of `thread_length` pairs, each value of which is the next one's key."""

    task: ClassVar[str] = "threading"
    thread_length: int = 5
    direction: Direction = "forward"

    def __post_init__(self) -> None:
        check_count("thread_length", self.thread_length)
        check_choice("direction", self.direction, Direction)

    @property
    def threads(self) -> int:
        """How many chains there are."""
        return 1

    @property
    def pairs_needed(self) -> int:
        return self.threads * self.thread_length

    @property
    def extra_chars(self) -> int:
        """Characters of the haystack beyond 80 a pair."""
        return 0

    def place(self, content: Pairs, rng: random.Random) -> tuple[Pairs, list[str], list[str]]:
        made = list(content)
        drawn = draw(rng, len(made), self.pairs_needed)
        chains = [in_direction(drawn[i :: self.threads], self.direction) for i in range(self.threads)]
        for chain in chains:
            for at, after in itertools.pairwise(chain):
                made[at] = (made[at][0], made[after][0])
        return made, [made[chain[0]][0] for chain in chains], [made[chain[-1]][1] for chain in chains]

    def question(self, keys: list[str]) -> str:
        asked = "Follow the thread from the specified key to its end and extract its final value."
        return f'{_THREAD} {asked} Key: "{keys[0]}"\n Corresponding final value: '

    def columns(self) -> dict[str, Any]:
        return {
            "thread_length": self.thread_length,
            "thread_direction": self.direction,
            "num_threads": self.threads,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class MultiThreading(Threading):
    """The last values of `num_threads` chains that share no pair, in the order of their start keys."""

    task: ClassVar[str] = "multi-threading"
    num_threads: int = 3

    def __post_init__(self) -> None:
        Threading.__post_init__(self)
        check_count("num_threads", self.num_threads)

    @property
    def threads(self) -> int:
        return self.num_threads

    def question(self, keys: list[str]) -> str:
        asked = "Follow the threads from the specified keys to their ends and extract their final values."
        return f"{_THREAD} {asked} {_LIST}, in the order of the keys. Keys: {json.dumps(keys)}\n Corresponding values: "


@dataclass(frozen=True, slots=True, kw_only=True)
class Branched(Threading):
    """A thread that forks at each step into `branching_factor` keys, made of the value and a number; one goes on.

    With branches "final" the last step has one key and its value is asked; with "all", the values of all its branches.
    """

    task: ClassVar[str] = "branched"
    branching_factor: int = 2
    branches: Branches = "final"

    def __post_init__(self) -> None:
        Threading.__post_init__(self)
        check_count("branching_factor", self.branching_factor, 2)
        check_choice("branches", self.branches, Branches)
        # With a single last key, a thread of two steps has no place to fork.
        check_count("thread_length", self.thread_length, 3 if self.branches == "final" else 2)

    def width(self, step: int) -> int:
        """How many keys refer to the value before this step; the first step has the start key alone."""
        alone = step == 1 or (step == self.thread_length and self.branches == "final")
        return 1 if alone else self.branching_factor

    @property
    def pairs_needed(self) -> int:
        return sum(self.width(step) for step in range(1, self.thread_length + 1))

    @property
    def extra_chars(self) -> int:
        steps = range(2, self.thread_length + 1)
        return sum(len(f"-{number}") for step in steps for number in range(1, self.width(step) + 1))

    def place(self, content: Pairs, rng: random.Random) -> tuple[Pairs, list[str], list[str]]:
        made = list(content)
        drawn = draw(rng, len(made), self.pairs_needed)
        chain = in_direction(drawn[: self.thread_length], self.direction)
        spare = iter(drawn[self.thread_length :])
        last: list[int] = []
        for step, at in enumerate(chain[1:], start=2):
            width = self.width(step)
            stem = made[chain[step - 2]][1]
            numbers = draw(rng, width, width)
            sisters = [at, *(next(spare) for _ in range(width - 1))]
            for number, place in zip(numbers, sisters, strict=True):
                made[place] = (f"{stem}-{number + 1}", made[place][1])
            last = sorted(sisters)
        return made, [made[chain[0]][0]], [made[at][1] for at in last]

    def question(self, keys: list[str]) -> str:
        rule = 'A value "x" goes on at the keys "x-1", "x-2" and so on, if they are in the JSON object: a thread with '
        rule += "branches, of which one goes on to full length. Follow the longest thread from the specified key"
        if self.branches == "final":
            return f'{rule} and extract its final value. Key: "{keys[0]}"\n Corresponding final value: '
        asked = f"and extract all values of its last step. {_LIST}."
        return f'{rule} {asked} Key: "{keys[0]}"\n Corresponding values: '

    def columns(self) -> dict[str, Any]:
        return Threading.columns(self) | {"branching_factor": self.branching_factor, "branches": self.branches}


_ALL = (Single, Multiple, Conditional, Threading, MultiThreading, Branched)
KINDS: dict[str, Any] = {kind.task: kind for kind in _ALL}


def in_direction(positions: list[int], direction: str) -> list[int]:
    """Positions as a chain passes them: rising, falling, or as they were drawn."""
    return positions if direction == "random" else sorted(positions, reverse=direction == "backward")


def defaults() -> dict[str, Any]:
    """The columns of an example to which nothing of a task applies."""
    return {
        "needle_depth": NOT_APPLICABLE,
        "num_needles": 0,
        "needle_placement": NOT_APPLICABLE,
        "conditional_character": NOT_APPLICABLE,
        "thread_length": 1,
        "thread_direction": NOT_APPLICABLE,
        "num_threads": 0,
    }
