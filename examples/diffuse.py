"""Unmasking: rules and cache policies on one masked diffusion model, and its text filling in.

python examples/diffuse.py                              # a random model of 64 ids; seconds
python examples/diffuse.py --model path --prompt "12+34="   # a masked diffusion model and its tokenizer

For each pair of a rule and a policy: passes, places fed, and how many tokens are those of one token a pass without a
cache. A random model agrees with nobody; the counts are what it shows.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

import tokenmill as tm
from tokenmill.diffuse import Diffusion


def pairs(guide: Any, block: int) -> dict[str, Diffusion]:
    window = tm.diffuse.WindowDiffusion(external_window=2 * block, internal_window=block // 2, refresh_cycle=block)
    rules: dict[str, Any] = {
        "one a pass": tm.diffuse.Quota(1),
        "threshold 0.9": tm.diffuse.Threshold(0.9),
        "factor 1": tm.diffuse.Factor(1.0),
    }
    caches: dict[str, Any] = {
        "none": tm.diffuse.NoCache(),
        "dual": tm.diffuse.DualCache(),
        "freecache": tm.diffuse.FreeCache(block_size=block),
        "window": window.cache,
    }
    made = {
        f"{rule}, {cache}": Diffusion(rules[rule], caches[cache], block_length=block)
        for rule in rules
        for cache in caches
    }
    if guide is not None:
        made["guided, none"] = Diffusion(tm.diffuse.GuidedRule(guide, acceptance="topk"))
        made["guided, freecache"] = Diffusion(
            tm.diffuse.GuidedRule(guide, acceptance="topk"), tm.diffuse.FreeCache(block_size=block)
        )
    return made


def show(ids: list[int], mask: int, tokenizer: Any) -> str:
    if tokenizer is None:
        return " ".join("··" if i == mask else f"{i:2}" for i in ids)
    return "".join("·" if i == mask else tokenizer.decode([i]) for i in ids)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a masked diffusion model; none: a random one")
    parser.add_argument("--guide", help="a causal model with the same vocabulary")
    parser.add_argument("--prompt", default="12+34=")
    parser.add_argument("--tokens", type=int, default=24)
    options = parser.parse_args(arguments)
    if options.model is None:
        model: Any = tm.models.tiny("llama", bidirectional=True)
        tokenizer, guide = None, tm.models.tiny("llama", seed=1)
        ids = torch.randint(1, 63, (1, 12), generator=torch.Generator().manual_seed(0))
    else:
        model, tokenizer = tm.models.load(options.model)
        guide = None if options.guide is None else tm.models.load(options.guide)[0]
        ids = tokenizer(options.prompt, return_tensors="pt")["input_ids"]
    block = max(options.tokens // 3, 2)
    plain = Diffusion(tm.diffuse.Quota(1)).generate(model, ids, max_new_tokens=options.tokens)[0]
    for name, decoder in pairs(guide, block).items():
        out = decoder.generate(model, ids, max_new_tokens=options.tokens)[0]
        trace = decoder.trace
        length = min(len(out), len(plain)) - ids.shape[1]
        same = int((out[-length:] == plain[-length:]).sum()) if len(out) == len(plain) else 0
        print(f"{name:26} {trace.model_calls:3} passes, {trace.positions:4} places fed, {same:2} tokens as plain")
    print()
    decoder = Diffusion(tm.diffuse.Threshold(0.3), block_length=block, history=True)
    decoder.generate(model, ids, max_new_tokens=options.tokens)
    for answer in decoder.trace.history:
        print(show(answer[0].tolist(), decoder.trace.mask_id, tokenizer))


if __name__ == "__main__":
    main()
