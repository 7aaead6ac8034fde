"""Recall beyond the trained length: dense attention, and TokenSelect with contiguous and with original positions.

python benchmarks/recall_beyond.py     # about twenty minutes on one core

The model `recall` was trained on at most 512 tokens. Haystacks of names of up to 4,096 tokens end with a question for
one value, or for the end of a thread; an answer counts when the likeliest next token is the value. `ntk` is dense
attention whose rotary base is raised by the factor by which the text exceeds the trained length. The haystack is read
first, in chunks of 64 tokens that choose together, then the question token by token, as in decoding: in a chunk that
joins the one token that asks with sixty others, the mean query is theirs.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from _lines import Lines

import tokenmill as tm
from tokenmill.models._catalog import ASSETS, info
from tokenmill.probe._scores import wilson
from tokenmill.probe.needle_threading import generate

MODEL = "recall"
SETS: dict[str, Any] = {"keep": 64, "n_init": 16, "n_local": 64, "chunk": 64, "theta": None}


def ways(model: Any) -> Iterator[tuple[str, Any]]:
    """What is compared: a name, and what is attached to the model."""
    yield "dense", nullcontext
    for positions in ("contiguous", "original"):
        method = tm.attend.TokenSelect(**SETS, positions=positions)  # pyright: ignore[reportArgumentType]
        yield f"tokenselect, {positions}", partial(method.attach, model)
    streaming = tm.attend.StreamingLLM(keep=SETS["n_init"] + SETS["keep"] + SETS["n_local"], n_sink=SETS["n_init"])
    yield "streaming", partial(streaming.attach, model)


def stretched(factor: float) -> Any:
    """The model with its rotary base raised (NTK) so that the slowest frequency spans `factor` times the length."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(ASSETS / MODEL)
    width = config.hidden_size // config.num_attention_heads
    config.rope_parameters["rope_theta"] *= factor ** (width / (width - 2))
    return AutoModelForCausalLM.from_pretrained(ASSETS / MODEL, config=config, dtype=torch.float32).eval()


@torch.inference_mode()
def right(model: Any, tokenizer: Any, examples: list[Any], attach: Any) -> int:
    found = 0
    for example in examples:
        ids = torch.tensor([tokenizer(example.prompt)["input_ids"]])
        end = int((ids[0] == tokenizer.convert_tokens_to_ids(",")).nonzero()[-1]) + 1
        inside: AbstractContextManager[Any] = attach()
        with inside:
            out = model(input_ids=ids[:, :end], use_cache=True, logits_to_keep=1)
            for at in range(end, ids.shape[1]):
                out = model(input_ids=ids[:, at : at + 1], past_key_values=out.past_key_values, use_cache=True)
        found += int(out.logits[0, -1].argmax()) == tokenizer.convert_tokens_to_ids(example.values[0])
    return found


def questions(steps: int, tokens: int, count: int) -> list[Any]:
    """One question a haystack; single values lie at depths that are spread over it."""
    about: dict[str, Any] = {"n_pairs": (tokens - 5) // 3, "keys": "name"}
    if steps == 1:
        return [
            generate("single", seed=2_000_000 + at, depth=100 * at / max(count - 1, 1), **about) for at in range(count)
        ]
    more = {"thread_length": steps, "direction": "random"}
    return [generate("threading", seed=2_000_000 + at, **more, **about) for at in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--count", type=int, default=200, help="questions of each length; fewer beyond 1,024 tokens")
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096])
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    trained = info(MODEL)["trained_tokens"]
    lines = Lines("recall-beyond", "tokenselect", model=MODEL, settings=SETS)
    model, tokenizer = tm.models.load(MODEL)
    for steps in options.steps:
        for tokens in options.lengths:
            asked = questions(steps, tokens, max(4, options.count * 1024 // max(1024, tokens)))
            found = {name: right(model, tokenizer, asked, attach) for name, attach in ways(model)}
            if tokens > trained:
                found["ntk"] = right(stretched(tokens / trained), tokenizer, asked, nullcontext)
            for name, count in found.items():
                share, n = count / len(asked), len(asked)
                lines.keep(
                    "recall", way=name, steps=steps, tokens=tokens, n=n, accuracy=share, interval=wilson(share, n)
                )


if __name__ == "__main__":
    main()
