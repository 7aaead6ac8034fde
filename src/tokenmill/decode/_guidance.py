"""Regular expressions, JSON schemas and grammars as constraints, by the parser of llguidance run on single bytes.

llguidance is made to mask a vocabulary of tokens. Here its vocabulary is the 256 bytes, so the constraint knows
nothing of tokens, and a check costs one look at the bytes that are asked about.
"""

from __future__ import annotations

import functools
import importlib
import json
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

from tokenmill.decode._lark import is_empty
from tokenmill.decode._potential import Potential, State, score
from tokenmill.errors import LimitError, MissingExtraError, UnsupportedError, unknown_name

__all__ = ["grammar", "json_schema", "regex"]

_WHITESPACE: dict[str, dict[str, Any]] = {
    "any": {"whitespace_flexible": True},
    "compact": {"whitespace_flexible": False},
    "spaced": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "},
}
_UNSUPPORTED_REGEX = re.compile(r"look-?around|backreference", re.IGNORECASE)


def regex(pattern: str) -> Potential:
    """The texts that a regular expression matches from beginning to end.

    The syntax is that of Rust's ``regex``: classes know Unicode, and there are no look-arounds or back-references.

    Raises:
        LimitError: the pattern is none (with the position), or no text matches it.
        UnsupportedError: look-arounds, back-references.
        MissingExtraError: llguidance is not installed.
    """
    engine = _engine("regex")
    matcher = _matcher(engine, engine.LLMatcher.grammar_from_regex(pattern))
    if matcher.is_error():
        error = matcher.get_error()
        reason, position = _regex_reason(error)
        if _UNSUPPORTED_REGEX.search(reason):
            raise UnsupportedError("regex", f"{reason} in {pattern!r}", "Use predicate with the module re.")
        where = "" if position is None else f" at position {position}"
        raise LimitError("regex", "pattern", pattern, f"a regular expression: {reason}{where}")
    return _checked("regex", "pattern", pattern, matcher)


def grammar(lark: str) -> Potential:
    """The texts that a context-free grammar derives from ``start``.

    The grammar is in llguidance's dialect of Lark. Its lexer takes the longest match of a terminal, so where two
    terminals can follow each other and share characters, join them into one or make them rules.

    Raises:
        LimitError: the grammar is none (with line and column), or no text satisfies it.
        UnsupportedError: special tokens or limits on tokens in the grammar.
        MissingExtraError: llguidance is not installed.
    """
    engine = _engine("grammar")
    matcher = _matcher(engine, engine.LLMatcher.grammar_from_lark(lark))
    if matcher.is_error():
        raise _grammar_error(lark, matcher.get_error())
    if is_empty(lark):
        raise _empty("grammar", "lark", lark)
    return _checked("grammar", "lark", lark, matcher)


def json_schema(
    schema: Mapping[str, Any] | str | bool, *, whitespace: Literal["any", "compact", "spaced"] = "any"
) -> Potential:
    """The JSON texts that a JSON Schema allows, with keys in the schema's order.

    Every complete text is also put before ``jsonschema``, so what is complete is valid, word for word.

    Args:
        schema: the schema, or its JSON text.
        whitespace: ``"any"`` between the parts, ``"compact"`` for none, ``"spaced"`` for one blank behind commas and
            colons as `json.dumps` writes it.

    Raises:
        LimitError: no JSON (with line and column), no schema (with the path), or a schema that nothing satisfies.
        UnsupportedError: keywords that llguidance does not know; they are named.
        MissingExtraError: llguidance or jsonschema is not installed.
    """
    if whitespace not in _WHITESPACE:
        raise unknown_name("json_schema", "whitespace", str(whitespace), _WHITESPACE)
    engine, checker = _engine("json_schema"), _import("json_schema", "jsonschema")
    value = _parsed(schema) if isinstance(schema, str) else schema
    valid = _validator(checker, value)
    if isinstance(value, bool):  # llguidance wants an object, where it can put its options
        value = {} if value else {"enum": []}
    built = engine.LLMatcher.grammar_from_json_schema(json.dumps(value), overrides=_WHITESPACE[whitespace])
    matcher = _matcher(engine, built)
    if matcher.is_error():
        raise _schema_error(value, matcher.get_error())
    return _checked("json_schema", "schema", value, matcher, valid)


class _Guided:
    """A potential that asks a matcher; each of its states owns one of its own."""

    def __init__(self, name: str, source: Any, matcher: Any, valid: Callable[[bytes], bool] | None) -> None:
        self.name, self.source, self.matcher, self.valid = name, source, matcher, valid

    def __repr__(self) -> str:
        return f"{self.name}({_short(self.source)!r})"

    def prefix(self, context: bytes, /) -> float:
        return score(_takes(self.matcher, context))

    def complete(self, context: bytes, /) -> float:
        state = self.start()
        return score(state.allows(context) and state.advance(context).accepting())

    def start(self) -> State:
        return _Parsed(self, self.matcher, b"")


