"""Floating point operations of a prefill by formula."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from tokenmill.errors import LimitError, unknown_name
from tokenmill.hf.layout import attention_shape, text_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONVENTIONS = ("exact", "paper")


def prefill_flops(
    model: PreTrainedModel, lengths: int | Sequence[int], *, convention: Literal["exact", "paper"] = "exact"
) -> float:
    """Operations of the decoder's layers over a prompt (no output layer, no tower).

    ``"exact"`` counts a multiplication and an addition as two, three matrices of the MLP, grouped keys and values, and
    attention without the causal saving: per layer ``2 n d (2 h + 2 g) + 4 n^2 h + 6 n d m`` with h and g the widths of
    all query and all key heads. ``"paper"`` is DivPrune's ``4 n d^2 + 2 n^2 d + 2 n d m``, good as a ratio only.

    Args:
        model: whose decoder.
        lengths: tokens n, one number for all layers or one for each.
        convention: which formula.

    Raises:
        LimitError: another number of lengths than of layers, or a negative one.
    """
    if convention not in CONVENTIONS:
        raise unknown_name("prefill_flops", "convention", convention, CONVENTIONS)
    shape, config = attention_shape(model), text_config(model)
    each = [lengths] * shape.layers if isinstance(lengths, int) else list(lengths)
    if len(each) != shape.layers:
        raise LimitError("prefill_flops", "lengths", len(each), f"one number, or one for each of {shape.layers} layers")
    if min(each) < 0:
        raise LimitError("prefill_flops", "lengths", min(each), "at least 0")
    d, m = config.hidden_size, config.intermediate_size
    h, g = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    if convention == "paper":
        return float(sum(4 * n * d * d + 2 * n * n * d + 2 * n * d * m for n in each))
    return float(sum(2 * n * d * (2 * h + 2 * g) + 4 * n * n * h + 6 * n * d * m for n in each))
