"""Fixtures that every test may use. Tests reach no network and run with one torch thread: two workers, two cores."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported, so set before

import pytest
import torch
from hypothesis import settings
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tokenmill import models

torch.set_num_threads(1)
settings.register_profile("repeatable", derandomize=True, deadline=None, database=None, max_examples=40)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def gemma() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Gemma 3 270M, ``(model, tokenizer)``: float32, sdpa. Tests leave it as they found it."""
    return models.load("gemma-3-270m", dtype="float32", attn="sdpa")


@pytest.fixture(scope="session")
def load_recipe() -> Callable[[str], ModuleType]:
    """Import a file of recipes/ by its name without the ending."""

    def load(name: str) -> ModuleType:
        path = Path(__file__).parents[1] / "recipes" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(f"recipes_{name}", path)
        if spec is None or spec.loader is None:
            raise FileNotFoundError(path)
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look it up there
        spec.loader.exec_module(module)
        return module

    return load
