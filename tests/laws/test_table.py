"""The law table: every method of the catalog under every law of its kind. Built from the folders."""

from __future__ import annotations

import pytest

from tokenmill import catalog, laws

TABLE = [(slug, law) for slug in catalog.paths() for law in laws.laws_for(catalog.card(slug).kind)]


@pytest.mark.parametrize(("slug", "law"), TABLE, ids=[f"{slug}-{law.name.replace(' ', '_')}" for slug, law in TABLE])
def test_law(slug: str, law: laws.Law) -> None:
    result = laws.judge(slug, law)
    assert result.status != "broken", result.message
    if result.status == "does not apply":
        pytest.skip(result.message)
