"""Arguments of a model's forward through a decoding loop of our own: what the prefill takes and what goes on.

The loop of `generate` in four calls: `split_model_kwargs` once, `prefill_inputs` once, then `grow` and `step_inputs`
for every forward. A method that feeds drafts replaces ``attention_mask`` and ``position_ids`` of the step by its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.utils.generic import TransformersKwargs

from tokenmill.errors import LimitError, unknown_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What `generate` grows by one entry a token. `token_type_ids` repeat their last value, text tokens count as 0 in the
# multimodal ones.
MASK, POSITIONS = "attention_mask", "position_ids"
REPEATED, ZEROED = ("token_type_ids",), ("mm_token_type_ids", "moe_mm_token_type_ids")
CONTINUING = frozenset({MASK, POSITIONS, "past_key_values", "use_cache", "logits_to_keep", *REPEATED, *ZEROED})


@dataclass(frozen=True, slots=True)
class ModelInputs:
    """Arguments of a forward, split.

    Attributes:
        prefill: for the forward over the prompt only: images, encoder outputs, prompt embeddings, any other tensor.
        running: for every forward: mask, positions, token types, cache, and flags.
    """

    prefill: dict[str, Any]
    running: dict[str, Any]


def split_model_kwargs(model: PreTrainedModel, kwargs: Mapping[str, Any]) -> ModelInputs:
    """Split what `generate` hands to a ``custom_generate`` callable, or what a user would pass to the model.

    Masks, positions, token types and the cache go on, as do flags and numbers; every other tensor or structure of
    tensors describes the prompt. ``None`` means absent and is dropped.

    Args:
        model: whose forward takes the arguments.
        kwargs: without ``input_ids``.

    Raises:
        LimitError: a name that neither the forward nor transformers knows, with the nearest names; a mask that is
            not 2-D.
    """
    known = set(inspect.signature(model.forward).parameters) - {"input_ids", "kwargs", "labels"}
    allowed = known | set(TransformersKwargs.__annotations__) | {"mm_encoder_outputs", "inputs_embeds"}
    prefill: dict[str, Any] = {}
    running: dict[str, Any] = {}
    for name, value in kwargs.items():
        if value is None:
            continue
        if name not in allowed and name not in CONTINUING:
            raise unknown_name(type(model).__name__, "argument", name, allowed)
        goes_on = name in CONTINUING or not _holds_tensors(value)
        (running if goes_on else prefill)[name] = value
    mask = running.get(MASK)
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise LimitError("split_model_kwargs", MASK, shape, "2-D (B, tokens)", "It has to grow with the text.")
    return ModelInputs(prefill, running)


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, Mapping):
        return True  # also when empty: generate hands an empty dictionary of encoder outputs to text-only prompts
    return isinstance(value, Tensor) or (isinstance(value, list | tuple) and any(map(_holds_tensors, value)))


def with_positions(model: Any, input_ids: Tensor, inputs: ModelInputs, *, length: int | None = None) -> ModelInputs:
    """``inputs`` with the positions that `generate` would give the prompt, unless positions were given.

    They follow the mask (left padding), and the images of models with mRoPE. `generate` has done this when it calls a
    ``custom_generate`` callable; a loop that starts from a user's inputs needs it.

    Args:
        model: the model.
        input_ids: (B, T), the whole text or what the cache lacks of it.
        inputs: from `split_model_kwargs`.
        length: see `prefill_inputs`.
    """
    if POSITIONS in inputs.running or POSITIONS not in inspect.signature(model.forward).parameters:
        return inputs
    kwargs = {**inputs.running, **inputs.prefill}
    if MASK not in kwargs:
        _, whole = _lengths(input_ids.shape[1], inputs, length)
        kwargs[MASK] = input_ids.new_ones(input_ids.shape[0], whole)
    positions = model._prepare_position_ids_for_generation(input_ids, kwargs)
    return ModelInputs(inputs.prefill, {**inputs.running, POSITIONS: positions})


def _lengths(given: int, inputs: ModelInputs, length: int | None) -> tuple[int, int]:
    """Tokens that the cache holds, and tokens of the whole text."""
    cache, mask = inputs.running.get("past_key_values"), inputs.running.get(MASK)
    past = 0 if cache is None else int(cache.get_seq_length())
    if mask is not None:
        return past, mask.shape[1]
    return past, length if length is not None else given if given > past else past + given


def prefill_inputs(
    model: PreTrainedModel, input_ids: Tensor, inputs: ModelInputs, *, length: int | None = None
) -> dict[str, Any]:
    """Arguments of the forward over the prompt, ``model(**prefill_inputs(...))``.

    Tokens that a given cache already holds are left out when ``input_ids`` contain them.

    Args:
        model: the model.
        input_ids: (B, T), the whole text or what the cache lacks of it.
        inputs: from `split_model_kwargs`.
        length: tokens of the whole text, for a call with a cache and without a mask; `generate` notes it as
            ``generation_config._mask_length``. ``None``: the whole text is given when it is longer than the cache.

    Raises:
        LimitError: nothing is left to feed.
    """
    embeds = inputs.prefill.get("inputs_embeds")
    given = input_ids.shape[1] if embeds is None else embeds.shape[1]
    past, whole = _lengths(given, inputs, length)
    new = given - past if embeds is not None or given == whole else given
    if new < 1:
        raise LimitError("prefill_inputs", "tokens", given, f"more than the {past} that the cache holds")
    return _prepare(model, input_ids, new if past else None, True, {**inputs.running, **inputs.prefill})


def step_inputs(model: PreTrainedModel, input_ids: Tensor, running: Mapping[str, Any], new: int = 1) -> dict[str, Any]:
    """Arguments of a decoding forward over the last ``new`` tokens.

    The model's own `prepare_inputs_for_generation` decides what it wants after the prefill (Gemma 3 drops its token
    types there).

    Args:
        model: the model.
        input_ids: (B, T) or the last tokens of it.
        running: grown to the full length T.
        new: how many tokens are fed.

    Raises:
        LimitError: more tokens than there are.
    """
    if not 1 <= new <= input_ids.shape[1]:
        raise LimitError("step_inputs", "new", new, f"in [1, T={input_ids.shape[1]}]")
    return _prepare(model, input_ids, new, False, {"use_cache": True, **running})


def _prepare(model: Any, input_ids: Tensor, new: int | None, first: bool, kwargs: dict[str, Any]) -> dict[str, Any]:
    made = model.prepare_inputs_for_generation(input_ids, next_sequence_length=new, is_first_iteration=first, **kwargs)
    return {name: value for name, value in made.items() if value is not None}


def grow(running: Mapping[str, Any], new: int = 1) -> dict[str, Any]:
    """``running`` for a text that is ``new`` tokens longer, as `generate` grows it; the argument is not changed.

    The mask grows by ones, token types by their last value, multimodal types by 0, positions by last + 1, + 2 ... in
    each of their rows (2-D, or 3-D for mRoPE).

    Raises:
        LimitError: fewer than 0 tokens.
    """
    if new < 0:
        raise LimitError("grow", "new", new, "at least 0")
    grown = dict(running)
    for name in (MASK, *ZEROED, *REPEATED):
        old = running.get(name)
        if old is None:
            continue
        more = old[:, -1:].expand(-1, new) if name in REPEATED else old.new_full((old.shape[0], new), name == MASK)
        grown[name] = torch.cat([old, more], dim=-1)
    positions = running.get(POSITIONS)
    if positions is not None:
        steps = torch.arange(1, new + 1, dtype=positions.dtype, device=positions.device)
        grown[POSITIONS] = torch.cat([positions, positions[..., -1:] + steps], dim=-1)
    return grown
