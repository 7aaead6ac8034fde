"""What windows and frozen prefixes save in time: a masked diffusion model with random weights, 12 layers of width 512.

python benchmarks/diffusion_speed.py     # about a quarter of an hour on two idle cores

Windows: texts of 512, 1,024 and 2,048 places of which 64 are prompt and 64 are revealed. One phase (a refresh and 31
passes) with refreshes over the window and over everything, and a pass over everything, in turn; medians of the mean
time a pass. Beside it the mean over a whole answer, decoded once. What a pass feeds is counted beside each time.

Prefixes: a prompt of 512 tokens and an answer of 64, one token a pass; without a cache and with each policy, in turn.
"""

from __future__ import annotations

import argparse
import time
from contextlib import suppress
from statistics import median
from typing import Any

import torch
from _lines import Lines, seconds
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tokenmill.diffuse import Diffusion, FreeCache, PrefixCache, Quota, Snapshot, WindowDiffusion

VOCAB = 1024
MASK = VOCAB - 1
PROMPT, REVEALED = 64, 64
CYCLE = 32
FULL_PASSES = 3


class EnoughError(Exception):
    """Raised by a watcher when the passes that are wanted have been made."""


class Clock:
    """A watcher that notes when passes end and stops after ``passes`` of them."""

    def __init__(self, passes: int) -> None:
        self.passes = passes
        self.ends = [time.perf_counter()]

    def __call__(self, _: Snapshot) -> None:
        self.ends.append(time.perf_counter())
        if len(self.ends) > self.passes:
            raise EnoughError

    @property
    def ms(self) -> list[float]:
        """Milliseconds of each pass."""
        return [1000 * (b - a) for a, b in zip(self.ends[:-1], self.ends[1:], strict=True)]


def model_of(layers: int, width: int) -> Any:
    flags: dict[str, Any] = {"is_causal": False, "mask_token_id": MASK, "pad_token_id": 0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=8,
            num_key_value_heads=8,
            max_position_embeddings=4096,
            bos_token_id=None,
            eos_token_id=None,
            **flags,
        )
        return LlamaForCausalLM(config).eval()


def tokens(length: int) -> Tensor:
    return torch.randint(1, MASK, (1, length), generator=torch.Generator().manual_seed(1))


def window(far_field: bool, external: int, internal: int) -> WindowDiffusion:
    return WindowDiffusion(external_window=external, internal_window=internal, refresh_cycle=CYCLE, far_field=far_field)


def passes(model: Any, decoder_of: Any, size: int, count: int) -> tuple[list[float], float]:
    """Milliseconds of ``count`` passes from 64 revealed tokens on, and the places that a pass feeds in the mean."""
    clock = Clock(count)
    decoder: Diffusion = decoder_of(watch=clock)
    clock.ends = [time.perf_counter()]
    with suppress(EnoughError):
        decoder.generate(model, tokens(PROMPT + REVEALED), max_new_tokens=size - PROMPT - REVEALED)
    return clock.ms, decoder.trace.positions / len(clock.ms)


def windows(model: Any, lines: Lines, options: argparse.Namespace) -> None:
    sizes: list[int] = options.sizes
    pruned = window(False, options.external, options.internal)
    ways: dict[str, tuple[Any, int]] = {
        "pruned": (pruned.decoder, CYCLE),
        "far field": (window(True, options.external, options.internal).decoder, CYCLE),
        "full": (lambda **s: Diffusion(Quota(1), **s), FULL_PASSES),
    }
    took: dict[tuple[str, int], list[list[float]]] = {}
    fed: dict[tuple[str, int], float] = {}
    for repeat in range(options.repeats + 1):
        for size in sizes:
            for name, (decoder_of, count) in ways.items():
                ms, fed[name, size] = passes(model, decoder_of, size, count)
                if repeat:  # the first round warms up
                    took.setdefault((name, size), []).append(ms)
    for name in ways:
        mean = {size: median(sum(ms) / len(ms) for ms in took[name, size]) for size in sizes}
        lines.keep(
            "pass",
            way=name,
            ms=mean,
            first_ms={size: median(ms[0] for ms in took[name, size]) for size in sizes},
            other_ms={size: median(median(ms[1:]) for ms in took[name, size]) for size in sizes},
            positions={size: fed[name, size] for size in sizes},
            longest_to_shortest=mean[sizes[-1]] / mean[sizes[0]],
        )
    full = {size: median(sum(ms) / len(ms) for ms in took["full", size]) for size in sizes}
    for size in options.whole:
        decoder = pruned.decoder()
        answer = size - PROMPT
        ms = 1000 * seconds(lambda d=decoder, a=answer: d.generate(model, tokens(PROMPT), max_new_tokens=a)) / answer
        lines.keep(
            "whole answer",
            size=size,
            ms=ms,
            positions=decoder.trace.positions / answer,
            full_ms=full.get(size),
            faster=full[size] / ms if size in full else None,
        )


def prefixes(model: Any, lines: Lines, options: argparse.Namespace) -> None:
    caches: dict[str, Any] = {
        "none": None,
        "prefix": PrefixCache(),
        "freecache block": FreeCache(block_size=32),
        "freecache aggressive": FreeCache(policy="aggressive"),
        "freecache sliding": FreeCache(policy="sliding", window=128),
    }
    prompt = tokens(options.prompt)
    took: dict[str, list[float]] = {name: [] for name in caches}
    fed: dict[str, float] = {}
    for repeat in range(options.repeats + 1):
        new = options.answer if repeat else 4  # the first round warms up
        for name, cache in caches.items():
            # Blocks of 32 keep the text growing from left to right for every policy.
            decoder = Diffusion(Quota(1), cache, block_length=32)
            took[name].append(seconds(lambda d=decoder, n=new: d.generate(model, prompt, max_new_tokens=n)))
            fed[name] = decoder.trace.positions / decoder.trace.model_calls
    for name, times in took.items():
        ratios = [plain / own for plain, own in zip(took["none"][1:], times[1:], strict=True)]
        lines.keep(
            "prefix",
            cache=name,
            prompt=options.prompt,
            answer=options.answer,
            ms=1000 * median(times[1:]) / options.answer,
            positions=fed[name],
            faster=median(ratios),
            worst=min(ratios),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--whole", type=int, nargs="*", default=[512, 1024, 2048])
    parser.add_argument("--external", type=int, default=64)
    parser.add_argument("--internal", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--answer", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = model_of(options.layers, options.width)
    shape = {"layers": options.layers, "width": options.width}
    windows(model, Lines("diffusion-speed", "window-diffusion", **shape), options)
    prefixes(model, Lines("diffusion-speed", "freecache-guided-diffusion", **shape), options)


if __name__ == "__main__":
    main()
