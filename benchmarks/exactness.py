"""Greedy Token Recycling against plain generate, token for token, on prompts of 16 to 1,500 tokens.

python benchmarks/exactness.py                      # 40 prompts in float32, about a quarter of an hour on two cores
python benchmarks/exactness.py --dtype bfloat16     # how often rounding flips a near-tie there
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch

import tokenmill as tm
from tokenmill.bench.environment import environment
from tokenmill.decode import TokenRecycling

RESULTS = Path(__file__).parent / "results" / "exactness.jsonl"
KINDS = {"python-stdlib": "code", "python-reference": "prose", "stdlib-json": "json"}
VARIANTS = {
    "80 nodes, cold": {},
    "auto, cold": {"tree": "auto"},
    "auto, hybrid, prompt warm-up": {"tree": "auto", "draft": "hybrid", "warm_up_from_prompt": True},
}


def prompts(tokenizer, count: int) -> list[tuple[str, torch.Tensor]]:
    """`count` prompts whose lengths run from 16 to 1,500 tokens, geometrically, kinds in turn."""
    lengths = torch.logspace(torch.log10(torch.tensor(16.0)), torch.log10(torch.tensor(1500.0)), count).round().int()
    lengths[-1] = 1500
    pools = {name: iter(tm.corpora.load(name).split("test")) for name in KINDS}
    found = []
    for i, length in enumerate(lengths.tolist()):
        for record in pools[list(KINDS)[i % len(KINDS)]]:
            ids = tokenizer(record.text, return_tensors="pt").input_ids
            if ids.shape[1] >= length + 24:
                found.append((record.id, ids[:, :length]))
                break
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gemma-3-270m")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--new-tokens", type=int, default=24)
    args = parser.parse_args()
    model, tokenizer = tm.models.load(args.model, dtype=args.dtype)
    items = prompts(tokenizer, args.prompts)
    began = time.time()
    plain = [model.generate(ids, do_sample=False, max_new_tokens=args.new_tokens) for _, ids in items]
    for name, settings in VARIANTS.items():
        decoder, differ, steps = TokenRecycling(**settings), [], []
        for (record, ids), expected in zip(items, plain, strict=True):
            out = model.generate(
                ids, do_sample=False, max_new_tokens=args.new_tokens, custom_generate=decoder, token_streamer=None
            )
            steps += decoder.trace.steps
            if not torch.equal(out, expected):
                differ.append({"record": record, "prompt_tokens": ids.shape[1]})
        line = {
            "schema": 1,
            "task": "exactness",
            "model": args.model,
            "dtype": args.dtype,
            "method": "token-recycling",
            "variant": name,
            "params": settings,
            "n": len(items),
            "prompt_tokens": [ids.shape[1] for _, ids in items],
            "new_tokens": args.new_tokens,
            "status": "ok",
            "quality": {"identical": 1 - len(differ) / len(items)},
            "differ": differ,
            "tokens_per_call": sum(steps) / len(steps),
            "seconds": round(time.time() - began, 1),
            "cmd": "python benchmarks/exactness.py " + " ".join(sys.argv[1:]),
            "env": environment(),
        }
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{name}: {len(items) - len(differ)} of {len(items)} prompts identical", flush=True)


if __name__ == "__main__":
    main()
