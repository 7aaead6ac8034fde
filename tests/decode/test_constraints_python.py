"""Python source as a constraint: every prefix of what compiles is allowed, definite errors are not."""

from __future__ import annotations

import ast
import random
import sys
import textwrap
import warnings
from functools import cache
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tokenmill.decode._potential import check_contract
from tokenmill.decode._python_prefix import python_prefix

PYTHON = python_prefix()
STDLIB = Path(ast.__file__).parent
INSERTS = [
    *("é", "if", "in ", " ", "\n", "'", '"', '"""', "\\", "\\\n", "(", ")", "[", "]", "{", "}", ":", "=", "!", ";"),
    *("f'", 'f"', "b'", "rb'", "0x1f", "1e+5", "1_0", "0xfor x", "...", "->", ":=", "#c\n", "\t", "  ", "\r\n", "\r"),
    *("lambda", "await ", "async ", "not ", "is ", "or ", "1if", "match", "case", "type", "_", "@", "**", "//"),
    *(">>=", "{x!r}", "{x:>{w}}", "{{", "\\N{EM DASH}", "\x0c", "क्षि", "·", "0", "j", ".", "..", ".5", "nonlocal x\n"),
]


@cache
def statements(number: int) -> list[str]:
    """Statements of one file of the standard library, whole and dedented."""
    files = sorted(STDLIB.glob("*.py"))
    text = files[number % len(files)].read_text(encoding="utf-8")
    lines = text.splitlines(keepends=True)
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.stmt) and node.end_lineno is not None:
            first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
            part = textwrap.dedent("".join(lines[first - 1 : node.end_lineno]))
            if 3 < len(part) < 400 and compiles(part):
                found.append(part)
    return found


def compiles(text: str) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            compile(text, "<test>", "exec", dont_inherit=True)
        except (SyntaxError, ValueError):
            return False
    return True


def refused(text: str) -> list[bytes]:
    data = text.encode()
    return [data[:i] for i in range(len(data) + 1) if PYTHON.prefix(data[:i]) != 0]


@pytest.mark.parametrize("number", range(0, 180, 5))
def test_every_byte_of_the_standard_library_is_allowed(number: int) -> None:
    parts = statements(number)
    for part in random.Random(number).sample(parts, min(len(parts), 8)):
        assert refused(part) == []
        assert PYTHON.complete(part.encode()) == 0


@settings(max_examples=400)
@given(st.data())
def test_every_byte_of_an_edited_source_is_allowed(data: st.DataObject) -> None:
    parts = [part for part in statements(data.draw(st.sampled_from(range(0, 180, 9)))) if len(part) < 120]
    assume(parts)
    text = data.draw(st.sampled_from(parts))
    for _ in range(data.draw(st.integers(1, 2))):
        at = data.draw(st.integers(0, len(text)))
        cut = data.draw(st.sampled_from([0, 0, 1, 2]))
        text = text[:at] + data.draw(st.sampled_from(INSERTS)) + text[at + cut :]
    assert (PYTHON.complete(text.encode()) == 0) == compiles(text)
    if compiles(text):
        assert refused(text) == []


SOURCES = [
    *("x = 5 if y else 3", "x = 5 in y, 5 is not y or 5 and 6", "not x", "x = 0xfor 3", "[1if 2else 3, 0b1or 2]"),
    *("x = 1e+5 - 1E-3j + 1_000.5 + .5 + 5. + 0xFF_FF + 0o17 + 0b1_1 + 012.5 + 00", "x = 1..real", "a = b = ...; c"),
    *("def f(a, /, *, b: int = 3, **c) -> int: return a != b", "if (n := 3) <= 4 <<2 >> 1 ** 2 // 3: n **= 2; n //= 1"),
    *("x @= y; x <<= 1; x >>= 2; x -= 3; x &= 4; x |= 5; x ^= 6; x %= 7", "from . import a\nfrom ....b import (c, d,)"),
    *(
        "'a\\\nb' \"c\" 'it\\'s' '' \"\"",
        "x = '''a\n'b' \"\"\" c\\''''",
        'x = """"a" \'\'\' \\""""',
        "rb'\\' ' + Rb'x' + bR''",
    ),
    *(
        "f'{x!r:>{w}} {{y}} {x=}' f\"{x['a']}\" F''",
        "f'''{\nx\n}'''",
        "f'{x:%Y-%m}' rf'\\d{x}'",
        "u'é€𝐢' # é€𝐢\nक्षि = ª = 1",
    ),
    *(
        "x = 1 + \\\n  2",
        "if x:\\\n  pass",
        "x = (\n1,\n  # c\n\n2)\n",
        "if x:\n\ty\n\tif z: w\nelif a:\n\tb\nelse:\n  c\n",
    ),
    *(
        "@a.b(c)\n@d\nclass A(B, metaclass=C):\n  '''doc'''\n\n  x: int\n  y: str = ''\n",
        "try:\n  pass\nexcept* E as e:\n  raise X from e",
    ),
    *(
        "async def f():\n  async with a as b, c: await d\n  async for x in y: yield x\n  return\n",
        "def g():\n  x = yield from y\n  return (yield)\n",
    ),
    "match x:\n  case {'a': 1 + 2j, **r}: pass\n  case [_, *z] | [_, _, *z] if z: pass\n  case A.b(c=-1.5) as d: pass\n"
    "match = case = type = _ = 1\nmatch[case]\n",
    *(
        "def f():\n  def g():\n    nonlocal x\n  x = 1\n",
        "lambda *a, b=1: (yield)",
        "with (a as b, c as d,): pass",
        "*a, = b; print(*a, **b)",
    ),
    *(
        "x = 1\r\ny = 2\rz = 3\n\x0c\nif x:\r\n  y\r\n",
        "global x; x: int; del x, y[1:2, ::3]",
        "assert x, y; import a.b as c, d",
    ),
    *(
        "while True:\n  if x: continue\n  break\nelse: pass\n",
        "{**a, 'b': [c for d in e if f for g in h]}",
    ),
]


