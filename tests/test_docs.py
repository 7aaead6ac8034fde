"""The docs have a page for every method and family, and every numbered property has a test or a reason."""

from __future__ import annotations

import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from tests import _properties
from tokenmill import catalog

DOCS = _properties.ROOT / "docs"
OWN = [slug for slug, entry in catalog.entries().items() if entry.origin == "tokenmill"]


def _front_matter(page: Path) -> dict[str, Any]:
    text = page.read_text(encoding="utf-8")
    assert text.startswith("---\n"), f"{page.name} has no front matter"
    return yaml.safe_load(text.split("---\n")[1])


@pytest.mark.parametrize("slug", OWN)
def test_every_property_of_a_method_has_a_test_or_a_reason(slug: str) -> None:
    page = DOCS / "methods" / f"{slug}.md"
    meta = _front_matter(page)
    count, reasons = meta["properties"], meta.get("not_tested") or {}
    numbers = {one.number for one in _properties.covered() if one.slug == slug}
    assert count >= 1
    assert numbers | set(reasons) == set(range(1, count + 1))
    assert not numbers & set(reasons), "a property has both a test and a reason not to have one"
    assert all(isinstance(reason, str) and len(reason) > 20 for reason in reasons.values())
    assert _properties.PLACE in page.read_text(encoding="utf-8")


def test_markers_name_methods_of_the_catalog() -> None:
    assert {one.slug for one in _properties.covered()} <= set(OWN)


def test_pages_are_those_of_the_catalog() -> None:
    assert sorted(page.stem for page in (DOCS / "methods").glob("*.md")) == sorted(OWN)
    families = {catalog.entry(slug).family for slug in OWN}
    assert {page.stem for page in (DOCS / "families").glob("*.md")} == families


def test_a_familys_page_lists_its_methods() -> None:
    for page in (DOCS / "families").glob("*.md"):
        text = page.read_text(encoding="utf-8")
        assert _properties.METHODS in text
        shown = SimpleNamespace(file=SimpleNamespace(src_uri=f"families/{page.name}"), meta={})
        made = _properties.on_page_markdown(text, page=shown)
        assert all(f"[{card.name}](../methods/{card.slug}.md)" in made for card in catalog.cards(page.stem))


def test_markers_are_found_and_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "tests" / "decode"
    folder.mkdir(parents=True)
    (folder / "test_toy.py").write_text(
        textwrap.dedent('''
        import pytest

        @pytest.mark.prop("toy", 2)
        @pytest.mark.prop("toy", 1)
        def test_it_holds_in_a_way():
            pass

        @pytest.mark.parametrize("n", [pytest.param(1, marks=pytest.mark.prop("toy", 4))])
        def test_other(n):
            """The sum
            is right."""

        @pytest.mark.slow("toy", 3)
        def test_third(): ...
        ''')
    )
    found = _properties.covered(tmp_path / "tests")
    assert [(one.number, one.says) for one in found] == [
        (1, "It holds in a way"),
        (2, "It holds in a way"),
        (4, "The sum is right."),
    ]
    monkeypatch.setattr(_properties, "covered", lambda: found)
    page = SimpleNamespace(
        file=SimpleNamespace(src_uri="methods/toy.md"), meta={"properties": 4, "not_tested": {3: "it needs a GPU"}}
    )
    made = _properties.on_page_markdown(f"# Toy\n\n{_properties.PLACE}\n", page=page)
    assert "| 1 | It holds in a way (`tests/decode/test_toy.py`) |" in made
    assert "| 3 | not tested: it needs a GPU |" in made
    assert _properties.on_page_markdown("# Toy", page=page) == "# Toy"
