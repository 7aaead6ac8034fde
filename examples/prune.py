"""Visual token pruning: all eight methods on one picture and one question.

python examples/prune.py --model runs/vlm/digits-llava     # a model that recipes/digits_vlm.py trained; half a minute

For each method: the answer, the visual tokens that the decoder's layers see in the mean, and operations of the prefill
against the untouched model's.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

import tokenmill as tm
from tokenmill.hf.layout import decoder
from tokenmill.hf.vision import visual_mask

KEEP = 0.25


def methods() -> dict[str, Any]:
    return {
        "everything": tm.prune.VisualPruner(),
        "divprune": tm.prune.DivPrune(keep=KEEP),
        "idpruner (by norms)": tm.prune.IDPruner(keep=KEEP, importance="norm"),
        "zoo-prune": tm.prune.ZOOPrune(keep=KEEP),
        "entropyprune": tm.prune.EntropyPrune(keep=KEEP, layer=2),
        "information-horizon": tm.prune.InformationHorizon(keep=KEEP),
        "todre": tm.prune.ToDRE(keep=KEEP),
        "vflowopt": tm.prune.VFlowOpt(keep=KEEP),
        "correlation-guided": tm.prune.TokenCorrelationCompressor(max_tokens=16),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="digits-llava")
    options = parser.parse_args(arguments)
    loaded: Any = tm.models.load(options.model)
    model, processor = loaded
    (picture,) = tm.corpora.digit_scenes("test", 1, seed=7)
    question = picture.questions[0]
    print(f"{question.text}  ({question.answer})")
    inputs = processor(processor.prompt(question.text), [picture.pixels])
    text = int((~visual_mask(model, inputs["input_ids"])).sum())
    depth = len(decoder(model).layers)
    full = tm.prune.prefill_flops(model, inputs["input_ids"].shape[1])
    for name, method in methods().items():
        with torch.inference_mode():
            pruned = method.prepare(model, inputs)
            with method.attach(model, pruned) as trace:
                out = model.generate(**pruned, max_new_tokens=2, do_sample=False)
        start = pruned["input_ids"].shape[1]
        lengths = trace.shortening.lengths or [start] * depth
        seen = sum(lengths) / depth - text
        share = tm.prune.prefill_flops(model, lengths) / full
        print(f"  {name:22} {processor.decode(out[0, start:]):12} {seen:5.1f} visual tokens, {share:4.0%} of the work")


if __name__ == "__main__":
    main()
