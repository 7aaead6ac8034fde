"""StreamingLLM and SnapKV beside kvpress's, in turn on the same prompts, model and machine.

make peers                                     # the peer's environment, once
python benchmarks/peers/compare_kvpress.py     # about three minutes on two idle cores

The model is the small one of Python source that ships; 448 tokens are the prompt, and the next 48 are read token by
token with what a method left of it. kvpress takes keys out of the cache after the prefill, ours does not read them, so
its memory shrinks and ours does not. SnapKV chooses alike on both sides. kvpress's StreamingLLM leaves the prompt's own
attention dense and never lets a later token go; ours reads sinks and a moving window everywhere, which is the paper's.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from contextlib import nullcontext
from typing import Any

import torch
from _pipe import HERE, Peer

sys.path.insert(0, str(HERE.parent))

from _lines import Lines

from tokenmill import attend, models
from tokenmill.bench.texts import sources

MODEL, PROMPT, FOLLOW = "python-target", 448, 48
WINDOW, KERNEL, SINKS = 32, 5, 4


def ours(model: Any, request: dict[str, Any]) -> dict[str, Any]:
    """The same answer as the peer's, from this process."""
    keep = max(1, round(PROMPT * (1 - request["ratio"])))
    method = {
        "none": lambda: None,
        "snapkv": lambda: attend.SnapKV(keep=keep, window=WINDOW, pool=KERNEL),
        "streaming": lambda: attend.StreamingLLM(keep=keep, n_sink=SINKS, positions="original"),
    }[request["press"]]()
    ids, bits, took = torch.tensor([request["prompt_ids"]]), [], []
    with nullcontext() if method is None else method.attach(model):
        out = model(ids, use_cache=True)
        for token in request["follow_ids"]:
            bits.append(-float(out.logits[0, -1].float().log_softmax(-1)[token]) / math.log(2))
            start = time.perf_counter()
            out = model(torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True)
            took.append(1000 * (time.perf_counter() - start))
    return {"bits": bits, "ms": statistics.median(took), "kept": PROMPT if method is None else keep}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=40)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, tokenizer = models.load(MODEL, dtype="float32", attn="sdpa")
    texts = [text for _, text in sorted(sources("compare_kvpress", "python-stdlib", 1)["code"].texts["test"].items())]
    given = [tokenizer(text[:8000], add_special_tokens=False)["input_ids"] for text in texts]
    given = [ids[: PROMPT + FOLLOW] for ids in given if len(ids) >= PROMPT + FOLLOW][: options.prompts]
    peer = Peer("kvpress", {"folder": str(model.config._name_or_path), "threads": options.threads})
    lines = Lines("kvpress-peer", "baselines", model=MODEL, peer="kvpress 0.5.5, transformers 5.2.0")
    settings = [("none", 0.0), *((press, ratio) for press in ("streaming", "snapkv") for ratio in (0.5, 0.75))]
    with torch.inference_mode():
        for press, ratio in settings:
            found: dict[str, list[dict[str, Any]]] = {"kvpress": [], "tokenmill": []}
            for ids in given:
                request = {
                    "prompt_ids": ids[:PROMPT], "follow_ids": ids[PROMPT:], "press": press, "ratio": ratio,
                    "window": WINDOW, "kernel": KERNEL, "sinks": SINKS,
                }  # fmt: skip
                found["kvpress"].append(peer.ask(request))
                found["tokenmill"].append(ours(model, request))
            pairs = zip(found["kvpress"], found["tokenmill"], strict=True)
            apart = [statistics.fmean(b["bits"]) - statistics.fmean(a["bits"]) for a, b in pairs]
            for side, answers in found.items():
                lines.keep(
                    "read on", side=side, press=press, ratio=ratio, prompts=len(answers),
                    bits=statistics.fmean(statistics.fmean(a["bits"]) for a in answers),
                    ms_p50=statistics.median(a["ms"] for a in answers),
                    kept=answers[0]["kept"], bits_above_peer=statistics.fmean(apart) if side == "tokenmill" else 0.0,
                    worst_apart=max(map(abs, apart)),
                )  # fmt: skip
    peer.close()


if __name__ == "__main__":
    main()
