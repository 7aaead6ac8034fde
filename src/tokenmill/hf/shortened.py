"""Decoder layers that see fewer visual tokens from some layer on, in prefill and in decoding.

The decoder computes its mask and its rotary phases once, before its layers run, so every layer from the first stage on
gets them cut to the tokens that are left. The KV cache holds the whole prompt in the layers before a stage and what is
left in those behind it; position and mask bookkeeping read the first layer, which stays whole.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from tokenmill.errors import LimitError, UnsupportedError, unknown_name
from tokenmill.hf.cache import check_cache
from tokenmill.hf.layout import FULL, decoder, layer_types
from tokenmill.hf.vision import check_type, visual_mask

if TYPE_CHECKING:
    from transformers import PreTrainedModel

POSITIONS = ("keep", "compact")


@dataclass(frozen=True, slots=True)
class StageView:
    """What a stage sees when it chooses, just before its layer runs over a prompt.

    Attributes:
        layer: index of the layer, T for "behind the last".
        hidden: (B, L, D), what goes into the layer.
        visual: (B, L) bool, the visual tokens that are left.
        real: (B, L) bool, false at padding.
        columns: (B, L) int64, where each token stands in the prompt that the model got.
    """

    layer: int
    hidden: Tensor
    visual: Tensor
    real: Tensor
    columns: Tensor


Choose = Callable[[StageView], Tensor]


@dataclass(frozen=True, slots=True)
class Stage:
    """Before decoder layer ``layer`` runs over a prompt, ``choose(view)`` gives (B, L) bool: visual tokens to keep.

    ``watch()`` is entered together with the hooks, for a method that looks at an earlier layer.
    """

    layer: int
    choose: Choose
    watch: Callable[[], AbstractContextManager[Any]] | None = None


@dataclass(slots=True)
class _Plan:
    """What one layer and those behind it see of a prompt of L0 columns."""

    index: Tensor  # (B, L) int64, columns of the prompt: fillers, then what is left, each ascending
    valid: Tensor  # (B, L) bool, false at padding and at columns that only fill a row up
    ragged: bool  # some column is not valid, so attention needs a mask
    offset: Tensor  # (B, 1) what compact positions are behind the given ones


@dataclass(slots=True)
class _Prompt:
    """One prompt on its way through the layers, and the text that follows it."""

    visual: Tensor  # (B, L0) bool
    real: Tensor
    positions: Tensor | None
    plans: dict[int, _Plan] = field(default_factory=dict)  # first layer -> plan

    def plan(self, layer: int) -> _Plan | None:
        """The plan of a layer: that of the last stage at or before it."""
        at = max((first for first in self.plans if first <= layer), default=None)
        return None if at is None else self.plans[at]


@dataclass(slots=True)
class Shortening:
    """What happened to the last prompt.

    Attributes:
        kept: for each stage's layer, (B, L) bool over the prompt's columns: the visual tokens left from there on.
        visual: (B, L) bool, all visual tokens of the prompt.
        lengths: tokens that each decoder layer saw, padding included.
        calls: forwards of the decoder.
        positions: positions that went through the first layer.
    """

    kept: dict[int, Tensor] = field(default_factory=dict)
    visual: Tensor | None = None
    lengths: list[int] = field(default_factory=list)
    calls: int = 0
    positions: int = 0


@contextmanager
def shortened(
    where: str, model: PreTrainedModel, stages: Sequence[Stage], *, positions: str = "keep"
) -> Generator[Shortening, None, None]:
    """Run the stages on every prompt with pictures that the model gets inside the ``with``.

    A prompt is a forward with an empty cache (or none). Text that follows in the same cache, also a further turn,
    reads the shortened layers. Prompts without pictures pass untouched.

    Args:
        where: who asks, for messages.
        model: see `vision.check_type`; sdpa or eager attention.
        stages: strictly ascending layers in [1, T]; a stage at T has no effect.
        positions: ``"keep"`` (tokens keep their rotary positions) or ``"compact"`` (renumbered from the stage on).

    Raises:
        LimitError: bad layers or ``positions``.
        UnsupportedError: a model that cannot be shortened; inside the ``with``, a static, quantised or offloaded
            cache, prefill in chunks, or prompt embeddings instead of ids.
    """
    depth = check_stages(where, model, [stage.layer for stage in stages], positions)
    state = _State(where, model, {s.layer: s for s in stages if s.layer < depth}, positions)
    with ExitStack() as undo:
        undo.callback(model.register_forward_pre_hook(state.on_model, with_kwargs=True).remove)
        undo.callback(decoder(model).register_forward_pre_hook(state.on_decoder, with_kwargs=True).remove)
        for at, layer in enumerate(decoder(model).layers):
            undo.callback(layer.register_forward_pre_hook(state.on_layer(at), with_kwargs=True).remove)
        for stage in stages:
            # Behind the hooks above, so that a watched layer is seen with what it really gets.
            if stage.watch is not None:
                undo.enter_context(stage.watch())
        yield state.seen


def check_stages(where: str, model: PreTrainedModel, layers: Sequence[int], positions: str = "keep") -> int:
    """Refuse layers and models that cannot be shortened; returns the decoder's depth."""
    check_type(where, model)
    if positions not in POSITIONS:
        raise unknown_name(where, "positions", positions, POSITIONS)
    depth = len(decoder(model).layers)
    for before, layer in zip([0, *layers], layers, strict=False):
        if isinstance(layer, bool) or not isinstance(layer, int) or not before < layer <= depth:
            limit = f"an int in [{before + 1}, {depth}]"
            raise LimitError(where, "layer", layer, limit, "Layers ascend; before layer 0, prune the inputs.")
    name = str(decoder(model).config._attn_implementation)
    if name not in ("sdpa", "eager") and not name.startswith("tokenmill"):
        mend = "Use model.set_attn_implementation('sdpa') or 'eager'."
        raise UnsupportedError(where, f"attention {name!r} cannot have layers of different lengths", mend)
    if any(kind != FULL for kind in layer_types(model)):
        raise UnsupportedError(where, f"{type(model).__name__} has layers without full attention")
    if positions == "compact" and "mrope_section" in (getattr(decoder(model).config, "rope_parameters", None) or {}):
        raise UnsupportedError(where, "positions='compact' inside a model with mRoPE", "Use positions='keep'.")
    return depth


