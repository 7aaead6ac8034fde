"""Names and facts of the models that come with tokenmill. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenmill.errors import unknown_name
from tokenmill.models import _gemma

ASSETS = Path(__file__).parents[1] / "assets"


def names() -> list[str]:
    """Names of the embedded models: those made from a Python package, and the small ones that ship as assets."""
    return sorted([_gemma.NAME, *assets()])


def assets() -> list[str]:
    """Names of the language models in the package's folder of assets."""
    return sorted(config.parent.name for config in ASSETS.glob("*/config.json"))


def info(name: str) -> dict[str, Any]:
    """Facts about an embedded model as plain data: kind, parameters, licence, size, what is cached, what it reached.

    Raises:
        LimitError: the name is none of `names`.
    """
    if name == _gemma.NAME:
        return _gemma.describe()
    if name not in assets():
        raise unknown_name("models.info", "name", name, names())
    folder = ASSETS / name
    card: dict[str, Any] = json.loads((folder / "card.json").read_text())
    size = sum(path.stat().st_size for path in folder.iterdir())
    weights = card.pop("weights")
    return {**card, "kind": "asset", "parameters": weights, "weights": "bfloat16", "size_mb": round(size / 1e6, 2)}


def key_kind(name: str) -> str:
    """What keys and values a model can read: "name" where its card says that it reads nothing else, else "any"."""
    card = (ASSETS / name if name in assets() else Path(name)) / "card.json"
    known: dict[str, Any] = json.loads(card.read_text()) if card.is_file() else {}
    return known.get("key_kind", "any")
