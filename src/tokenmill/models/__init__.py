"""Models: the embedded ones, any transformers id or local folder, tiny random ones; packing and cost profile.

Importing this package imports no torch; the first use of a function that computes does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenmill.models._catalog import info, names
    from tokenmill.models._encoder import encoder
    from tokenmill.models._load import load
    from tokenmill.models._packed import PackedLinear, is_packed, pack, packed, unpack
    from tokenmill.models._profile import CostProfile, profile
    from tokenmill.models._tiny import tiny
    from tokenmill.models._tokenizer import tokenizer

_MODULES = {
    "CostProfile": "_profile",
    "PackedLinear": "_packed",
    "encoder": "_encoder",
    "info": "_catalog",
    "is_packed": "_packed",
    "load": "_load",
    "names": "_catalog",
    "pack": "_packed",
    "packed": "_packed",
    "profile": "_profile",
    "tiny": "_tiny",
    "tokenizer": "_tokenizer",
    "unpack": "_packed",
}

__all__ = [
    "CostProfile",
    "PackedLinear",
    "encoder",
    "info",
    "is_packed",
    "load",
    "names",
    "pack",
    "packed",
    "profile",
    "tiny",
    "tokenizer",
    "unpack",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
