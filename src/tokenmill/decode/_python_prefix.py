"""Text that can still become Python source: this interpreter's own parser says so, nothing is ever run.

The parser is fed the text and an end that it cannot mistake for the end of a line. A parser that asks for more has
found every token in its place; one that fails earlier has found a token that nothing can mend. Only the last token
may be half written, so it is tried as each token that it can grow into.
"""

from __future__ import annotations

import ast
import codeop
import functools
import keyword
import math
import re
import warnings
from collections.abc import Iterator

from tokenmill.decode._potential import Potential, State, begin, score
from tokenmill.text._utf8 import text_of

__all__ = ["python_prefix"]

_FLAGS: int = getattr(codeop, "PyCF_ALLOW_INCOMPLETE_INPUT", 0x4000)
# A backslash at the end of the source: the tokenizer stops there, and no line or block is closed.
_MORE = " \\\n"
_WORDS = sorted({*keyword.kwlist, *keyword.softkwlist})
_BEHIND_NUMBERS = ("and", "else", "for", "if", "in", "is", "not", "or")
_QUOTED = frozenset({"r", "u", "b", "f", "t", "br", "rb", "fr", "rf", "tr", "rt"})
_OPERATORS = (
    *("!=", "**", "//", ">>", "<<", "<=", ">=", "==", "->", "+=", "-=", "*=", "/=", "%=", "@=", "&=", "|=", "^=", ":="),
    *("**=", "//=", ">>=", "<<=", "...", ".0", "}}"),
)
_QUOTES = ("'", '"', "'''", '"""')
_WORD = re.compile(r"[A-Za-z0-9_]+\Z")
_NUMBER = re.compile(
    r"(?<!\w)(?!\w*__)"
    r"(?:0[xX][0-9a-fA-F_]*|0[oO][0-7_]*|0[bB][01_]*|(?=\.?\d)[0-9_]*\.?[0-9_]*(?:[eE][+-]?[0-9_]*)?[jJ]?)"
    rf"(?P<word>{'|'.join(word[:length] for word in _BEHIND_NUMBERS for length in range(len(word), 0, -1))}|)\Z"
)
_OPEN = re.compile(
    r"unterminated (?:triple-quoted )?(?P<kind>[a-z]-)?string literal(?: \(detected at line (?P<line>\d+)\))?"
)
_LITERAL = re.compile(r"(?P<prefix>[A-Za-z]{0,2})(?P<quote>['\"])")


def python_prefix() -> Potential:
    """The texts that compile with this interpreter, and what can still become one.

    No prefix of such a text is ever refused, whatever byte it ends at. Most definite errors are refused at once, and
    those that only the compiler sees (``return`` outside a function) at the end of their line; what the interpreter
    says about the inside of a string waits for its end. Each check reads the whole text.
    """
    return _Python()


class _Python:
    """A potential that asks the compiler; its states are the bytes so far."""

    def __repr__(self) -> str:
        return "python_prefix()"

    def prefix(self, context: bytes, /) -> float:
        found = text_of(context)
        if found is None:
            return -math.inf
        text, pending = found
        # Any character that is still on its way can stand in a string or a comment, and a letter in a name.
        return score(_can_become_python(text + "é" if pending else text))

    def complete(self, context: bytes, /) -> float:
        found = text_of(context)
        return score(found is not None and not found[1] and _compiles(found[0]))

    def start(self) -> State:
        return begin(self)


def _can_become_python(text: str) -> bool:
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if _refused_by_compiler(text[: text.rfind("\n") + 1]):
        return False
    if _wants_more(text + _MORE):
        return _place_of_string_allows(text)
    if text.endswith("\\") and _wants_more(text + "\n"):
        return True
    return any(_wants_more(grown + _MORE) for grown in _grown(text))


def _grown(text: str) -> Iterator[str]:
    """The text with its last token grown into each kind of token that it may be the start of."""
    if found := _WORD.search(text):
        before, word = text[: found.start()], found[0]
        if word in _WORDS:
            yield text + "_0"
        if word.lower() in _QUOTED:
            yield text + "''"
        yield from (before + longer for longer in _WORDS if longer.startswith(word) and longer != word)
    if found := _NUMBER.search(text):
        before, word = text[: found.start()], found["word"]
        words = [f" {longer}" for longer in _BEHIND_NUMBERS if longer.startswith(word)] if word else [""]
        yield from (before + number + longer for number in ("0", "0j") for longer in words)
    # The start of an operator of three is an operator itself, or (two dots) a number's or an attribute's.
    before, end = text[:-1], text[-1:]
    yield from (before + longer for longer in _OPERATORS if longer.startswith(end) and longer != end)
    # From Python 3.12 on an open string inside an f-string with the same quotes is reported as a brace that is missing.
    yield from (f"{text} {quote}" for quote in _QUOTES if quote in text)


def _wants_more(source: str) -> bool:
    """Does the parser take every token and ask for more (or need no more)?"""
    error = _parse(source, _FLAGS)
    if error is None or "incomplete input" in error.msg:
        return True
    # From Python 3.12 on the end of the source inside an f-string is an error of its own.
    detected = _OPEN.match(error.msg)
    if detected is None or not detected["kind"]:
        return False
    return int(detected["line"] or 0) >= source.count("\n")


def _place_of_string_allows(text: str) -> bool:
    """If the text ends inside a string: may a string stand where it begins?"""
    last_line = text[text.rfind("\n") + 1 :]
    if not ("'" in last_line or '"' in last_line or "'''" in text or '"""' in text):
        return True
    error = _parse(text + _MORE, 0)
    if error is None or not _OPEN.match(error.msg) or not error.lineno or not error.offset:
        return True
    lines = text.split("\n")
    start = sum(len(line) + 1 for line in lines[: error.lineno - 1]) + error.offset - 1
    literal = _LITERAL.match(text, start)
    if literal is None:
        return True
    return _wants_more(text[:start] + literal["prefix"] + 2 * literal["quote"] + _MORE)


def _parse(source: str, flags: int) -> SyntaxError | None:
    """The error of parsing, or None."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compile(source, "<text>", "exec", flags | ast.PyCF_ONLY_AST, dont_inherit=True)
    except SyntaxError as error:
        return error
    except RecursionError:
        return None  # it was parsed; only its tree is too deep to be handed out
    except (MemoryError, ValueError, OverflowError) as error:
        return SyntaxError(str(error))
    return None


def _compiles(source: str) -> bool:
    return _compile_error(source) is None


def _compile_error(source: str) -> Exception | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compile(source, "<text>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError) as error:
        return error
    return None


@functools.lru_cache(maxsize=256)
def _refused_by_compiler(lines: str) -> bool:
    """Whole lines that parse and are wrong all the same, in a way that no later line mends."""
    error = _compile_error(lines)
    if not isinstance(error, SyntaxError) or _parse(lines, 0) is not None:
        return False
    # The variable that a nonlocal statement names may be bound further down.
    return "binding" not in error.msg
