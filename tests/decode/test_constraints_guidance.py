"""Regular expressions, JSON schemas and grammars on bytes, against enumeration, `re` and jsonschema."""

from __future__ import annotations

import itertools
import json
import random
import re
import sys
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenmill.decode._guidance import grammar, json_schema, regex
from tokenmill.decode._lark import is_empty
from tokenmill.decode._potential import Potential, check_contract
from tokenmill.errors import LimitError, MissingExtraError, UnsupportedError


def words(alphabet: str, longest: int) -> list[str]:
    return ["".join(s) for n in range(longest + 1) for s in itertools.product(alphabet, repeat=n)]


def assert_language(potential: Potential, texts: list[str], accepted: set[str], longest: int) -> None:
    """Exactly the accepted texts are complete, and exactly their prefixes, byte by byte, are allowed."""
    for text in texts:
        assert (potential.complete(text.encode()) == 0) == (text in accepted), text
    prefixes = {a.encode()[:i] for a in accepted for i in range(len(a.encode()) + 1)}
    alphabet = sorted({byte for text in texts for byte in text.encode()} | {255})
    for n in range(longest + 1):
        for data in itertools.product(alphabet, repeat=n):
            assert (potential.prefix(bytes(data)) == 0) == (bytes(data) in prefixes), data


leaves = st.sampled_from(["a", "é", "[aé]", "(?:aé)", ""])
patterns = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda two: f"(?:{two[0]}|{two[1]})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,2}"])).map(lambda two: f"(?:{two[0]}){two[1]}"),
    ),
    max_leaves=3,
)


@given(patterns)
def test_a_pattern_means_what_it_means_to_re(pattern: str) -> None:
    """Three leaves, each at most two characters and twice there, so what starts well is whole within the texts."""
    texts = words("aé", 8)
    accepted = {text for text in texts if re.fullmatch(pattern, text)}
    potential = regex(pattern)
    assert_language(potential, words("aé", 6), accepted, 2)
    check_contract(potential, [text.encode() for text in words("aé", 3)])


@pytest.mark.parametrize(
    ("pattern", "alphabet"),
    [
        (r"^[0-9]{1,3}$", "19a"),
        (r"(ab|a)(bc|c)?", "abc"),
        (r"(?i)ab+|B", "abAB"),
        (r"a.b", "ab\n"),
        (r"(?s)a.b", "ab\n"),
        (r"\d\.\d", "1.٣"),
        (r"[^a]{2}", "abc"),
        (r"(a|aa)+b", "ab"),
        (r"a/b|a\\", "a/\\b"),
        (r"", "a"),
    ],
)
def test_patterns_are_exact_on_all_short_texts(pattern: str, alphabet: str) -> None:
    longest = 6 if len(alphabet) < 4 else 5
    texts = words(alphabet, longest)
    accepted = {text for text in texts if re.fullmatch(pattern, text)}
    assert_language(regex(pattern), texts, accepted, 2)


def test_bytes_of_a_character_may_come_one_by_one() -> None:
    start = regex("[é€𝐢]x").start()
    for character in ("é", "€", "𝐢"):
        state = start
        for byte in character.encode():
            assert state.allows(bytes([byte]))
            assert not state.accepting()
            state = state.advance(bytes([byte]))
        assert state.allows(b"x")
        assert state.advance(b"x").accepting()
    assert not start.allows("ê".encode())
    assert not start.allows(b"\xc3\xff")


def test_states_share_nothing() -> None:
    start = regex("a(b|c)*d").start()
    one = start.advance(b"a")
    two = one.advance(b"bc")
    three = two.advance(b"d")
    assert [s.accepting() for s in (start, one, two, three)] == [False, False, False, True]
    assert [s.allows(b"a") for s in (start, one, two, three)] == [True, False, False, False]
    assert not three.allows(b"d")
    assert start.allows(b"abcd")
    assert one.advance(b"") is one


def test_advancing_past_what_is_allowed_is_refused() -> None:
    state = regex("ab").start().advance(b"a")
    for data in (b"x", b"\xff"):
        with pytest.raises(LimitError, match="Ask allows"):
            state.advance(data)
    assert state.allows(b"b")


BRACKETS = 'start: item*\nitem: "(" start ")" | "[" start "]"'


def balanced(text: str) -> bool:
    stack = []
    for mark in text:
        if mark in "([":
            stack.append({"(": ")", "[": "]"}[mark])
        elif not stack or stack.pop() != mark:
            return False
    return not stack


def test_a_grammar_derives_what_enumeration_finds() -> None:
    potential = grammar(BRACKETS)
    texts = words("()[]", 6)
    for text in texts:
        assert (potential.complete(text.encode()) == 0) == balanced(text)
    accepted = {text for text in texts if balanced(text)}
    prefixes = {text[:i] for text in accepted for i in range(len(text) + 1)}
    for text in words("()[]", 3):
        assert (potential.prefix(text.encode()) == 0) == (text in prefixes)
    check_contract(potential, [text.encode() for text in words("()[]", 4)])


