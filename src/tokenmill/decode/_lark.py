"""What llguidance does not say about a grammar in its Lark dialect: that no string can satisfy it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass

from tokenmill.errors import UnsupportedError

_TOKEN = re.compile(
    r"""(?P<skip>\s+|//[^\n]*|\#[^\n]*)
      | (?P<text>"(?:\\.|[^"\\])*"i?|/(?!/)(?:\\.|[^/\\\n])+/[a-z]*)
      | (?P<special><[^<>\s]+>)
      | (?P<json>%(?:json|regex|llguidance)\s*(?=\{))
      | (?P<statement>%[a-z]+)
      | (?P<name>[A-Za-z_]\w*(?:-\w+)*)
      | (?P<number>\d+)
      | (?P<mark>->|::|\.\.|[:|()\[\]{}?*+~&,.!=@-])""",
    re.VERBOSE,
)
_Rules = Callable[[str], bool]


class _UnknownError(Exception):
    """A construct that this reading does not know."""


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str
    text: str


def is_empty(lark: str) -> bool:
    """Does every derivation of ``start`` go on for ever? False as well where the grammar uses what is not read here.

    Raises:
        UnsupportedError: the grammar names special tokens, or counts tokens, which bytes do not have.
    """
    tokens = _scan(lark)
    try:
        rules = _rules(tokens)
        productive: set[str] = set()
        while True:
            grown = {name for name, body in rules.items() if _Body(body, rules, productive).whole()}
            if grown == productive:
                return "start" in rules and "start" not in productive
            productive = grown
    except _UnknownError:
        return False


def _scan(lark: str) -> list[_Token]:
    found, at = [], 0
    while at < len(lark):
        match = _TOKEN.match(lark, at)
        if match is None:
            return []
        kind, at = str(match.lastgroup), match.end()
        if kind == "special":
            raise UnsupportedError("grammar", f"{match[0]} is a special token, which has no bytes", "Spell it as text.")
        if kind == "name" and match[0] in ("max_tokens", "max-tokens"):
            raise UnsupportedError("grammar", "max_tokens counts tokens, and a constraint reads bytes", "Use {m,n}.")
        if kind == "json":
            try:
                at = json.JSONDecoder().raw_decode(lark, at)[1]
            except json.JSONDecodeError:
                return []
        if kind != "skip":
            found.append(_Token(kind, match[0]))
    return found


def _rules(tokens: list[_Token]) -> dict[str, list[_Token]]:
    """The body of each rule. A rule starts at a name with a colon behind it, attributes in between left out."""
    starts = [i for i in range(len(tokens)) if tokens[i].kind == "name" and _body_from(tokens, i) is not None]
    stops = sorted({*starts, len(tokens), *(i for i, token in enumerate(tokens) if token.kind == "statement")})
    rules: dict[str, list[_Token]] = {}
    for start in starts:
        first = _body_from(tokens, start) or 0
        rules[tokens[start].text] = tokens[first : next(stop for stop in stops if stop > start)]
    return rules


def _body_from(tokens: list[_Token], at: int) -> int | None:
    at += 1
    if at < len(tokens) and tokens[at].text == "[":
        while at < len(tokens) and tokens[at].text != "]":
            if tokens[at].text in (":", "|", "("):
                return None
            at += 1
        at += 1
    return at + 1 if at < len(tokens) and tokens[at].text == ":" else None


class _Body:
    """A recursive descent through one rule's alternatives: can it produce a string from what is known to?"""

    def __init__(self, tokens: list[_Token], rules: dict[str, list[_Token]], productive: set[str]) -> None:
        self.tokens, self.rules, self.productive, self.at = tokens, rules, productive, 0

    def whole(self) -> bool:
        found = self._alternatives()
        if self.at < len(self.tokens):
            raise _UnknownError
        return found

    def _peek(self) -> str:
        return self.tokens[self.at].text if self.at < len(self.tokens) else ""

    def _take(self, text: str) -> bool:
        if self._peek() != text:
            return False
        self.at += 1
        return True

    def _alternatives(self) -> bool:
        found = self._sequence()
        while self._take("|"):
            found = self._sequence() or found
        return found

    def _sequence(self) -> bool:
        found = True
        while self._peek() not in ("", "|", ")", "]"):
            if self._take("->"):  # the name of an alternative
                self.at += 1
            elif not self._take("&"):
                found = self._item() and found
        return found

    def _item(self) -> bool:
        if self._take("~"):
            self._item()
            return True
        found = self._atom()
        while self._peek() in ("?", "*", "+", "{", "~"):
            mark = self._peek()
            self.at += 1
            if mark in "{~":
                first = self._peek()
                found = found or first in ("0", ",")
                while self._peek() and (self.tokens[self.at].kind == "number" or self._peek() in (",", "..", "}")):
                    self.at += 1
            found = found or mark in "?*"
        return found

    def _atom(self) -> bool:
        token = self.tokens[self.at]
        self.at += 1
        if token.text in ("(", "["):
            found = self._alternatives()
            if not self._take(")" if token.text == "(" else "]"):
                raise _UnknownError
            return found or token.text == "["
        if token.kind == "name":
            return token.text in self.productive or token.text not in self.rules
        if token.kind in ("text", "json"):
            if self._take(".."):
                self.at += 1
            return True
        raise _UnknownError
