"""Fixtures that every test may use. Tests run with one torch thread, so that two workers share two cores."""

from __future__ import annotations

import pytest
import torch

import tokenmill.models as models

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def gemma() -> tuple[torch.nn.Module, object]:
    """Gemma 3 270M, ``(model, tokenizer)``: float32, sdpa. Tests leave it as they found it."""
    return models.load("gemma-3-270m", dtype="float32", attn="sdpa")