def test_a_grammar_of_sums() -> None:
    potential = grammar('start: term ("+" term)*\nterm: NUMBER | "(" start ")"\nNUMBER: /[0-9]/')
    for text in words("1+()", 6):
        short, shorter = text, re.sub(r"\(1(\+1)*\)", "1", text)
        while shorter != short:
            short, shorter = shorter, re.sub(r"\(1(\+1)*\)", "1", shorter)
        assert (potential.complete(text.encode()) == 0) == bool(re.fullmatch(r"1(\+1)*", short)), text


@pytest.mark.parametrize(
    ("lark", "empty"),
    [
        ('start: "a" start', True),
        ('start: "a" start | "b"', False),
        ("start: x\nx: y\ny: x", True),
        ("start: x?\nx: y\ny: x", False),
        ("start: [x]\nx: x", False),
        ('start: (x | "a")+\nx: x "b"', False),
        ('start: x{2,3}\nx: x "b"', True),
        ('start: x{0,3}\nx: x "b"', False),
        ("start: x~0..3\nx: x", False),
        ("start: x~2\nx: x", True),
        ('start: x+\nx: x "a"', True),
        ('start: A\nA: ~B\nB: B "x"', False),
        ('# s\nstart: "a" b-c // foo\nb-c: /x\\/y/ | "//"\n%ignore " "', False),
        ('start: %json {"const": "}"} start', True),
        ('start: %json {"const": "}"}', False),
        ('start: gen\ngen[stop="x"]: gen "a"', True),
        ('start: "a".."c"', False),
        ('start: A\nA: ~"a" & B\nB: "b" B', True),
        ('start: a b -> foo\n  | "x"\na: "x"\nb: "y" b', False),
        ('%import common.INT\nstart: INT "+" start', True),
        ('start: ((a))\na: (b)\nb: a | a "x"', True),
        ("start: | x\nx: x", False),
        ('start: x y\nx: "a" | "b"\ny: "c" y', True),
        ('start: x | y\nx: "a" x | "b" y\ny: "c" x | "d" y', True),
        ('start: x $ "b"\nx: x', False),
    ],
)
def test_a_grammar_that_derives_nothing_is_noticed(lark: str, empty: bool) -> None:
    assert is_empty(lark) == empty
    if empty:
        with pytest.raises(LimitError, match=r"language is empty|circular|stop"):
            grammar(lark)


@pytest.mark.parametrize(
    ("pattern", "error", "words"),
    [
        ("a(b", LimitError, "unclosed group at position 1"),
        ("é[b-a]", LimitError, "start must be <= the end at position 2"),
        ("a\n(b", LimitError, "unclosed group at position 3"),
        ("*", LimitError, "missing expression at position 0"),
        (r"[^\x00-\U0010ffff]", LimitError, "language is empty"),
        (r"a(?=b)", UnsupportedError, "look-ahead"),
        (r"a\b", UnsupportedError, "lookaround"),
        (r"(a)\1", UnsupportedError, "backreferences"),
    ],
)
def test_patterns_that_cannot_be(pattern: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        regex(pattern)


@pytest.mark.parametrize(
    ("lark", "error", "words"),
    [
        ("start: a", LimitError, "line 1, column 8 = 'start: a'.*unknown name"),
        ('start: "a"\n  | ( "b"', LimitError, r"line 2, column \d+ = '  \| \( \"b\"'.*Expected token '\)'"),
        ("start: /(?=a)/", LimitError, "line 1, column 8.*look-ahead"),
        ("", LimitError, "Empty grammar"),
        ('item: "a"', LimitError, "no start rule"),
        ("start: X\nX: A & B\nA: /a.*/\nB: /b.*/", LimitError, "language is empty"),
        ("start: <|tool|>", UnsupportedError, "special token"),
        ("start[max_tokens=3]: /a*/", UnsupportedError, "max_tokens"),
    ],
)
def test_grammars_that_cannot_be(lark: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        grammar(lark)


@pytest.mark.parametrize(
    ("schema", "error", "words"),
    [
        ('{"type": }', LimitError, "JSON: .* at line 1, column 10"),
        ("[1]", LimitError, "a JSON object"),
        ({"enum": [{1, 2}]}, LimitError, "not JSON serializable"),
        ({"properties": {"a": {"type": "strin"}}}, LimitError, r"\$.properties.a.type = 'strin'"),
        ({"minimum": "x"}, LimitError, r"\$.minimum = 'x'.*not of type 'number'"),
        ({"pattern": "("}, LimitError, r"\$.pattern = '\('"),
        ({"$ref": "#/$defs/x"}, LimitError, "/\\$defs/x.*does not exist"),
        ({"$ref": "http://example.com/x"}, LimitError, "does not fetch"),
        (False, LimitError, "Unsatisfiable"),
        ({"type": "integer", "minimum": 3, "maximum": 1}, LimitError, "Unsatisfiable.*minimum"),
        ({"type": "array", "uniqueItems": True}, UnsupportedError, "keywords uniqueItems"),
        ({"not": {}, "if": {}}, UnsupportedError, "if|not"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, UnsupportedError, "oneOf"),
        ({"type": "string", "format": "poem"}, UnsupportedError, "format: poem"),
        ({"type": "string", "pattern": "(?=a)"}, UnsupportedError, "look-ahead"),
    ],
)
def test_schemas_that_cannot_be(schema: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        json_schema(schema)


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["x", "é"]}, "maxItems": 2},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("whitespace", "allowed", "refused"),
    [
        ("any", ['{"name":"é","age":3}', '{ "name":\n"", "age" : 3}', '{"name": "a", "age": 150, "tags": ["x"]}'], []),
        ("compact", ['{"name":"é","age":3}'], ['{"name": "é","age":3}', '{"name":"é", "age":3}']),
        ("spaced", ['{"name": "é", "age": 3}'], ['{"name":"é","age":3}', '{"name": "é",  "age": 3}']),
    ],
)
def test_whitespace_of_json(whitespace: Any, allowed: list[str], refused: list[str]) -> None:
    potential = json_schema(json.dumps(PERSON), whitespace=whitespace)
    wrong = [
        '{"name": "a"}',
        '{"name": "abcdef", "age": 3}',
        '{"name": "a", "age": 151}',
        "{}",
        '{"age": 3, "name": ""}',
    ]
    for text in allowed:
        assert potential.complete(text.encode()) == 0
    for text in refused + wrong:
        assert potential.complete(text.encode()) != 0
    check_contract(potential, [text.encode() for text in allowed + refused + wrong])
    with pytest.raises(LimitError, match="compact"):
        json_schema(PERSON, whitespace="tight")  # type: ignore[arg-type]


