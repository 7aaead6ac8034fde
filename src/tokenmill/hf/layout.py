"""Where things are in a model: its text decoder, its attention modules, the type of every layer."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from tokenmill.errors import UnsupportedError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """The sizes of a decoder's attention.

    Attributes:
        layers: number of decoder layers.
        heads: query heads.
        kv_heads: key and value heads; query head ``h`` reads head ``h // (heads // kv_heads)``.
        head_dim: width of one head.
        layer_types: one name a layer, as transformers spells them.
        window: width of the sliding layers, ``None`` when there are none.
    """

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    layer_types: tuple[str, ...]
    window: int | None


def decoder(model: PreTrainedModel) -> Any:
    """The text decoder (embeddings, layers, norm) inside any wrapper: a causal LM, Llava, Qwen2.5-VL, Gemma 3.

    Raises:
        UnsupportedError: an encoder-decoder model, or one whose decoder has no list of layers.
    """
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedError("decoder", f"{name} is an encoder-decoder model", "Use a decoder-only model.")
    found: Any = model
    # A wrapper's decoder may itself be a causal LM, so look until nothing changes.
    while (inner := found.get_decoder()) is not None and inner is not found:
        found = inner
    if not isinstance(getattr(found, "layers", None), nn.ModuleList):
        raise UnsupportedError("decoder", f"{name} has no text decoder with a list of layers")
    return found


def text_config(model: PreTrainedModel) -> Any:
    """The configuration object of the text decoder, the one its layers read."""
    return decoder(model).config


def attention_layers(model: PreTrainedModel) -> list[Any]:
    """The decoder's attention modules, ascending by ``layer_idx``.

    A module counts when its forward looks its function up in transformers' AttentionInterface; layers of other kinds
    (linear attention) are left out, so read ``layer_idx`` and do not count.

    Raises:
        UnsupportedError: no module uses the interface, or two share a ``layer_idx`` (cross-attention).
    """
    found: dict[int, Any] = {}
    for module in decoder(model).layers.modules():
        index = getattr(module, "layer_idx", None)
        if not isinstance(index, int) or not uses_interface(module):
            continue
        if index in found:
            raise UnsupportedError(
                "attention_layers", f"{type(model).__name__} has two attention modules in layer {index}"
            )
        found[index] = module
    if not found:
        raise UnsupportedError(
            "attention_layers",
            f"{type(model).__name__} does not use the AttentionInterface of transformers",
            "Use a model class that ships with transformers.",
        )
    return [found[index] for index in sorted(found)]


def uses_interface(module: nn.Module) -> bool:
    """True when the module's forward dispatches through AttentionInterface."""
    code = getattr(_forward(module), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def eager_function(module: nn.Module) -> Callable[..., Any] | None:
    """The eager attention function that the module's own file defines; the registry does not hold it."""
    return file_function(module, "eager_attention_forward")


def file_function(module: nn.Module, name: str) -> Callable[..., Any] | None:
    """A function that the file of a module's class defines, or ``None``."""
    return getattr(_forward(module), "__globals__", {}).get(name)


def _forward(module: nn.Module) -> Any:
    return inspect.unwrap(type(module).forward)


def layer_types(model: PreTrainedModel) -> tuple[str, ...]:
    """One name a layer: the configuration's own, else inferred as transformers' caches do."""
    config = text_config(model)
    named = getattr(config, "layer_types", None)
    if named is not None:
        return tuple(named)
    if getattr(config, "sliding_window", None) is not None:
        return (SLIDING,) * config.num_hidden_layers
    chunked = getattr(config, "attention_chunk_size", None) is not None
    return ("chunked_attention" if chunked else FULL,) * config.num_hidden_layers


def sliding_window(model: PreTrainedModel) -> int | None:
    """Width of the sliding layers' window, ``None`` for a model without such layers."""
    return text_config(model).sliding_window if SLIDING in layer_types(model) else None


def attention_shape(model: PreTrainedModel) -> AttentionShape:
    """Numbers of layers and heads, head width, layer types and window of the text decoder."""
    config = text_config(model)
    heads = config.num_attention_heads
    return AttentionShape(
        layers=config.num_hidden_layers,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        layer_types=layer_types(model),
        window=sliding_window(model),
    )
