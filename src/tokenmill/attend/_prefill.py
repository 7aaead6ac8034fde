"""Feed a prompt in chunks, so that neither masks nor scores of a long one have to fit at once."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokenmill.errors import LimitError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def prefill(model: PreTrainedModel, inputs: Mapping[str, Any], *, chunk: int = 512, **kwargs: Any) -> Any:
    """Run a prompt through a model in chunks that are counted from its end: only the first one is shorter.

    Args:
        model: a causal language model.
        inputs: ``input_ids`` (B, T), and an ``attention_mask`` (B, T) when rows are left-padded.
        chunk: tokens of one forward.
        kwargs: further arguments of each forward, for instance a ``past_key_values`` that is empty.

    Returns:
        The output of the last forward; its ``past_key_values`` hold the whole prompt.

    Raises:
        LimitError: a chunk below 1, an empty prompt, or a cache that holds something.
    """
    ids: Tensor = inputs["input_ids"]
    if isinstance(chunk, bool) or chunk < 1:
        raise LimitError("prefill", "chunk", chunk, "at least 1")
    length = ids.shape[1]
    if not length:
        raise LimitError("prefill", "input_ids.shape", tuple(ids.shape), "(B, T) with T at least 1")
    cache = kwargs.pop("past_key_values", None)
    if cache is not None and cache.get_seq_length():
        raise LimitError("prefill", "past_key_values", f"{cache.get_seq_length()} tokens", "empty")
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    positions = (mask.long().cumsum(1) - 1).clamp_min(0)
    first = length % chunk or chunk
    bounds = [0, *range(min(first, length), length + 1, chunk)]
    out: Any = None
    for start, stop in pairwise(bounds):
        out = model(
            input_ids=ids[:, start:stop],
            attention_mask=mask[:, :stop],
            position_ids=positions[:, start:stop],
            past_key_values=cache,
            use_cache=True,
            **kwargs,
        )
        cache = out.past_key_values
    return out