SCHEMAS: list[Any] = [
    PERSON,
    True,
    {"type": "array", "items": {"anyOf": [{"type": "null"}, {"type": "integer"}]}, "minItems": 1},
    {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string"}}, "required": ["a"]},
    {"type": "object", "patternProperties": {"^a": {"type": "integer"}}, "minProperties": 1},
    {"type": "number", "multipleOf": 0.1, "maximum": 3},
    {"type": "string", "pattern": "^a|b$", "minLength": 3},
    {"$ref": "#/$defs/tree", "$defs": {"tree": {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 2}}},
    {"allOf": [{"type": "integer"}, {"minimum": 4}], "exclusiveMaximum": 1000},
    {"const": {"a": [1, 2.5, "é"]}},
]


def walk(potential: Potential, chance: random.Random) -> bytes | None:
    """A document made byte by byte, of what is allowed; stopped as soon as it is whole, most of the time."""
    state, read = potential.start(), b""
    likely = b'"}]0123456789abcxyz,: {[ntrue-.\\\xc3\xa9ful'
    for _ in range(120):
        if state.accepting() and chance.random() < 0.7:
            return read
        order = chance.sample(list(likely), len(likely)) + list(range(256))
        byte = next((bytes([b]) for b in order if state.allows(bytes([b]))), None)
        if byte is None:
            return read if state.accepting() else None
        state, read = state.advance(byte), read + byte
    return None


@pytest.mark.parametrize("number", range(len(SCHEMAS)))
def test_what_is_complete_is_valid(number: int) -> None:
    schema = SCHEMAS[number]
    potential = json_schema(schema)
    chance = random.Random(number)
    documents = [found for _ in range(60) if (found := walk(potential, chance)) is not None]
    assert len(documents) > 5
    for document in documents:
        assert potential.complete(document) == 0
        jsonschema.validate(json.loads(document), schema)
    check_contract(potential, documents[:3])


def test_a_key_that_is_spelled_another_way_is_still_that_key() -> None:
    """What llguidance alone would let through: an escaped key that overrides the first."""
    potential = json_schema(SCHEMAS[3])
    assert potential.complete(b'{"a":1,"\\u0061":2}') == 0
    assert potential.complete(b'{"a":1,"\\u0061":"x"}') != 0
    assert potential.complete(b'{"a":1,"c":"x"}') == 0


def test_numbers_and_nests_beyond_what_python_reads_are_not_whole() -> None:
    potential = json_schema(True)
    assert potential.complete(b"1" * 4000) == 0
    assert potential.prefix(b"1" * 5000) == 0
    assert potential.complete(b"1" * 5000) != 0
    deep = b"[" * 1500 + b"]" * 1500
    assert potential.prefix(deep) == 0
    assert potential.complete(deep) != 0


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    with pytest.raises(MissingExtraError, match=r"json_schema.*jsonschema.*tokenmill\[decode\]"):
        json_schema({})
    monkeypatch.setitem(sys.modules, "llguidance", None)
    for make in (regex, grammar, json_schema):
        with pytest.raises(MissingExtraError, match=r"llguidance.*tokenmill\[decode\]"):
            make("{}")
