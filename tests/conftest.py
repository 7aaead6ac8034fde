"""Fixtures that every test may use. Tests reach no network and run with one torch thread: two workers, two cores."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported, so set before

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tokenmill import models

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def gemma() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Gemma 3 270M, ``(model, tokenizer)``: float32, sdpa. Tests leave it as they found it."""
    return models.load("gemma-3-270m", dtype="float32", attn="sdpa")
