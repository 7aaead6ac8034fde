"""Corpora by name: three that Python itself carries, its library's source, its manual and an index of its API.

Two more are in many languages, which Python is not: short lines of our own, and the machine's manual pages.
"""

from __future__ import annotations

import ast
import json
import platform
import sysconfig
import tokenize
from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from tokenmill.corpora import _manual, _multilingual
from tokenmill.corpora._corpus import MIN_CHARS, Corpus, Record, by_id, sections
from tokenmill.errors import UnsupportedError, unknown_name

LICENCE = "PSF-2.0"
# Tests, installed packages, and generated tables (the manual as a dict of strings, character maps).
_SKIPPED = frozenset(
    {
        "__pycache__",
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idle_test",
        "__phello__",
        "pydoc_data",
        "encodings",
    }
)
_MAX_INDEXED_CHARS = 60_000  # parsing the few giant modules would cost more than they add


def names() -> list[str]:
    """Names that `load` knows."""
    return sorted(_BUILDERS)


@cache
def load(name: str) -> Corpus:
    """Load a corpus: ``"python-stdlib"``, ``"python-reference"``, ``"stdlib-json"``, ``"multilingual-lines"`` or
    ``"manual-pages"``.

    The multilingual lines ship with this package. The manual pages are the machine's, and the others are read from the
    running Python, so their text follows its version; ``Corpus.sha256`` says which text it was. The result is kept for
    the life of the process.

    Raises:
        LimitError: unknown name.
        UnsupportedError: this Python carries no sources of its library, or this machine no manual pages.
    """
    if name not in _BUILDERS:
        raise unknown_name("corpora.load", "name", name, _BUILDERS)
    records = by_id(_BUILDERS[name]())
    if not records and name == "manual-pages":
        what = f"no translated manual pages under {_manual.ROOT}"
        raise UnsupportedError("corpora.load", what, "Install some (on Debian: apt install manpages-de manpages-fr).")
    if not records:
        mend = "Use a Python that ships its library as files."
        raise UnsupportedError("corpora.load", f"no text for {name!r} in this Python", mend)
    if name == "multilingual-lines":
        return Corpus(name, records, licence=_multilingual.LICENCE, source=_multilingual.SOURCE)
    if name == "manual-pages":
        return Corpus(name, records, licence=_manual.LICENCE, source=_manual.SOURCE.format(root=_manual.ROOT))
    source = f"{platform.python_implementation()} {platform.python_version()}, {_SOURCES[name]}"
    return Corpus(name, records, licence=LICENCE, source=source)


def _files() -> Iterator[tuple[str, Path]]:
    """Every source file of the standard library without its tests: (path relative to the library, path)."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).parts
        if not _SKIPPED.intersection(parts) and not parts[0].startswith("config-"):
            yield "/".join(parts), path


def _read(path: Path) -> str | None:
    """Text of a source file in the encoding that it declares; ``None`` for one that declares a wrong one."""
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (SyntaxError, UnicodeDecodeError):
        return None


def _sources() -> Iterator[Record]:
    for name, path in _files():
        text = _read(path)
        if text is not None and len(text) >= MIN_CHARS:
            yield Record(name, text, "code")


def _reference() -> Iterator[Record]:
    topics: dict[str, str] = import_module("pydoc_data.topics").topics
    for name, text in topics.items():
        for number, section in enumerate(sections(text), start=1):
            yield Record(f"{name}#{number:02d}", section, "prose")


def _api_index() -> Iterator[Record]:
    for name, path in _files():
        public = not any(part.startswith("_") for part in name.removesuffix("/__init__.py").split("/"))
        text = _read(path) if public else None
        if text is None or len(text) > _MAX_INDEXED_CHARS:
            continue
        module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        members = _members(ast.parse(text))
        document = json.dumps({"module": module, "file": name, "members": members}, indent=2, ensure_ascii=False)
        if members and len(document) >= MIN_CHARS:
            yield Record(f"{module}.json", document + "\n", "json")


def _members(body: ast.Module | ast.ClassDef) -> list[dict[str, Any]]:
    """The public functions and classes of a module or a class, as plain data."""
    found: list[dict[str, Any]] = []
    for node in body.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            doc = ast.get_docstring(node)
            entry: dict[str, Any] = {"name": node.name, "line": node.lineno, "doc": doc.split("\n")[0] if doc else None}
            if isinstance(node, ast.ClassDef):
                found.append({"kind": "class", **entry, "bases": _texts(node.bases), "methods": _members(node)})
            else:
                found.append({"kind": "function", **entry, "arguments": _arguments(node.args)})
    return found


def _texts(nodes: list[ast.expr]) -> list[str]:
    return [ast.unparse(node) for node in nodes]


def _arguments(args: ast.arguments) -> list[dict[str, str | None]]:
    positional = [*args.posonlyargs, *args.args]
    defaults = [None] * (len(positional) - len(args.defaults)) + _texts(args.defaults)
    keyword = [None if default is None else ast.unparse(default) for default in args.kw_defaults]
    pairs = [*zip(positional, defaults, strict=True), *zip(args.kwonlyargs, keyword, strict=True)]
    return [{"name": arg.arg, "default": default} for arg, default in pairs]


_BUILDERS: dict[str, Callable[[], Iterator[Record]]] = {
    "python-stdlib": _sources,
    "python-reference": _reference,
    "stdlib-json": _api_index,
    "multilingual-lines": _multilingual.lines,
    "manual-pages": _manual.pages,
}
_SOURCES = {
    "python-stdlib": "source files of the standard library without its tests",
    "python-reference": "topics of the reference manual (pydoc_data.topics)",
    "stdlib-json": "an index of the standard library's public functions and classes, made from its sources",
}
