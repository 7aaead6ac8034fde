"""The part of a transplant that touches the model: matrices resized and written, ids pointed at the new tokens."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tokenmill.errors import LimitError, UnsupportedError
from tokenmill.text._row_mixture import RowMixture
from tokenmill.text._token_bytes import TokenBytes

_WHERE = "transplant"
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "cls_token_id", "decoder_start_token_id")


def check_model(model: Any, old: Any, new: Any) -> int:
    """Rows of the old embedding; refuses what a transplant cannot serve.

    Raises:
        LimitError: the old tokenizer gives ids that the embedding does not have.
        UnsupportedError: no embedding, quantised weights, an embedding for each layer, or no end token any more.
    """
    table = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    if not isinstance(table, nn.Embedding):
        raise UnsupportedError(_WHERE, f"{type(model).__name__} has no embedding that can be resized")
    if not table.weight.is_floating_point() or getattr(model, "hf_quantizer", None) is not None:
        raise UnsupportedError(_WHERE, f"the embedding is {table.weight.dtype}", "Load the model without quantisation.")
    if any("per_layer" in name and isinstance(m, nn.Embedding) for name, m in model.named_modules()):
        raise UnsupportedError(_WHERE, f"{type(model).__name__} has an embedding for each layer")
    rows = table.weight.shape[0]
    ours = TokenBytes.of(old)
    beyond = [i for i in range(rows, len(ours)) if ours.tokens[i] is not None]
    if beyond:
        raise LimitError(_WHERE, "len(old_tokenizer)", len(ours), f"at most the embedding's {rows} rows")
    generates = getattr(model, "can_generate", lambda: False)()
    if generates and getattr(old, "eos_token", None) and not getattr(new, "eos_token", None):
        mend = "Set new_tokenizer.eos_token; without one, generation would not stop."
        raise UnsupportedError(_WHERE, "the new tokenizer has no end token", mend)
    return rows


def checked_copy(of: Any) -> Any:
    """A deep copy: the caller's model and tokenizer stay as they are."""
    return copy.deepcopy(of)


@torch.no_grad()
def resize_and_write(
    model: Any,
    source: np.ndarray,
    new_text: np.ndarray,
    mixture: RowMixture | None,
    size: int,
    multiple: int,
    *,
    generator: torch.Generator | None,
) -> int:
    """Resize the model's matrices and write all rows.

    Args:
        model: changed in place.
        source: (V_new,) int64, the old id of a copied row, else -1.
        new_text: (U,) int64, ids of estimated rows.
        mixture: their old rows; None for the mean row, or draws when there is a generator.
        size: V_new.
        multiple: the matrices get a multiple of so many rows.
        generator: draws the rows of `new_text` instead.

    Returns:
        Rows of the new matrices.

    Raises:
        UnsupportedError: a row is not finite.
    """
    old_in = model.get_input_embeddings().weight.detach().clone()
    head = model.get_output_embeddings()
    tied = head is not None and head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    old_out = None if head is None or tied else head.weight.detach().clone()
    bias = getattr(head, "bias", None)
    old_bias = None if bias is None else bias.detach().clone()
    model.resize_token_embeddings(size, pad_to_multiple_of=multiple, mean_resizing=False)
    table = model.get_input_embeddings().weight
    total = table.shape[0]
    todo = [(table, old_in)]
    head = model.get_output_embeddings()
    if old_out is not None:
        todo.append((head.weight, old_out))
    if old_bias is not None:
        todo.append((head.bias, old_bias))
    for target, old in todo:
        target.copy_(_rows(old, source, new_text, mixture, total, generator))
    return total


def _rows(
    old: Tensor, source: np.ndarray, new_text: np.ndarray, mixture: RowMixture | None, total: int,
    generator: torch.Generator | None,
) -> Tensor:  # fmt: skip
    """(total, D) of the old matrix' dtype."""
    wide = old.float()
    mean = wide.mean(dim=0)
    new = mean.expand(total, *old.shape[1:]).to(old.dtype).clone()
    copied = torch.from_numpy(np.flatnonzero(source >= 0))
    new[copied.to(old.device)] = old[torch.from_numpy(source)[copied].to(old.device)]
    at = torch.from_numpy(new_text).to(old.device)
    if generator is not None:
        draws = torch.randn(len(new_text), *old.shape[1:], generator=generator)
        new[at] = (wide.mean() + wide.std() * draws.to(old.device)).to(old.dtype)
    elif mixture is not None:
        found = mixture.found.to(old.device)
        new[at[found]] = mixture.rows(old)[found].to(old.dtype)
    if not bool(new.isfinite().all()):
        row = int((~new.reshape(total, -1).isfinite()).any(dim=1).nonzero()[0])
        raise UnsupportedError(_WHERE, f"row {row} of the new matrix is not finite", "Look at the old rows it is of.")
    return new


def retarget_ids(model: Any, source: np.ndarray) -> None:
    """Point the ids of special tokens in the model's configurations at the new tokenizer's; others are taken out."""
    new_of: dict[int, int] = {}
    for i in np.flatnonzero(source >= 0)[::-1].tolist():
        new_of[int(source[i])] = i
    configs = [model.config, getattr(model, "generation_config", None)]
    if hasattr(model.config, "get_text_config"):
        configs.append(model.config.get_text_config())
    for config in {id(c): c for c in configs if c is not None}.values():
        for name in _IDS:
            value = getattr(config, name, None)
            if isinstance(value, list | tuple):
                setattr(config, name, [new_of[i] for i in value if i in new_of] or None)
            elif value is not None:
                setattr(config, name, new_of.get(value))


def suppress(model: Any, size: int, total: int) -> None:
    """Rows without a token are never generated."""
    config = getattr(model, "generation_config", None)
    if config is not None:
        config.suppress_tokens = list(range(size, total)) or None