@pytest.mark.parametrize("source", SOURCES)
def test_every_byte_of_tricky_sources_is_allowed(source: str) -> None:
    assert PYTHON.complete(source.encode()) == 0
    assert refused(source) == []
    check_contract(PYTHON, [source.encode()])


@pytest.mark.skipif(sys.version_info < (3, 12), reason="syntax of Python 3.12")
@pytest.mark.parametrize(
    "source",
    [
        *("type X[T: int, *U, **V] = T", "def f[T](x: T) -> T: ...", "f'{f'{f\"{1}\"}'}'", 'f"""{x["""a"""]}"""'),
        "f'{x['a']!r:{\"w\"}} {\n'b' # c\n}' f'\\N{EM DASH}'",
        *("f'{x:{y:{z}}}'", "f'''{x:\n}'''", "f'{{}}{x}}}'", "rf'\\{x}'", "f'{x['\\'']}'", "f'{(lambda x:1)}'"),
    ],
)
def test_every_byte_of_newer_sources_is_allowed(source: str) -> None:
    assert PYTHON.complete(source.encode()) == 0
    assert refused(source) == []


@pytest.mark.parametrize(
    "text",
    [
        *("5 i", "x = 5 if y", "x !", "x = .", "x = ..", "1e", "1e+", "0x", "1_", "x.i", "x.in", "def f() -", "(x :"),
        *("'a", "x = 'abc\\", "'''a'", "f'{x", "f'{x!", "f'{x:", "rb'a", "x = r", "x = \\", "if x:\n   \\", "# a"),
        *(
            "if x:\n   ",
            "class A:\n  def f():\n    pass\n ",
            "@a\n",
            "match x:\n  c",
            "try:\n  pass\n",
            "f(a=1, b",
            "*a",
        ),
        *("def f():\n  def g():\n    nonlocal x\n", "x\n  ", "x\n  #", "f(", "[", "", "x if 1els", "case", "x = 1\r"),
    ],
)
def test_what_can_go_on_is_allowed(text: str) -> None:
    assert PYTHON.prefix(text.encode()) == 0


@pytest.mark.parametrize(
    "text",
    [
        *(")", "def 5", "x = = 2", "a b", "5 x", "x ? ", "$", "pass pass", "print 5", "elif x", "class 3", "import 5"),
        *("5abc", "0b2", "0xg", "1__0", "x.5", "x == = 3", "1 + + * 2", "lambda 5:", "('a' 'b' 5", "if x\n", "f(:"),
        *("5 'a", "5 f'a", "5 b'''a\n", "'a\n", "f'a\n", "x\n  y", "  x", "class A:\n  def f():\n    pass\n   x"),
        *(
            "5 = x",
            "f() = 3",
            "x + 1 = 2\n",
            "{1: 2, 3}",
            "f(**a, *b)",
            "f(x for x in y, 5)",
            "x = 5 if y # a",
            "x = 5 if y\n",
        ),
        *(
            "return 5\n",
            "return 5\r",
            "break\n",
            "await x\n",
            "def f(x, x):\n  pass\n",
            "nonlocal x\n",
            "x = 1\nglobal x\n",
            "yield\n",
        ),
        *("from __future__ import braces\n", "x\nfrom __future__ import annotations\n", "x\0", "\ufeffx", "x = \xa0"),
    ],
)
def test_definite_errors_are_refused(text: str) -> None:
    assert PYTHON.prefix(text.encode()) != 0
    assert PYTHON.complete(text.encode()) != 0


def test_a_character_on_its_way_stands_for_any_letter() -> None:
    for text in ("x", "x = '", "# ", "x = b", "f'{"):
        for character in ("é", "€", "𝐢"):
            for cut in range(1, len(character.encode())):
                assert PYTHON.prefix(text.encode() + character.encode()[:cut]) == 0
                assert PYTHON.complete(text.encode() + character.encode()[:cut]) != 0
    for data in (b"5 \xc3", b"x = 1\xe2", b"x = '\xff", b"'\xc3(", b"# \xed\xa0"):
        assert PYTHON.prefix(data) != 0


def test_deep_nests_neither_crash_nor_contradict() -> None:
    deep = [b"(" * 150, b"(" * 5000, b"-" * 20000 + b"1", b"+".join([b"a"] * 20000), b"a" + b".a" * 20000, b"9" * 5000]
    for source in deep:
        if PYTHON.complete(source) == 0:
            assert PYTHON.prefix(source) == 0
    assert PYTHON.prefix(deep[0]) == 0
    assert PYTHON.prefix(deep[1]) != 0


def test_nothing_is_run_and_nothing_is_said(recwarn: pytest.WarningsRecorder, capsys: pytest.CaptureFixture) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert PYTHON.complete(b"print('run'); raise SystemExit; '\\d' is 1; assert (1, 2)\n") == 0
        assert PYTHON.prefix(b"print('run')\n'\\d' is 1if x else 2") == 0
    assert capsys.readouterr().out == ""
    assert not recwarn.list


def test_states_are_values() -> None:
    start = PYTHON.start()
    state = start.advance(b"x = ")
    assert state == start.advance(b"x ").advance(b"= ")
    assert not state.accepting()
    assert state.advance(b"1").accepting()
    assert not state.advance(b"1").allows(b" 2")
    assert state.allows(b"[")
