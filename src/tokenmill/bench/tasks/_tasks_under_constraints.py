"""Prompts with constraints and, where there is one, the right answer: made from templates with a seed.

Every text is one line: a line break ends it, as the end token does.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date, timedelta
from functools import cache
from pathlib import Path
from typing import Any

from tokenmill.bench.task import Item
from tokenmill.errors import LimitError

MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip
NAMES = (
    "Anna", "Boris", "Chen", "Dora", "Emil", "Fatima", "Georg", "Hana",
    "Ivan", "Julia", "Karim", "Lena", "Marco", "Nora", "Omar", "Petra",
)  # fmt: skip
CITIES = ["Paris", "Berlin", "Madrid", "Rome", "Vienna", "Oslo", "Lisbon", "Prague", "Dublin", "Athens"]
DATE = r"(19|20)[0-9]{2}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])"
NUMBERS = 'start: NUMBER (", " NUMBER)*\nNUMBER: /[1-9][0-9]?/\n'
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}, "city": {"enum": CITIES}},
    "required": ["name", "age", "city"],
    "additionalProperties": False,
}
OPENINGS = (
    "The old man walked down to",
    "In the morning the children",
    "A good way to learn music is",
    "She opened the door and saw",
    "My favourite food is",
    "The weather today is",
    "On the last day of our trip",
    "If you want to stay warm in winter,",
    "The king asked his son",
    "At night the town",
    "When the train arrived,",
    "Most people think that cats",
)
PYTHON = (
    ("the sum of a and b", "a + b"),
    ("x squared", "x ** 2"),
    ("the length of the list items", "len(items)"),
    ("the largest value in values", "max(values)"),
    ("the name in upper case", "name.upper()"),
    ("the first element of items", "items[0]"),
    ("the last element of items", "items[-1]"),
    ("the keys of the dictionary d", "d.keys()"),
    ("the absolute value of x", "abs(x)"),
    ("the words of the text", "text.split()"),
    ("x converted to a string", "str(x)"),
    ("the sorted values", "sorted(values)"),
    ("the product of a and b", "a * b"),
    ("whether x is greater than 10", "x > 10"),
    ("the sum of the values", "sum(values)"),
    ("text without blanks at the ends", "text.strip()"),
)


@dataclass(frozen=True, slots=True)
class Asked:
    """A prompt and what its line must satisfy.

    Attributes:
        prompt: text.
        constraint: one of the keys of `BUILDERS`, and its value.
        answer: the right line, if there is one.
        open: the line may stop at the length limit, since any beginning of it is a text as well.
    """

    prompt: str
    constraint: tuple[str, str]
    answer: str | None = None
    open: bool = False

    def right(self, text: str) -> bool:
        """Whether a line is the right answer; JSON texts are compared as values."""
        if self.answer is None:
            return False
        if self.constraint[0] == "json_schema":
            try:
                return json.loads(text) == json.loads(self.answer)
            except json.JSONDecodeError:
                return False
        return text.strip() == self.answer


def no_letter_e(text: str) -> bool:
    """No letter e, in either case."""
    return "e" not in text and "E" not in text


def short_words(text: str) -> bool:
    """No word of more than five characters."""
    return all(len(word) <= 5 for word in text.split())


def one_line(text: str) -> bool:
    """No line break: the text has ended by then."""
    return not any(c in text for c in "\n\r")


@cache
def build(kind: str, source: str) -> Any:
    """The constraint of a kind ("regex", "json_schema", "grammar", "python", "predicate") and its source."""
    return BUILDERS[kind](source)


def _predicate(source: str) -> Any:
    from tokenmill import decode
    from tokenmill.decode._predicate import named_function

    function = named_function("bench constrain", source)
    return decode.predicate(lambda text: one_line(text) and function(text), name=source)


def _python(_: str) -> Any:
    from tokenmill import decode

    return decode.both(decode.python_prefix(), decode.predicate(one_line))


def _json(source: str) -> Any:
    from tokenmill import decode

    return decode.json_schema(source, whitespace="spaced")


def _regex(source: str) -> Any:
    from tokenmill import decode

    return decode.regex(source)


def _grammar(source: str) -> Any:
    from tokenmill import decode

    return decode.grammar(source)


BUILDERS: Mapping[str, Callable[[str], Any]] = {
    "regex": _regex,
    "json_schema": _json,
    "grammar": _grammar,
    "python": _python,
    "predicate": _predicate,
}


def _date(rng: random.Random) -> Asked:
    def shown(day: date) -> str:
        return f"{day.day} {MONTHS[day.month - 1]} {day.year}"

    days = [date(1950, 1, 1) + timedelta(days=rng.randrange(27_000)) for _ in range(4)]
    shots = "".join(f"{shown(day)} is {day.isoformat()}\n" for day in days[:3])
    return Asked(f"Dates in ISO format:\n{shots}{shown(days[3])} is ", ("regex", DATE), days[3].isoformat())


def _person(rng: random.Random) -> Asked:
    people = [{"name": name, "age": rng.randrange(18, 90), "city": rng.choice(CITIES)} for name in rng.sample(NAMES, 3)]
    texts = [f"{p['name']} is {p['age']} years old and lives in {p['city']}.\nJSON: " for p in people]
    shots = "".join(text + json.dumps(p) + "\n" for text, p in zip(texts[:2], people[:2], strict=True))
    return Asked(shots + texts[2], ("json_schema", json.dumps(PERSON)), json.dumps(people[2]))


def _numbers(rng: random.Random) -> Asked:
    ranges = [(first, first + rng.randrange(2, 6)) for first in rng.sample(range(2, 60), 4)]
    lists = [", ".join(map(str, range(a, b + 1))) for a, b in ranges]
    lines = [f"From {a} to {b}: " for a, b in ranges]
    shots = "".join(line + numbers + "\n" for line, numbers in zip(lines[:3], lists[:3], strict=True))
    return Asked(shots + lines[3], ("grammar", NUMBERS), lists[3])


def _expression(rng: random.Random) -> Asked:
    shots = rng.sample(PYTHON, 5)
    text = "".join(f"# {what}\n{how}\n" for what, how in shots[:4])
    return Asked(f"{text}# {shots[4][0]}\n", ("python", ""), shots[4][1])


def _lipogram(rng: random.Random) -> Asked:
    return Asked(rng.choice(OPENINGS), ("predicate", f"{__name__}:no_letter_e"), open=True)


def _short(rng: random.Random) -> Asked:
    return Asked(rng.choice(OPENINGS), ("predicate", f"{__name__}:short_words"), open=True)


KINDS: Mapping[str, Callable[[random.Random], Asked]] = {
    "date": _date,
    "json": _person,
    "numbers": _numbers,
    "python": _expression,
    "lipogram": _lipogram,
    "short-words": _short,
}


def made(kind: str, limit: int, seed: int) -> list[Item]:
    """``limit`` different prompts of a kind."""
    rng = random.Random(f"{seed} {kind}")
    found: dict[str, Item] = {}
    for _ in range(200 * limit):
        asked = KINDS[kind](rng)
        digest = hashlib.sha256(asked.prompt.encode()).hexdigest()[:10]
        found.setdefault(digest, Item(f"{kind}:{digest}", kind, asked))
        if len(found) == limit:
            return list(found.values())
    raise LimitError("bench constrain", "limit", limit, f"at most {len(found)} for {kind}")


def from_file(path: Path) -> dict[str, list[Item]]:
    """The prompts of a user's file, by kind: JSON lines with "prompt" and one constraint.

    Raises:
        LimitError: no such file, or a line that is not as it should be, with its number.
    """
    if not path.is_file():
        raise LimitError("bench constrain", "data", str(path), "a file of JSON lines")
    found: dict[str, list[Item]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        where = f"{path}:{number}"
        try:
            record = json.loads(line)
            prompt = str(record["prompt"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise LimitError(where, "line", line[:60], 'a JSON object with "prompt"') from error
        named = [name for name in BUILDERS if name in record]
        if len(named) != 1:
            raise LimitError(where, "constraint", named, f"one of {', '.join(BUILDERS)}")
        source = record[named[0]]
        text = source if isinstance(source, str) else json.dumps(source)
        answer = None if record.get("answer") is None else str(record["answer"])
        asked = Asked(prompt, (named[0], text), answer, bool(record.get("open", False)))
        kind = str(record.get("kind", named[0].replace("_", "-")))
        found.setdefault(kind, []).append(Item(str(record.get("id", number)), kind, asked))
    return found
