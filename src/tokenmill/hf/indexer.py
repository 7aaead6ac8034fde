"""The indexer of DeepSeek sparse attention: its queries, keys and gates, and a cache layer for pooled keys beside them.

DeepSeek-V3.2 and GLM-5 (``deepseek_v32``, ``glm_moe_dsa``) choose the keys of a query by a small module of each layer,
``self_attn.indexer``, which this gives access to and lets somebody replace.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicIndexedLayer

from tokenmill.errors import UnsupportedError
from tokenmill.hf.layout import decoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# How each class rotates its index queries and keys.
_ROTATIONS = {"deepseek_v32": "apply_rotary_pos_emb", "glm_moe_dsa": "apply_rotary_pos_emb_interleave"}
TYPES = tuple(_ROTATIONS)


def index_layers(where: str, model: PreTrainedModel) -> list[tuple[nn.Module, nn.Module]]:
    """(attention, indexer) of every layer that has an indexer of its own.

    Raises:
        UnsupportedError: a model of another class.
    """
    kind = str(getattr(model.config, "model_type", ""))
    if kind not in TYPES:
        raise UnsupportedError(
            where,
            f"{type(model).__name__} has no index keys",
            f"Models of type {' and '.join(TYPES)} have; for others use tokenselect or quest.",
        )
    found = [layer.self_attn for layer in decoder(model).layers]
    return [(attention, attention.indexer) for attention in found if getattr(attention, "indexer", None) is not None]


def index_parts(
    indexer: Any, hidden: Tensor, q_resid: Tensor, phases: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """What an indexer scores by, from its own weights.

    Args:
        indexer: the module.
        hidden: (B, S, D).
        q_resid: (B, S, r), what its query projection reads.
        phases: cosines and sines of the positions.

    Returns:
        Rotated queries (B, S, H, d), rotated keys (B, S, d), gates (B, S, H) with all constant factors.
    """
    module = sys.modules[type(indexer).__module__]
    rotate: Callable[..., tuple[Tensor, Tensor]] = getattr(module, _ROTATIONS[indexer.config.model_type])
    width = indexer.qk_rope_head_dim
    q = indexer.wq_b(q_resid).unflatten(-1, (indexer.n_heads, indexer.head_dim))
    k = indexer.k_norm(indexer.wk(hidden))[:, :, None]
    turned_q, turned_k = rotate(q[..., :width], k[..., :width], *phases, unsqueeze_dim=2)
    q, k = torch.cat([turned_q, q[..., width:]], -1), torch.cat([turned_k, k[..., width:]], -1)[:, :, 0]
    gates = indexer.weights_proj(hidden.to(indexer.weights_proj.weight.dtype)).float()
    return q, k, gates * (indexer.n_heads**-0.5 * indexer.softmax_scale)


class PooledIndexedLayer(DynamicIndexedLayer):
    """A layer whose index keys have a companion: an object with ``append``, ``crop`` and ``rows``, see `BlockKeys`."""

    pooled: Any = None

    @classmethod
    def of(cls, layer: DynamicIndexedLayer) -> PooledIndexedLayer:
        """The same layer with room for a companion; what it holds is shared."""
        made = cls()
        vars(made).update(vars(layer))
        return made

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.pooled = None

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens."""
        super().crop(tokens_to_remove)
        if self.pooled is not None and tokens_to_remove and self.indexer_keys is not None:
            self.pooled.crop(self.indexer_keys)

    def reorder_cache(self, beam_idx: Any) -> None:
        """Take the batch rows ``beam_idx`` (B,)."""
        super().reorder_cache(beam_idx)
        self._rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each batch row ``repeats`` times."""
        super().batch_repeat_interleave(repeats)
        if self.pooled is not None:
            self._rows(torch.arange(len(self.pooled.first)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the batch rows ``indices``."""
        super().batch_select_indices(indices)
        self._rows(indices)

    def _rows(self, index: Tensor) -> None:
        if self.pooled is not None:
            self.pooled.rows(index.to(self.pooled.first.device))


def pooled_layer(where: str, cache: Any, layer: int) -> PooledIndexedLayer:
    """The cache's layer as one with room for a companion, put in its place when it is not yet.

    Raises:
        UnsupportedError: a cache whose layers do not grow.
    """
    held = cache.layers[layer]
    if isinstance(held, PooledIndexedLayer):
        return held
    if type(held) is not DynamicIndexedLayer:
        raise UnsupportedError(
            where,
            f"pooled keys do not follow a {type(held).__name__}",
            "Use the default dynamic cache (cache_implementation=None).",
        )
    made = PooledIndexedLayer.of(held)
    cache.layers[layer] = made
    return made
