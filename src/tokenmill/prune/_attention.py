"""Attention weights where a method needs them: of one decoder layer, and of layers of the vision tower.

They are computed from the layer's own projections, for the rows that are asked for, so the model keeps its fast
attention.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tokenmill.errors import UnsupportedError
from tokenmill.hf.layout import attention_shape, decoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tokenmill.hf.tower import TowerLayer


class LayerProbe:
    """Queries, keys and mask of one decoder layer in the last forward inside `watch`."""

    def __init__(self, model: PreTrainedModel, layer: int) -> None:
        self.module: Any = decoder(model).layers[layer].self_attn
        self.shape = attention_shape(model)
        missing = [name for name in ("q_proj", "k_proj", "v_proj") if not hasattr(self.module, name)]
        if missing:
            raise UnsupportedError("LayerProbe", f"{type(self.module).__name__} has no {' and no '.join(missing)}")
        self._seen: dict[str, Any] = {}

    @contextmanager
    def watch(self) -> Generator[None, None, None]:
        """Note what the layer computes."""
        with ExitStack() as undo:
            for name in ("q", "k", "v"):
                # A model with a norm on every head has its queries behind the norm.
                source: nn.Module = getattr(self.module, f"{name}_norm", None) or getattr(self.module, f"{name}_proj")
                undo.callback(source.register_forward_hook(self._noting(name)).remove)
            undo.callback(self.module.register_forward_pre_hook(self._note_call, with_kwargs=True).remove)
            try:
                yield
            finally:
                self._seen.clear()

    def _noting(self, name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, out: Tensor) -> None:
            self._seen[name] = out

        return hook

    def _note_call(self, _module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        self._seen["call"] = kwargs

    def heads(self, name: str) -> Tensor:
        """``"q"``, ``"k"`` or ``"v"`` before rotation: (B, L, heads, d)."""
        out: Tensor = self._seen[name]
        return out if out.dim() == 4 else out.unflatten(-1, (-1, self.shape.head_dim))

    def hidden(self) -> Tensor:
        """What went into the attention, (B, L, D), after its norm."""
        return self._seen["call"]["hidden_states"]

    def attention(self, rows: slice | Tensor) -> Tensor:
        """Softmax weights of some queries over all keys, (B, H, R, L) float32.

        Args:
            rows: which queries, a slice or (R,) int64.
        """
        call = self._seen["call"]
        cos, sin = call["position_embeddings"]
        queries, keys = (rotate(self.heads(x).transpose(1, 2).float(), cos, sin) for x in ("q", "k"))
        length = keys.shape[2]
        at = torch.arange(length, device=keys.device)[rows]
        keys = keys.repeat_interleave(queries.shape[1] // keys.shape[1], dim=1)
        scores = queries[:, :, at] @ keys.transpose(2, 3) * float(self.module.scaling)
        mask = call.get("attention_mask")
        if mask is None:
            scores = scores.masked_fill(torch.arange(length, device=keys.device) > at[:, None], -torch.inf)
        else:
            part = mask.expand(len(keys), -1, -1, -1)[:, :, at, :length]
            scores = scores.masked_fill(~part, -torch.inf) if part.dtype == torch.bool else scores + part.float()
        # A padding row sees nothing; its weights are zero instead of NaN.
        return scores.softmax(-1).nan_to_num(0)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding by halves: x (B, H, L, d), cos and sin (B, L, r) with r <= d."""
    width = cos.shape[-1]
    turned, rest = x[..., :width], x[..., width:]
    first, second = turned.chunk(2, dim=-1)
    cos, sin = cos[:, None].float(), sin[:, None].float()
    return torch.cat([turned * cos + torch.cat([-second, first], -1) * sin, rest], -1)


def cls_attention(layer: TowerLayer) -> Tensor:
    """What the class token attends to among the patches: (tiles, P) float32, rows sum to 1; mean over heads.

    The class token's own key is left out before the softmax.

    Raises:
        UnsupportedError: a tower without a class token.
    """
    if layer.cls_query is None:
        raise UnsupportedError(
            "cls_attention",
            "this vision tower has no class token",
            "Choose another source (mean attention, norm, random pivot); CLIP and InternViT have one.",
        )
    return query_attention(layer.cls_query, layer)


def query_attention(query: Tensor, layer: TowerLayer) -> Tensor:
    """Softmax of one query a head (tiles, H, d) over the patches' keys, mean over heads: (tiles, P) float32."""
    scores = torch.einsum("bhd,bhpd->bhp", query.float(), layer.keys.float()) * layer.scale
    return scores.softmax(-1).mean(1)


def patch_attention(layer: TowerLayer) -> Tensor:
    """All patches over all patches, mean over heads: (tiles, P, P) float32, rows sum to 1.

    The class token is left out before the softmax. One head is held at a time.
    """
    tiles, heads, patches, _ = layer.queries.shape
    total = torch.zeros(tiles, patches, patches, device=layer.queries.device)
    for head in range(heads):
        scores = layer.queries[:, head].float() @ layer.keys[:, head].float().transpose(1, 2)
        total += (scores * layer.scale).softmax(-1) / heads
    return total
