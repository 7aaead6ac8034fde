"""Rotary positions of one attention layer: the model's own phases and rotation, and the way back.

Keys in a cache are rotated by the position they were written at. A method that moves them to other positions turns
them back first; here both directions go through the rotation of the model's own file, so that any pairing of channels
and any number of rotated channels is the right one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokenmill.errors import UnsupportedError

from .layout import attention_layers, decoder, file_function, layer_types

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Phases = tuple[Tensor, Tensor]
# Their frequencies depend on the length of the text, so one key has no one rotation.
_BY_LENGTH = ("dynamic", "longrope")


@dataclass(frozen=True, slots=True)
class Rotary:
    """How one layer rotates queries and keys.

    Attributes:
        embed: positions (B, T) -> (cos, sin), each (B, T, R), float32.
        apply: the model's ``(q, k, cos, sin) -> (q, k)``.
    """

    embed: Callable[[Tensor], Phases]
    apply: Callable[[Tensor, Tensor, Tensor, Tensor], Phases]
    _known: list[Phases] = field(default_factory=list, repr=False, compare=False)

    def phases(self, positions: Tensor) -> Phases:
        """Positions (B, T) -> cos and sin, each (B, T, R)."""
        return self.embed(positions)

    def phases_below(self, positions: Tensor, bound: int) -> Phases:
        """The `phases` of positions (B, T) in [0, bound), looked up: sines of the same few thousand are made once."""
        if not self._known or self._known[0][0].shape[1] < bound or self._known[0][0].device != positions.device:
            # Whoever makes the table, in inference mode or not, others may read it.
            with torch.inference_mode(False), torch.no_grad():
                self._known[:] = [self.embed(torch.arange(bound + bound // 4, device=positions.device)[None])]
        cos, sin = self._known[0]
        return cos[0][positions], sin[0][positions]

    def rotate(self, x: Tensor, phases: Phases) -> Tensor:
        """x (B, H, T, D) without position -> rotated by ``phases``; computed in float32, given in x's dtype."""
        cos, sin = (phase.float() for phase in phases)
        wide = x.float()
        # The model's function turns queries and keys; with no heads in place of the keys they cost nothing.
        return self.apply(wide, wide[:, :0], cos, sin)[0].to(x.dtype)

    def unrotate(self, x: Tensor, phases: Phases) -> Tensor:
        """The inverse of `rotate`: x (B, H, T, D) that was rotated by ``phases`` -> without position."""
        cos, sin = (phase.float() for phase in phases)
        # Some models scale their phases (YaRN), so that a rotation also stretches.
        stretch = cos * cos + sin * sin
        return self.rotate(x, (cos / stretch, -sin / stretch))


def layer_rotary(where: str, model: PreTrainedModel, layer_idx: int) -> Rotary:
    """The rotation of a model's layer.

    Args:
        where: who asks, for messages.
        model: a decoder-only model.
        layer_idx: index of the layer.

    Raises:
        UnsupportedError: positions that are not rotary (ALiBi, learned), rotary ones that depend on the length of the
            text, and layers that rotate a part of what attention sees in a way of their own (MLA, mRoPE).
    """
    inner, name = decoder(model), type(model).__name__
    embedding: Any = getattr(inner, "rotary_emb", None)
    if embedding is None:
        raise UnsupportedError(where, f"{name} has no rotary positions", "Use positions='original'.")
    kind = layer_types(model)[layer_idx]
    types = getattr(embedding, "rope_type", "default")
    by_type = isinstance(types, dict)
    rope_type = str(types[kind] if by_type else types)
    if any(part in rope_type for part in _BY_LENGTH):
        what = f"rotary positions of type {rope_type!r} depend on the length of the text"
        raise UnsupportedError(where, what, "Use positions='original', or a model with another rope_type.")
    module = next(m for m in attention_layers(model) if m.layer_idx == layer_idx)
    apply = file_function(module, "apply_rotary_pos_emb")
    by_rows = "mrope_section" in (getattr(inner.config, "rope_parameters", None) or {})
    if apply is None or by_rows or hasattr(module, "kv_b_proj"):
        what = f"{type(module).__name__} rotates its keys in a way of its own"
        raise UnsupportedError(where, what, "Use positions='original'.")

    def embed(positions: Tensor) -> Phases:
        like = torch.empty(0, dtype=torch.float32, device=positions.device)
        return embedding(like, positions, kind) if by_type else embedding(like, positions)

    return Rotary(embed, apply)
