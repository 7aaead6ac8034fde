"""The seam to transformers: the only package that knows its internals. Names load on first use."""

from __future__ import annotations

from tokenmill.catalog import lazy

__getattr__, __dir__ = lazy(
    __name__,
    {
        "Call": "attention",
        "attached": "attention",
        "register": "attention",
        "visible": "backends",
        "AttentionShape": "layout",
        "attention_layers": "layout",
        "attention_shape": "layout",
        "decoder": "layout",
        "layer_types": "layout",
        "sliding_window": "layout",
        "text_config": "layout",
        "IndexedCache": "indexed",
        "IndexedLayer": "indexed",
        "Follower": "layers",
        "StatefulLayer": "layers",
        "StatefulSlidingLayer": "layers",
        "stateful_cache": "layers",
        "token_state": "layers",
        "check_cache": "cache",
        "keep_rows": "cache",
        "record_past": "cache",
        "recording": "cache",
        "last_hidden": "hidden",
        "as_form": "masks",
        "layer_kinds": "masks",
        "mask_form": "masks",
        "tree_masks": "masks",
        "Rotary": "rotary",
        "layer_rotary": "rotary",
        "last_position": "positions",
        "next_positions": "positions",
        "ModelInputs": "inputs",
        "grow": "inputs",
        "prefill_inputs": "inputs",
        "split_model_kwargs": "inputs",
        "step_inputs": "inputs",
        "with_positions": "inputs",
    },
)
