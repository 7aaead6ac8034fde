"""Hidden states of a forward, without asking the model to return all layers."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from tokenmill.hf.layout import decoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def last_hidden(model: PreTrainedModel) -> Generator[list[Tensor], None, None]:
    """Collect what each forward inside the ``with`` hands to the output layer: (B, T, D), one for each call."""
    captured: list[Tensor] = []

    def keep(_module: nn.Module, _args: Any, out: Any) -> None:
        captured.append(out[0])

    handle = decoder(model).register_forward_hook(keep)
    try:
        yield captured
    finally:
        handle.remove()
