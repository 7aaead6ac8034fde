"""Sparse attention: how well the last 64 tokens of a text are predicted when attention reads a part of the others.

python examples/attend.py                       # the small Python model that ships; seconds
python examples/attend.py --model gemma-3-270m --tokens 2048 --keep 128

For each method: the loss of the last tokens, decoded one by one behind a prefill, the share of the keys that attention
read, and the bytes of keys and values that were read, those for choosing included, against dense attention.
"""

from __future__ import annotations

import argparse
import inspect
import json
from typing import Any

import torch
from torch import Tensor

import tokenmill as tm

LAST = 64


def methods(model: Any, ids: Tensor, keep: int) -> dict[str, Any]:
    """Methods that read about ``keep`` keys; FASA is calibrated on the first half of the text."""
    half = ids[:, : ids.shape[1] // 2]
    ranking = tm.attend.fasa.calibrate(model, half, k=min(keep, half.shape[1] // 2), max_new_tokens=16)
    parts: dict[str, Any] = {"keep": keep // 2, "n_init": keep // 8, "n_local": keep // 2 - keep // 8}
    return {
        "dense": tm.attend.OracleTopK(keep=1.0),
        "oracle": tm.attend.OracleTopK(keep=keep),
        "tokenselect": tm.attend.TokenSelect(**parts, chunk=parts["n_local"]),
        "tokenselect, positions kept": tm.attend.TokenSelect(**parts, chunk=parts["n_local"], positions="original"),
        "fasa": tm.attend.FASA(ranking, keep=keep, n_tip=0.25),
        "token sparse attention": tm.attend.TokenSparseAttention(tau=0.1, window=32, min_tokens=keep),
        "streamingllm": tm.attend.StreamingLLM(keep=keep),
        "snapkv": tm.attend.SnapKV(keep=keep),
        "quest": tm.attend.Quest(keep=keep, dense_layers=0),
    }


@torch.inference_mode()
def loss_of_the_end(model: Any, ids: Tensor) -> float:
    """Mean negative log likelihood of the last tokens, in nats: a prefill, then one by one."""
    out = model(input_ids=ids[:, :-LAST], use_cache=True)
    losses = []
    for at in range(ids.shape[1] - LAST, ids.shape[1]):
        losses.append(torch.nn.functional.cross_entropy(out.logits[:, -1].float(), ids[:, at]))
        out = model(input_ids=ids[:, at : at + 1], past_key_values=out.past_key_values)
    return float(torch.stack(losses).mean())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="python-target")
    parser.add_argument("--tokens", type=int, default=448, help="of the text")
    parser.add_argument("--keep", type=int, default=64, help="keys that a query reads")
    options = parser.parse_args(arguments)
    loaded: Any = tm.models.load(options.model, dtype="float32")
    model, tokenizer = loaded
    ids = tokenizer(inspect.getsource(json.decoder), return_tensors="pt").input_ids[:, : options.tokens]
    whole = None
    for name, method in methods(model, ids, options.keep).items():
        with method.attach(model) as trace:
            loss = loss_of_the_end(model, ids)
        whole = whole or trace.bytes_read
        print(
            f"{name:28} loss {loss:.3f}, {trace.density:4.0%} of the keys, {trace.bytes_read / whole:4.0%} of the bytes"
        )


if __name__ == "__main__":
    main()
