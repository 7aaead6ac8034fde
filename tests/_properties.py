"""Which test covers which numbered property of which method; also the hook that writes lists into the docs.

A test says it with ``@pytest.mark.prop("<slug>", <number>)``. The front matter of ``docs/methods/<slug>.md`` says how
many properties there are (``properties: 11``) and, for those without a test, why (``not_tested: {4: "..."}``).
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenmill import catalog

ROOT = Path(__file__).parents[1]
PLACE = "<!-- properties -->"
METHODS = "<!-- methods -->"


@dataclass(frozen=True, slots=True)
class Covered:
    """A test that carries a marker: the property, what the test says, and where it stands."""

    slug: str
    number: int
    says: str
    file: str


def covered(tests: Path = ROOT / "tests") -> list[Covered]:
    """All markers of the test files, by slug and number."""
    found = [one for file in sorted(tests.rglob("test_*.py")) for one in _of_file(file, tests)]
    return sorted(found, key=lambda one: (one.slug, one.number, one.file, one.says))


def _of_file(file: Path, tests: Path) -> Iterator[Covered]:
    name = (Path(tests.name) / file.relative_to(tests)).as_posix()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            text = (ast.get_docstring(node) or node.name.removeprefix("test_").replace("_", " ")).split("\n\n")[0]
            says = " ".join(text.split())
            for mark in (inner for decorator in node.decorator_list for inner in ast.walk(decorator)):
                if isinstance(mark, ast.Call) and isinstance(mark.func, ast.Attribute) and mark.func.attr == "prop":
                    slug, number = (ast.literal_eval(argument) for argument in mark.args)
                    yield Covered(slug, number, says[:1].upper() + says[1:], name)


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Hook of mkdocs: a method's properties and a family's methods, in the places that their pages mark."""
    name = Path(page.file.src_uri).stem
    if PLACE in markdown:
        meta = page.meta
        markdown = markdown.replace(PLACE, listing(name, meta.get("properties", 0), meta.get("not_tested") or {}))
    return markdown.replace(METHODS, methods(name)) if METHODS in markdown else markdown


def methods(family: str) -> str:
    """The methods of a family as Markdown, from their cards."""
    rows = [
        f"| [{card.name}](../methods/{card.slug}.md) | {card.summary} | {', '.join(sorted(card.needs)) or 'nothing'} |"
        for card in catalog.cards(family)
        if catalog.entry(card.slug).origin == "tokenmill"
    ]
    return "\n".join(["| method | what it does | needs |", "|---|---|---|", *rows])


def listing(slug: str, count: int, not_tested: dict[int, str]) -> str:
    """The properties of a method as Markdown: for each number its tests, or the reason that there are none."""
    by_number: dict[int, list[Covered]] = {}
    for one in covered():
        if one.slug == slug:
            by_number.setdefault(one.number, []).append(one)
    rows = []
    for number in range(1, count + 1):
        tests = "<br>".join(f"{one.says.rstrip('.')} (`{one.file}`)" for one in by_number.get(number, []))
        rows.append(f"| {number} | {tests or 'not tested: ' + not_tested.get(number, '')} |")
    return "\n".join(["| property | covered by |", "|---|---|", *rows])
