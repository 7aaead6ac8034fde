"""Unmasking: rules and cache policies on one masked diffusion model, and its text filling in.

python examples/diffuse.py                          # a small model and its guide, which ship; seconds
python examples/diffuse.py --prompt "sort cab ="    # what else it knows: `tm.corpora.exercises("mixed")`
python examples/diffuse.py --model path             # your own masked diffusion model with its tokenizer, no guide

For each pair of a rule and a policy: passes, places fed, and whether the text is that of one token a pass without a
cache.
"""

from __future__ import annotations

import argparse
from typing import Any

import tokenmill as tm
from tokenmill.diffuse import Diffusion

MODEL = "diffusion-mixed"


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
    return "".join("·" if i == mask else tokenizer.decode([i]) for i in ids)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL, help="a masked diffusion model")
    parser.add_argument("--guide", help="a causal model with the same vocabulary")
    parser.add_argument("--prompt", default="12+34=")
    parser.add_argument("--tokens", type=int, default=12)
    options = parser.parse_args(arguments)
    model, tokenizer = tm.models.load(options.model)
    named = options.guide or (f"{MODEL}-guide-medium" if options.model == MODEL else None)
    guide = None if named is None else tm.models.load(named)[0]
    ids: Any = tokenizer(options.prompt, return_tensors="pt")["input_ids"]
    block = max(options.tokens // 3, 2)
    plain = Diffusion(tm.diffuse.Quota(1)).generate(model, ids, max_new_tokens=options.tokens)[0]
    wanted = tokenizer.decode(plain[ids.shape[1] :], skip_special_tokens=True)
    for name, decoder in pairs(guide, block).items():
        out = decoder.generate(model, ids, max_new_tokens=options.tokens)[0]
        text = tokenizer.decode(out[ids.shape[1] :], skip_special_tokens=True)
        same = "the same text" if text == wanted else f"another text: {text}"
        print(f"{name:26} {decoder.trace.model_calls:3} passes, {decoder.trace.positions:4} places fed, {same}")
    print()
    decoder = Diffusion(tm.diffuse.Threshold(0.3), block_length=block, history=True)
    decoder.generate(model, ids, max_new_tokens=options.tokens)
    for answer in decoder.trace.history:
        print(show(answer[0].tolist(), decoder.trace.mask_id, tokenizer))


if __name__ == "__main__":
    main()
