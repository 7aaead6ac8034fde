"""Load a causal language model by name: an embedded one, an asset, a local folder or any transformers id."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from tokenmill.errors import LimitError, UnsupportedError, unknown_name
from tokenmill.models import _gemma
from tokenmill.models._catalog import ASSETS, assets, names

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from tokenmill.models._causal import CausalModel

DTYPES = ("float32", "bfloat16", "float16", "float64")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def load(
    name: str,
    *,
    dtype: str | torch.dtype = "float32",
    attn: str = "sdpa",
    packed: bool = False,
    device: str | torch.device = "cpu",
) -> tuple[CausalModel, PreTrainedTokenizerBase]:
    """Load a causal language model in eval mode, and its tokenizer; a vision-language model comes with a processor.

    ``"gemma-3-270m"`` is converted from a Python package on first use (half a minute, with a progress bar) and then
    comes from the user's cache, whose files are checked by checksum each time.

    Args:
        name: one of `models.names()`, a local folder, or an id that transformers knows.
        dtype: ``"float32"``, ``"bfloat16"``, ``"float16"``, ``"float64"`` or a torch dtype.
        attn: name of an attention implementation (``"sdpa"``, ``"eager"``, or one that is registered).
        packed: replace the linear layers by prepacked ones (see `models.pack`; CPU only).
        device: where the model goes.

    Raises:
        LimitError: unknown name, dtype or attention.
        MissingExtraError: the package with Gemma's weights is needed and not installed.
        UnsupportedError: transformers cannot load what is there.
    """
    kind = _dtype_name(dtype)
    _check_name(name)
    if packed and str(device) != "cpu":
        raise UnsupportedError("models.load", f"packed layers run on the CPU, not on {device}", "Use packed=False.")
    if name == _gemma.NAME:
        place = _gemma.prepare(kind if kind in _gemma.STORED_DTYPES else "float32")
        model, tokenizer = _model(str(place), kind, attn), _gemma.tokenizer(place)
    else:
        model, tokenizer = _from_transformers(name, str(ASSETS / name) if name in assets() else name, kind, attn)
    model.eval()
    model.to(device=device)  # pyright: ignore[reportArgumentType, reportCallIssue]
    if packed:
        from tokenmill.models._packed import pack

        pack(model)
    return model, tokenizer


def _dtype_name(dtype: str | torch.dtype) -> str:
    kind = str(dtype).removeprefix("torch.")
    if kind not in DTYPES:
        raise unknown_name("models.load", "dtype", kind, DTYPES)
    return kind


def _check_name(name: str) -> None:
    """Refuse at once what can be neither an embedded model, a folder nor an id, or is one of ours misspelt."""
    known = names()
    if name in known or Path(name).is_dir():
        return
    misspelt = "/" not in name and difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if misspelt or not _HUB_ID.fullmatch(name):
        raise unknown_name("models.load", "name", name, known)


def _model(place: str, dtype: str, attn: str) -> CausalModel:
    import torch
    from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    from tokenmill.models._vision import is_vision

    known = {"eager", *AttentionInterface().valid_keys()}
    if attn not in known and "/" not in attn:  # with a slash it is a kernel of the hub
        raise unknown_name("models.load", "attn", attn, known)
    auto = AutoModelForImageTextToText if is_vision(AutoConfig.from_pretrained(place)) else AutoModelForCausalLM
    model = auto.from_pretrained(place, dtype=getattr(torch, dtype), attn_implementation=attn)
    return cast("CausalModel", model)


def _from_transformers(name: str, place: str, dtype: str, attn: str) -> tuple[Any, Any]:
    from transformers import AutoTokenizer

    from tokenmill.models._vision import is_vision, processor

    try:
        model = _model(place, dtype, attn)
        if is_vision(model.config):
            return model, processor(place, model.config)
        return model, AutoTokenizer.from_pretrained(place)
    except LimitError:
        raise
    except OSError as error:  # what transformers raises for an id or folder without the files of a model
        if not Path(place).is_dir() and "/" not in name:
            raise unknown_name("models.load", "name", name, names()) from error
        reason = str(error).split("\n")[0].rstrip(".")
        raise UnsupportedError("models.load", f"cannot load {name!r}: {reason}") from error
    except ValueError as error:  # a model that is not a causal language model, or a tokenizer that is missing
        reason = str(error).split("\n")[0].rstrip(".")
        raise UnsupportedError("models.load", f"cannot load {name!r}: {reason}") from error