class _State:
    """The hooks, and what they know."""

    def __init__(self, where: str, model: PreTrainedModel, stages: dict[int, Stage], positions: str) -> None:
        self.where, self.model, self.stages, self.compact = where, model, stages, positions == "compact"
        self.seen = Shortening()
        self.prompts: WeakKeyDictionary[Any, _Prompt] = WeakKeyDictionary()
        self.now: _Prompt | None = None
        self.visual: Tensor | None = None
        self.positions: Tensor | None = None

    def on_model(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        self.visual = None if ids is None else visual_mask(self.model, ids)
        if ids is None and not _length(kwargs.get("past_key_values")):
            raise UnsupportedError(self.where, "a prompt of inputs_embeds does not say where its pictures are")

    def on_decoder(self, _module: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        embeds, cache, mask = kwargs["inputs_embeds"], kwargs.get("past_key_values"), kwargs.get("attention_mask")
        self.seen.calls += 1
        self.seen.positions += embeds.shape[0] * embeds.shape[1]
        self.positions = kwargs.get("position_ids")
        if _length(cache):
            self.now = self.prompts.get(cache)
            if embeds.shape[1] > 1 and self.visual is not None and bool(self.visual.any()):
                raise UnsupportedError(
                    self.where,
                    "pictures come behind tokens that are cached already (prefill in chunks, or a later turn)",
                    "Give the whole prompt in one forward: what is kept depends on all of it.",
                )
            return
        self.now = None
        if self.visual is None or not bool(self.visual.any()):
            return
        if cache is not None:
            check_cache(self.where, cache, what="hold layers of several lengths in")
        real = torch.ones_like(self.visual)
        if isinstance(mask, Tensor) and mask.dim() == 2:
            real = mask.bool()
        self.now = _Prompt(self.visual, real, self.positions)
        self.seen.visual, self.seen.kept, self.seen.lengths = self.visual, {}, []

    def on_layer(self, at: int) -> Callable[..., Any]:
        """The hook of one layer."""

        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            prompt, cache = self.now, kwargs.get("past_key_values")
            if prompt is None:
                return None
            if cache is not None and cache.get_seq_length(at):
                plan = prompt.plan(at)
                return None if plan is None else (args, self._follow(plan, prompt, at, args[0], kwargs))
            if cache is not None and at == 0:
                self.prompts[cache] = prompt
            hidden = args[0]
            if at in self.stages:
                hidden = self._run_stage(self.stages[at], prompt, hidden)
            self.seen.lengths.append(hidden.shape[1])
            plan = prompt.plan(at)
            return None if plan is None else ((hidden, *args[1:]), self._prefill(plan, hidden, kwargs))

        return hook

    def _run_stage(self, stage: Stage, prompt: _Prompt, hidden: Tensor) -> Tensor:
        """Choose, write the plan of this layer, and cut the hidden states."""
        before = prompt.plan(stage.layer)
        if before is None:
            columns = torch.arange(hidden.shape[1], device=hidden.device).expand(hidden.shape[:2])
            real = prompt.real
        else:
            columns, real = before.index, before.valid
        visual = prompt.visual.gather(1, columns) & real
        keep = stage.choose(StageView(stage.layer, hidden, visual, real, columns)) & visual
        self.seen.kept[stage.layer] = torch.zeros_like(prompt.visual).scatter(1, columns, keep)
        if before is None and bool((keep == visual).all()):
            return hidden  # nothing goes: the layers stay exactly as they are
        keep = keep | (real & ~visual)
        length = int(keep.sum(1).max())
        # Rows that keep less are filled up on the left with dropped tokens, hidden from everybody.
        order = keep.to(torch.uint8).sort(dim=1, stable=True).indices[:, keep.shape[1] - length :]
        valid = keep.gather(1, order)
        index = columns.gather(1, order)
        offset = torch.zeros(len(index), 1, dtype=torch.long, device=index.device)
        if self.compact:
            last = index[:, -1:] if prompt.positions is None else _rows(prompt.positions, len(index))[:, -1:]
            offset = last - (valid.sum(1, keepdim=True) - 1)
        prompt.plans[stage.layer] = _Plan(index, valid, not bool(valid.all()), offset)
        return hidden.gather(1, order[..., None].expand(-1, -1, hidden.shape[-1]))

    def _prefill(self, plan: _Plan, hidden: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        changed = dict(kwargs)
        if self.compact:
            fresh = (plan.valid.long().cumsum(1) - 1).clamp_min(0)
            changed["position_embeddings"] = decoder(self.model).rotary_emb(hidden, fresh)
        else:
            changed["position_embeddings"] = tuple(_take(x, plan.index) for x in kwargs["position_embeddings"])
        if kwargs.get("position_ids") is not None:
            changed["position_ids"] = _rows(kwargs["position_ids"], len(plan.index)).gather(1, plan.index)
        mask = kwargs.get("attention_mask")
        if mask is not None:
            mask = mask.expand(len(plan.index), -1, -1, -1)
            rows = plan.index[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[-1])
            mask = mask.gather(2, rows)
            mask = mask.gather(3, plan.index[:, None, None, :].expand(-1, mask.shape[1], mask.shape[2], -1))
        if plan.ragged:
            width = plan.index.shape[1]
            causal = torch.ones(width, width, dtype=torch.bool, device=hidden.device).tril()
            itself = torch.eye(width, dtype=torch.bool, device=hidden.device)
            seen = (causal & plan.valid[:, None, None, :]) | itself  # a hidden row still needs a key
            mask = self._mask(mask, seen, hidden.dtype)
        changed["attention_mask"] = mask
        return changed

    def _follow(self, plan: _Plan, prompt: _Prompt, at: int, hidden: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Later tokens: keys of the prompt that are left, then all that came after it."""
        changed = dict(kwargs)
        mask, new = kwargs.get("attention_mask"), hidden.shape[1]
        if mask is not None:
            after = torch.arange(prompt.visual.shape[1], mask.shape[-1], device=mask.device)
            index = torch.cat([plan.index, after.expand(len(plan.index), -1)], dim=1)
            mask = mask.expand(len(index), -1, -1, -1)
            mask = mask.gather(3, index[:, None, None, :].expand(-1, mask.shape[1], mask.shape[2], -1))
        if plan.ragged:
            more = kwargs["past_key_values"].get_seq_length(at) - plan.valid.shape[1] + new
            known = torch.cat([plan.valid, plan.valid.new_ones(len(plan.valid), more)], dim=1)
            mask = self._mask(mask, known[:, None, None, :].expand(-1, 1, new, -1), hidden.dtype)
        changed["attention_mask"] = mask
        if self.compact:
            positions = self.positions
            if positions is None:
                past = kwargs["past_key_values"].get_seq_length()
                positions = torch.arange(past, past + new, device=hidden.device)[None]
            fresh = _rows(positions, len(plan.offset))[:, -new:] - plan.offset
            changed["position_embeddings"] = decoder(self.model).rotary_emb(hidden, fresh)
        return changed

    def _mask(self, mask: Tensor | None, seen: Tensor, dtype: torch.dtype) -> Tensor:
        """Join a mask (boolean, additive or none) with what may be seen."""
        if mask is not None and mask.dtype == torch.bool:
            return (mask & seen) | _diagonal(seen)
        if mask is None and str(decoder(self.model).config._attn_implementation) != "eager":
            return seen
        lowest = torch.finfo(dtype).min
        if mask is None:
            mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
        return mask.masked_fill(~seen, lowest)


def _diagonal(seen: Tensor) -> Tensor:
    """True where a query is its own key, for square masks; a row without any key would give NaN."""
    rows, columns = seen.shape[-2:]
    if rows != columns:
        return torch.zeros_like(seen)
    return torch.eye(rows, dtype=torch.bool, device=seen.device).expand_as(seen)


def _length(cache: Any) -> int:
    return 0 if cache is None else int(cache.get_seq_length())


def _rows(positions: Tensor, batch: int) -> Tensor:
    """Text positions (B, T) of 2-D or mRoPE positions, one row for each item."""
    flat = positions if positions.dim() == 2 else positions[0]
    return flat.expand(batch, -1)


def _take(phases: Tensor, index: Tensor) -> Tensor:
    """Phases (B or 1, L, d), or with rows before them, at the columns ``index`` (B, K)."""
    shape = (*phases.shape[:-3], len(index), *phases.shape[-2:])
    phases = phases.expand(shape)
    at = index[..., None].expand(*phases.shape[:-2], index.shape[1], phases.shape[-1])
    return phases.gather(-2, at)
