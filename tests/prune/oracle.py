"""The masked oracle: the full-length run in which dropped tokens are hidden from everybody, without any cache."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenmill.hf.inputs import split_model_kwargs, with_positions
from tokenmill.hf.layout import decoder
from tokenmill.hf.vision import PICTURE_INPUTS, encode, visual_mask

from . import vlms

STEPS = 10


@dataclass
class Run:
    """A pruned run and what the oracle says about it."""

    pruned: Any
    trace: Any
    sequences: Tensor
    got: Tensor  # (B, steps, V)
    want: Tensor
    dropped: dict[int, Tensor]

    @property
    def error(self) -> float:
        return float((self.got - self.want).abs().max())


@torch.no_grad()
def run(method: Any, model: Any, inputs: Mapping[str, Any], steps: int = STEPS) -> Run:
    """Generate with the method, and compare every step's logits with the masked full-length run."""
    pruned = method.prepare(model, inputs)
    with method.attach(model, pruned) as trace:
        out = model.generate(
            **pruned,
            max_new_tokens=steps,
            do_sample=False,
            suppress_tokens=[vlms.IMAGE, vlms.VIDEO],
            output_logits=True,
            return_dict_in_generate=True,
        )
    start = pruned["input_ids"].shape[1]
    new = out.sequences[:, start:]
    dropped = dropped_columns(pruned, trace, model, inputs)
    full = with_features(model, inputs, pruned) if pruned.report else inputs
    want = masked_logits(model, full, new, dropped)[:, -steps - 1 : -1]
    return Run(pruned, trace, out.sequences, torch.stack(out.logits, 1), want, dropped)


def dropped_columns(pruned: Any, trace: Any, model: Any, inputs: Mapping[str, Any]) -> dict[int, Tensor]:
    """First layer -> (B, T) bool over the unpruned prompt: what nobody sees from that layer on."""
    visual = visual_mask(model, inputs["input_ids"])
    dropped: dict[int, Tensor] = {}
    if pruned.report:
        gone = visual.clone()
        for visual_item, kept in zip(encode("oracle", model, inputs).visuals, pruned.report, strict=True):
            gone[kept.row, visual_item.columns[kept.keep]] = False
        dropped[0] = gone
    real = inputs["attention_mask"].bool()
    for layer, keep in trace.shortening.kept.items():
        gone = visual.clone()
        for row in range(len(visual)):
            left = real[row] if 0 not in dropped else real[row] & ~dropped[0][row]
            columns = left.nonzero()[:, 0]
            gone[row, columns[keep[row, -len(columns) :]]] = False
        dropped[layer] = gone
    return dropped


def with_features(model: Any, inputs: Mapping[str, Any], pruned: Any) -> dict[str, Any]:
    """The unpruned inputs with the pruned run's own features at the kept tokens, and noise at the dropped ones."""
    encoded = encode("oracle", model, inputs)
    given = {
        kind: torch.cat(list(out.pooler_output)) if not isinstance(out.pooler_output, Tensor) else out.pooler_output
        for kind, out in pruned["mm_encoder_outputs"].items()
    }
    start = dict.fromkeys(given, 0)
    features = []
    for visual, kept in zip(encoded.visuals, pruned.report, strict=True):
        noise = torch.full_like(visual.features, 7.0)
        count = len(kept.keep)
        noise[kept.keep] = given[visual.kind].flatten(0, -2)[start[visual.kind] :][:count]
        start[visual.kind] += count
        features.append(noise)
    positions = full_positions(model, inputs)
    made = {k: v for k, v in inputs.items() if k not in PICTURE_INPUTS}
    return {**made, "position_ids": positions, "mm_encoder_outputs": encoded.outputs(features)}


def full_positions(model: Any, inputs: Mapping[str, Any]) -> Tensor:
    """Positions of the whole prompt, as `generate` would make them."""
    if "position_ids" in inputs:
        return inputs["position_ids"]
    given = split_model_kwargs(model, {k: v for k, v in inputs.items() if k != "input_ids"})
    positions = with_positions(model, inputs["input_ids"], given).running["position_ids"]
    return positions.expand(*positions.shape[:-2], len(inputs["input_ids"]), -1)


@torch.no_grad()
def masked_logits(model: Any, inputs: Mapping[str, Any], more: Tensor, dropped: Mapping[int, Tensor]) -> Tensor:
    """Logits (B, T + n, V) of the unpruned prompt and ``more`` (B, n) tokens behind it.

    Args:
        model: the untouched model.
        inputs: the unpruned inputs, with a mask.
        more: tokens that were generated.
        dropped: first layer -> (B, T) bool, columns that nobody sees from that layer on.
    """
    ids = torch.cat([inputs["input_ids"], more], 1)
    steps = more.shape[1]
    positions = full_positions(model, inputs)
    positions = torch.cat([positions, positions[..., -1:] + torch.arange(1, steps + 1)], -1)
    real = torch.cat([inputs["attention_mask"].bool(), torch.ones_like(more, dtype=torch.bool)], 1)
    length = ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    eager = decoder(model).config._attn_implementation == "eager"

    def mask_of(layer: int) -> Tensor:
        seen = real.clone()
        for first, gone in dropped.items():
            if layer >= first:
                seen[:, : gone.shape[1]] &= ~gone
        mask = (causal & seen[:, None, None, :]) | torch.eye(length, dtype=torch.bool)
        return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min) if eager else mask

    passed = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask", "position_ids")}
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in passed:
            passed[name] = torch.cat([passed[name], passed[name].new_zeros(len(ids), steps)], 1)
    with ExitStack() as undo:
        for at, layer in enumerate(decoder(model).layers):

            def hook(_module: Any, args: Any, kwargs: Any, at: int = at) -> Any:
                return args, {**kwargs, "attention_mask": mask_of(at)}

            undo.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
        return model(
            input_ids=ids, attention_mask=real.long(), position_ids=positions, use_cache=False, **passed
        ).logits
