"""The tiny models that tests of decoders share."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from tokenmill.models import tiny

Zoo = Callable[[str, str], Any]


@pytest.fixture(scope="session")
def zoo() -> Zoo:
    """``zoo(kind, attention)``: a tiny model that is built once. Tests leave it as they found it."""

    @cache
    def build(kind: str, attention: str) -> Any:
        return tiny(kind, seed=3, attn=attention)

    return build
