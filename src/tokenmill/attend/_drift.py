"""How much each decoder layer changes what goes through it, and which layers change it least."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tokenmill.errors import LimitError
from tokenmill.hf.layout import decoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def layer_drift(before: Tensor, after: Tensor, real: Tensor | None = None) -> Tensor:
    """How much a layer moved its hidden states, relative to their length.

    Args:
        before: (B, T, D), what went in.
        after: (B, T, D), what came out.
        real: (B, T) bool, false at padding.

    Returns:
        A float32 scalar, the mean over the real tokens; it does not change when both are scaled.
    """
    before, after = before.float(), after.float()
    moved = (after - before).norm(dim=-1) / (before.norm(dim=-1) + 1e-8)
    return moved.mean() if real is None else moved[real].mean()


def profile_drift(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """The drift of every decoder layer on a text; do it once for a model, on a long one.

    Args:
        model: a decoder-only model.
        input_ids: (B, T).
        attention_mask: (B, T), zero at padding.

    Returns:
        (layers,) float32, see `layer_drift`.

    Raises:
        LimitError: an empty text.
    """
    if not input_ids.numel():
        raise LimitError("profile_drift", "input_ids.shape", tuple(input_ids.shape), "(B, T) with tokens in it")
    real = None if attention_mask is None else attention_mask.bool()
    found: list[Tensor] = []

    def watch(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        before = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        found.append(layer_drift(before, output[0] if isinstance(output, tuple) else output, real))

    with ExitStack() as undo, torch.no_grad():
        for layer in decoder(model).layers:
            undo.callback(layer.register_forward_hook(watch, with_kwargs=True).remove)
        model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    return torch.stack(found)


def choose_layers(drift: Tensor, delta: float = 0.5, *, among: Iterable[int] | None = None) -> tuple[int, ...]:
    """The layers of least drift: those of which at most a share ``delta`` of the layers has no more.

    Args:
        drift: (layers,), see `profile_drift`.
        delta: share of the layers, in [0, 1].
        among: layers to choose from, for instance those with full attention; ``None`` means all.

    Returns:
        Ascending indices; floor(delta * number) of them when no two drifts are equal.

    Raises:
        LimitError: delta outside its limits, layers that ``drift`` does not have.
    """
    if isinstance(delta, bool) or not 0.0 <= delta <= 1.0:
        raise LimitError("choose_layers", "delta", delta, "in [0, 1]")
    known = list(range(len(drift))) if among is None else sorted(set(among))
    if any(not 0 <= index < len(drift) for index in known):
        raise LimitError("choose_layers", "among", known, f"among the {len(drift)} layers")
    values = drift[known]
    rank = (values[None, :] <= values[:, None]).sum(-1)  # how many have no more
    return tuple(index for index, of in zip(known, rank.tolist(), strict=True) if of <= delta * len(known))
