"""Models: the embedded ones, any transformers id or local folder, tiny random ones; packing and cost profile.

Importing this package imports no torch; the first use of a function does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenmill.models._tiny import tiny

_EXPORTS = {
    "tiny": "_tiny",
}

__all__ = ["tiny"]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
