"""Frequency chunks on Gemma 3 270M: how few rank keys, how far two texts agree on them, what attention they keep.

python benchmarks/attention_mass.py     # about two minutes

A ranking is calibrated on four texts (and on one, beside it) at k = 128 and used on others: 2,048 tokens of Python
source, of which the last 64 queries of each full layer choose 128 keys. The mass is the share of dense attention (a
softmax over all keys that the query sees) that lies on the chosen keys, the mean over heads and queries. Beside it:
chunks drawn at random (five draws), the exact top keys, sinks with a window, pages, and hierarchical choice (HISA with
``score_fn="dot"``) beside whole blocks of the same number of keys.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from _lines import Lines
from _listener import Listener
from torch import Tensor

from tokenmill import models
from tokenmill.attend import FCRanking, hisa_select, top_indices
from tokenmill.attend._baselines import page_bound
from tokenmill.attend._frequency import chunk_channels, dominant_keys
from tokenmill.attend._gather import grouped
from tokenmill.attend.fasa import calibrate
from tokenmill.bench.texts import Source, sources

MODEL, LENGTH, QUERIES, KEEP, DRAWS, PAGE, SINKS = "gemma-3-270m", 2048, 64, 128, 5, 16, 8
TIPS = (8, 16, 32, 64)
BLOCKS = ((16, 32), (32, 16), (32, 4))  # tokens of a block, blocks; with 4 of 32 all tokens of the best are read
SEEN = 3  # test texts on which k was chosen among 64, 128 and 256; they are left out


def texts(source: Source, tokenizer: Any, split: str, count: int) -> list[Tensor]:
    """The first tokens of ``count`` texts; short ones (prose) are read one after another."""
    given = [text for _, text in sorted(source.texts[split].items())]
    if max(map(len, given)) < 8 * LENGTH:
        given = ["\n\n".join(given)]
    found = []
    for text in given:
        ids = tokenizer(text[: 12 * LENGTH], return_tensors="pt").input_ids[:, :LENGTH]
        if ids.shape[1] == LENGTH:
            found.append(ids)
        if len(found) == count:
            break
    return found


def mass(query: Tensor, key: Tensor, score: Tensor, scaling: float, *, oracle: bool = False) -> float:
    """The share of attention on the KEEP keys of highest ``score`` (B, H, Q, S); -inf where a query does not see."""
    seen = torch.ones(QUERIES, LENGTH, dtype=torch.bool).tril(LENGTH - QUERIES)
    dense = (grouped(query, key) * scaling).masked_fill(~seen, -torch.inf).softmax(-1)
    chosen = top_indices(dense if oracle else score.masked_fill(~seen, -torch.inf), KEEP)
    return float(dense.gather(-1, chosen).sum(-1).mean())


def by_chunks(query: Tensor, key: Tensor, dims: Tensor) -> Tensor:
    """(B, H, Q, S) scores from the channels dims (H, m)."""
    part = query.gather(-1, dims[None, :, None].expand(1, -1, QUERIES, -1))  # (1, H, Q, m)
    return part @ dominant_keys(key, dims).mT


def by_pages(query: Tensor, key: Tensor) -> Tensor:
    """The bound of its page for each key."""
    pages = key.view(1, key.shape[1], -1, PAGE, key.shape[-1])
    low, high = pages.amin(3), pages.amax(3)
    bounds = [page_bound(query[:, :, i], low, high) for i in range(QUERIES)]
    return torch.stack(bounds, 2).repeat_interleave(PAGE, -1)


def by_blocks(query: Tensor, key: Tensor, size: int, blocks: int) -> Tensor:
    """Ones at the keys that each query head finds in the best blocks of its KV head's keys."""
    heads = query.shape[1]
    rows = key[0].repeat_interleave(heads // key.shape[1], 0)  # (H, S, d)
    found = hisa_select(
        query[0, :, :, None], rows, None, block_size=size, top_blocks=blocks, top_k=KEEP, score_fn="dot"
    )  # (H, Q, KEEP)
    return torch.zeros(1, heads, QUERIES, LENGTH).scatter(-1, found.long()[None], 1.0)


def by_place() -> Tensor:
    """Sinks first, then the newest keys."""
    at = torch.arange(LENGTH, dtype=torch.float32)
    return torch.where(at < SINKS, at + LENGTH, at).expand(1, 1, QUERIES, -1)


def choices(made: dict[str, FCRanking], layer: int, heads: int) -> dict[str, list[Callable[[Tensor, Tensor], Tensor]]]:
    """Ways to score keys, several for those that are drawn."""
    ways: dict[str, list[Callable[[Tensor, Tensor], Tensor]]] = {}
    ranking, single = made["code"], made["one text"]
    at = ranking.layers.index(layer)
    channels = chunk_channels(ranking.layout, ranking.head_dim, ranking.rotary_dim)

    def by(dims: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda q, k: by_chunks(q, k, dims)

    for tip in TIPS:
        ways[f"fasa {tip}"] = [by(ranking.to_dims(tip)[at])]
        ways[f"fasa {tip}, one text"] = [by(single.to_dims(tip)[at])]
        draws = []
        for seed in range(DRAWS):
            g = torch.Generator().manual_seed(seed)
            drawn = torch.stack([torch.randperm(ranking.chunks, generator=g)[:tip] for _ in range(heads)])
            draws.append(by(channels[drawn].flatten(1)))
        ways[f"random {tip}"] = draws
    ways["sinks and window"] = [lambda _q, _k: by_place().expand(1, heads, -1, -1)]
    ways["pages"] = [by_pages]
    for size, blocks in BLOCKS:
        name = "whole blocks" if size * blocks == KEEP else "hisa"
        ways[f"{name}, {blocks} of {size}"] = [partial(by_blocks, size=size, blocks=blocks)]
    return ways


def overlap(one: FCRanking, other: FCRanking, tip: int) -> float:
    """The share of dominant chunks that two rankings have in common, the mean over layers and heads."""
    a, b = one.dominant(tip), other.dominant(tip)
    return float((a[..., None] == b[..., None, :]).any(-1).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--texts", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, tokenizer = models.load(MODEL, dtype="float32", attn="sdpa")
    known = sources("attention_mass", "python-reference,python-stdlib", 1)
    code, prose = known["code"], known["prose"]
    lines = Lines("attention-mass", "fasa", model=MODEL, weights="Q4_K_M dequantised, run in float32")
    with torch.inference_mode():
        made = {
            name: calibrate(model, torch.cat(texts(source, tokenizer, "train", last)[first:]), k=KEEP)
            for name, source, first, last in (
                ("code", code, 0, 4), ("one text", code, 0, 1), ("other code", code, 4, 8), ("prose", prose, 0, 1)
            )
        }  # fmt: skip
        ranking = made["code"]
        for at, layer in enumerate(ranking.layers):
            ca = ranking.ca[0, at]  # (C, H)
            values = {"above_0.4": (ca > 0.4), "above_0.3": (ca > 0.3), "below_0.2": (ca < 0.2)}
            shares = {name: float(which.float().mean()) for name, which in values.items()}
            lines.keep("agreement", layer=layer, chance=KEEP / LENGTH, highest=float(ca.max()), **shares)
        for name in list(made)[1:]:
            for tip in TIPS:
                found = overlap(ranking, made[name], tip)
                lines.keep("overlap", text=name, n_tip=tip, overlap=found, chance=tip / ranking.chunks)
        kept: dict[tuple[str, int], list[float]] = {}
        given = texts(code, tokenizer, "test", SEEN + options.texts)[SEEN:]
        for ids in given:
            listener = Listener()
            with listener.attach(model):
                model(input_ids=ids, logits_to_keep=1)
            for layer, ((query, key, _, scaling),) in listener.heard.items():
                query = query[:, :, -QUERIES:]
                kept.setdefault(("oracle", layer), []).append(mass(query, key, query, scaling, oracle=True))
                for name, ways in choices(made, layer, query.shape[1]).items():
                    values = [mass(query, key, way(query, key), scaling) for way in ways]
                    kept.setdefault((name, layer), []).append(sum(values) / len(values))
    mean = {key: sum(values) / len(values) for key, values in kept.items()}
    for name in dict.fromkeys(name for name, _ in mean):
        by_layer = {str(layer): mean[name, layer] for layer in ranking.layers}
        short = {str(layer): 1 - mean[name, layer] / mean["oracle", layer] for layer in ranking.layers}
        lines.keep(
            "mass", way=name, keys=KEEP, tokens=LENGTH, texts=len(given), by_layer=by_layer, short_of_oracle=short,
            mean=sum(by_layer.values()) / len(by_layer), mean_short=sum(short.values()) / len(short),
        )  # fmt: skip


if __name__ == "__main__":
    main()
