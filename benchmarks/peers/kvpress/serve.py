"""kvpress behind a pipe: one JSON request a line on standard input, one JSON answer a line.

Request: {"prompt_ids", "follow_ids", "press", "ratio", "window", "kernel", "sinks"}; answer: {"bits", "ms", "kept"}.
The first line names the folder of the model. A press is active in the prefill; what follows is read token by token with
the cache that it left, at the positions of the whole text. Runs in the environment of requirements.txt and imports
nothing of tokenmill.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from contextlib import nullcontext
from typing import Any

import torch
from kvpress import SnapKVPress, StreamingLLMPress  # pyright: ignore[reportAttributeAccessIssue]
from transformers import AutoModelForCausalLM, DynamicCache


def press(request: dict[str, Any]) -> Any:
    """The press of a request, or nothing."""
    if request["press"] == "snapkv":
        return SnapKVPress(request["ratio"], window_size=request["window"], kernel_size=request["kernel"])
    if request["press"] == "streaming":
        return StreamingLLMPress(request["ratio"], n_sink=request["sinks"])
    return None


def answer(model: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Bits of each token that follows, and what a step took."""
    made, cache = press(request), DynamicCache()
    ids = torch.tensor([request["prompt_ids"]])
    with nullcontext() if made is None else made(model):
        logits = model(ids, past_key_values=cache, use_cache=True).logits[:, -1]
    kept, bits, took = cache.get_seq_length(), [], []
    for at, token in enumerate(request["follow_ids"]):
        bits.append(-float(logits.float().log_softmax(-1)[0, token]) / math.log(2))
        place = torch.tensor([[ids.shape[1] + at]])
        start = time.perf_counter()
        logits = model(torch.tensor([[token]]), past_key_values=cache, position_ids=place, use_cache=True).logits[:, -1]
        took.append(1000 * (time.perf_counter() - start))
    return {"bits": bits, "ms": statistics.median(took), "kept": kept}


def main() -> None:
    about = json.loads(sys.stdin.readline())
    torch.set_num_threads(about["threads"])
    model = AutoModelForCausalLM.from_pretrained(about["folder"], dtype=torch.float32, attn_implementation="sdpa")
    model.eval()
    print(json.dumps({"ready": True}), flush=True)
    with torch.inference_mode():
        for line in sys.stdin:
            print(json.dumps(answer(model, json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