class _Parsed:
    """A matcher behind the bytes that it has read. It is asked and copied, never moved."""

    __slots__ = ("_matcher", "_potential", "_read")

    def __init__(self, potential: _Guided, matcher: Any, read: bytes) -> None:
        self._potential, self._matcher, self._read = potential, matcher, read

    def allows(self, data: bytes, /) -> bool:
        return _takes(self._matcher, data)

    def advance(self, data: bytes, /) -> State:
        if not data:
            return self
        moved = self._matcher.deep_copy()
        if not moved.consume_tokens(list(data)):
            reason = moved.get_error().split("\n")[0] or "it is refused"
            raise LimitError(
                repr(self._potential),
                "data",
                data,
                f"allowed behind {self._read!r}, within llguidance's limits: {reason}",
                "Ask allows() before advance(); if it said yes, simplify the constraint.",
            )
        return _Parsed(self._potential, moved, self._read + data)

    def accepting(self) -> bool:
        valid = self._potential.valid
        return self._matcher.is_accepting() and (valid is None or valid(self._read))


def _takes(matcher: Any, data: bytes) -> bool:
    return matcher.validate_tokens(list(data)) == len(data)


def _import(where: str, package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise MissingExtraError(where, package, "decode") from error


def _engine(where: str) -> Any:
    return _import(where, "llguidance")


@functools.cache
def _bytes_vocabulary() -> Any:
    return _engine("llguidance").LLTokenizer("byte")


def _matcher(engine: Any, built: str) -> Any:
    return engine.LLMatcher(_bytes_vocabulary(), built, log_level=0)


def _checked(
    name: str, parameter: str, source: Any, matcher: Any, valid: Callable[[bytes], bool] | None = None
) -> Potential:
    """The potential, unless it refuses every first byte and the empty text."""
    if not matcher.is_accepting() and not any(matcher.validate_tokens([byte]) for byte in range(256)):
        raise _empty(name, parameter, source)
    return _Guided(name, source, matcher, valid)


def _empty(name: str, parameter: str, source: Any) -> LimitError:
    return LimitError(name, parameter, _short(source), "satisfied by some text", "Its language is empty.")


def _short(source: Any) -> Any:
    text = source if isinstance(source, str) else json.dumps(source)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _regex_reason(error: str) -> tuple[str, int | None]:
    """What is wrong with a pattern, and where. The parser underlines the place with carets, four blanks in."""
    lines = error.split("\n")
    reason = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), None)
    if reason is None:
        return lines[0].rpartition(": ")[2] if "): " in lines[0] else lines[0], None
    carets = next((line for line in lines if set(line) <= {" ", "^"} and "^" in line), None)
    several = any(re.match(r"\d+: ", line) for line in lines)
    return reason, None if carets is None or several else carets.index("^") - 4


def _grammar_error(lark: str, error: str) -> LimitError:
    reason = error.split("\n")[0]
    found = re.match(r"(?:at )?(\d+)\((\d+)\): (.*)", reason)
    if found is None:
        return LimitError("grammar", "lark", _short(lark), f"a Lark grammar: {reason}")
    # Behind an invalid regular expression stands what is wrong with it.
    why = re.search(r"\nerror: (.*)", error)
    line, column = int(found[1]), int(found[2])
    lines = lark.split("\n")
    text = lines[line - 1] if 0 < line <= len(lines) else ""
    limit = f"a Lark grammar: {why[1] if why else found[3]}"
    return LimitError("grammar", f"line {line}, column {column}", _short(text), limit)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        raise LimitError("json_schema", "schema", _short(text), where) from error


def _validator(checker: Any, schema: Any) -> Callable[[bytes], bool]:
    """Does a JSON text satisfy the schema? The schema itself is checked first; nothing is fetched."""
    try:
        json.dumps(schema)
    except (TypeError, ValueError) as error:
        raise LimitError("json_schema", "schema", schema, f"made of what JSON holds: {error}") from error
    if not isinstance(schema, (Mapping, bool)):
        raise LimitError("json_schema", "schema", _short(schema), "a JSON object, true or false")
    kind = checker.validators.validator_for(schema, default=checker.Draft202012Validator)
    try:
        kind.check_schema(schema)
    except checker.SchemaError as error:
        raise LimitError("json_schema", error.json_path, error.instance, f"valid: {error.message}") from error
    found = kind(schema, registry=_import("json_schema", "referencing").Registry())

    def valid(text: bytes) -> bool:
        try:
            return found.is_valid(json.loads(text))
        except (ValueError, RecursionError):  # numbers and nests beyond what Python reads
            return False

    return valid


def _schema_error(schema: Any, error: str) -> LimitError | UnsupportedError:
    reason = error.split("\n<state>")[0].strip()
    if found := re.match(r"Unimplemented keys: (\[.*\])", reason):
        names = ", ".join(json.loads(found[1]))
        return UnsupportedError("json_schema", f"llguidance does not know the keywords {names}", "Use a predicate.")
    if reason.startswith("oneOf constraints"):
        return UnsupportedError("json_schema", "llguidance does not know oneOf with options that overlap", "Use anyOf.")
    if reason.startswith("Unknown format"):
        return UnsupportedError("json_schema", f"llguidance does not know this keyword: {reason}", "Use a pattern.")
    if _UNSUPPORTED_REGEX.search(reason):
        what = f"llguidance does not know this in the keyword pattern: {_regex_reason(reason)[0]}"
        return UnsupportedError("json_schema", what, "Write it without.")
    return LimitError("json_schema", "schema", _short(schema), f"a schema that some text satisfies: {reason}")
