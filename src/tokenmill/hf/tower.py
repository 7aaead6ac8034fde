"""Looking into a vision tower: its attention layers, what goes into the projector, and which layer feeds it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

from tokenmill.errors import LimitError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class TowerLayer:
    """Queries and keys of one attention layer of the tower, for the tiles of one picture.

    Attributes:
        queries: (tiles, H, P, d), rotated where the tower rotates; the class token is not among the P patches.
        keys: (tiles, H, P, d).
        cls_query: (tiles, H, d), or ``None`` for a tower without a class token.
        scale: what the layer multiplies ``queries @ keys.T`` by.
    """

    queries: Tensor
    keys: Tensor
    cls_query: Tensor | None
    scale: float


@dataclass(slots=True)
class Seen:
    """What hooks saw while the tower ran: the projector's inputs, and for each layer its projections."""

    before: list[Tensor] = field(default_factory=list)
    layers: dict[int, dict[str, Any]] = field(default_factory=dict)


def tower_depth(model: PreTrainedModel) -> int:
    """Number of attention layers of the vision tower."""
    return len(_tower_attentions(model))


def feature_layer(model: PreTrainedModel) -> int:
    """Index of the tower's layer whose output the projector takes (not negative)."""
    chosen = getattr(model.config, "vision_feature_layer", -1)
    last = max(chosen) if isinstance(chosen, list | tuple) else chosen
    depth = tower_depth(model)
    return depth + last if last < 0 else last - 1  # hidden_states[0] is what goes into layer 0


def projector(model: PreTrainedModel) -> nn.Module:
    """What stands between the tower and the decoder: a two-layer MLP, or Qwen's patch merger."""
    inner: Any = model.model
    return inner.visual.merger if hasattr(inner, "visual") else inner.multi_modal_projector


def _tower(model: Any) -> nn.Module:
    inner = model.model
    return inner.visual if hasattr(inner, "visual") else inner.vision_tower


def _tower_attentions(model: Any) -> list[nn.Module]:
    """The tower's attention modules in order: those that hold a query projection, or a fused one."""
    return [m for m in _tower(model).modules() if hasattr(m, "q_proj") or hasattr(m, "qkv")]


@contextmanager
def watching(model: Any, layers: Sequence[int], before: bool) -> Generator[Seen, None, None]:
    """Hooks that note the projector's input and the projections of some attention layers."""
    seen = Seen()
    found = _tower_attentions(model)
    with ExitStack() as undo:
        if before:

            def keep(_module: nn.Module, args: tuple[Any, ...]) -> None:
                seen.before.append(args[0])

            undo.callback(projector(model).register_forward_pre_hook(keep).remove)
        for layer in layers:
            if not -len(found) <= layer < len(found):
                raise LimitError("vision tower", "layer", layer, f"in [{-len(found)}, {len(found) - 1}]")
            module: Any = found[layer]
            note = seen.layers[layer] = {"module": module}
            for name in ("q_proj", "k_proj", "qkv"):
                if hasattr(module, name):
                    hook = _noting(note, name)
                    undo.callback(getattr(module, name).register_forward_hook(hook).remove)
            undo.callback(module.register_forward_pre_hook(_noting_kwargs(note), with_kwargs=True).remove)
        yield seen


def _noting(note: dict[str, Any], name: str) -> Callable[..., None]:
    def hook(_module: nn.Module, _args: Any, out: Tensor) -> None:
        note[name] = out

    return hook


def _noting_kwargs(note: dict[str, Any]) -> Callable[..., None]:
    def hook(_module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        note["kwargs"] = kwargs

    return hook


def tower_layer(note: dict[str, Any], tiles: slice) -> TowerLayer:
    """What was noted of a layer of CLIP, SigLIP or InternViT: projections of (tiles, [class token +] P, H * d)."""
    module = note["module"]
    heads = module.num_heads
    norms = [getattr(module, name, None) for name in ("q_norm", "k_norm")]
    made = []
    for name, norm in zip(("q_proj", "k_proj"), norms, strict=True):
        out = note[name][tiles]
        out = norm(out) if norm is not None else out
        made.append(out.unflatten(-1, (heads, -1)).transpose(1, 2))  # (tiles, H, P, d)
    queries, keys = made
    side = queries.shape[2] ** 0.5
    has_cls = side != int(side)  # a square of patches, and one more
    scale = float(getattr(module, "scale", queries.shape[-1] ** -0.5))
    if not has_cls:
        return TowerLayer(queries, keys, None, scale)
    return TowerLayer(queries[:, :, 1:], keys[:, :, 1:], queries[:, :, 0], scale)


def merged_layer(note: dict[str, Any]) -> tuple[Tensor, Tensor, float]:
    """What was noted of a layer of Qwen2.5-VL: rotated queries and keys (H, patches, d) by windows, and the scale."""
    module = note["module"]
    queries, keys, _ = note["qkv"].unflatten(-1, (3, module.num_heads, -1)).unbind(1)  # (4N, H, d)
    cos, sin = note["kwargs"]["position_embeddings"]
    queries, keys = apply_rotary_pos_emb_vision(queries, keys, cos, sin)
    return queries.transpose(0, 1), keys.transpose(0, 1), float(module.scaling)
