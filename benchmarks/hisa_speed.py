"""What hierarchical indexing costs beside the flat indexer, by length.

python benchmarks/hisa_speed.py     # some minutes on two idle cores

Random index queries (64 heads of width 128), keys and gates; 64 queries at the end of a prefix, as in one tile of a
prefill, and a single one, as in decoding. Both choose 2,048 keys, in turn; medians. The pooled keys of the prefix lie
in the cache already, as they do in a model; the time to append one key stands beside.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from _lines import Lines, seconds
from torch import Tensor

from tokenmill.attend.hisa import BlockKeys, hisa_select

HEADS, WIDTH, TOP_K, BLOCK = 64, 128, 2048, 128
REPEATS = 20


def flat(q: Tensor, k: Tensor, w: Tensor, rows: int) -> Tensor:
    """The indexer of transformers on the last ``rows`` queries."""
    scores = torch.matmul(q.float(), k.transpose(-1, -2).float().unsqueeze(1)).relu_()
    scores = torch.matmul(w.unsqueeze(-2), scores).squeeze(-2)
    own = torch.arange(k.shape[1] - rows, k.shape[1])[:, None]
    scores = scores.masked_fill(torch.arange(k.shape[1]) > own, -torch.inf)
    return scores.topk(min(TOP_K, k.shape[1]), dim=-1).indices.to(torch.int32)


def case(length: int, rows: int) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    q = torch.randn(1, rows, HEADS, WIDTH, generator=g)
    k = torch.randn(1, length, WIDTH, generator=g)
    w = torch.rand(1, rows, HEADS, generator=g) * HEADS**-0.5 * WIDTH**-0.5
    index = BlockKeys.empty(torch.zeros(1, dtype=torch.long), WIDTH, BLOCK)
    index.append(k)
    ways: dict[str, Callable[[], Any]] = {"flat": lambda: flat(q, k, w, rows)}
    for blocks in (16, 64):
        ways[f"m = {blocks}"] = lambda m=blocks: hisa_select(
            q, k, w, block_size=BLOCK, top_blocks=m, top_k=TOP_K, index=index
        )
    for way in ways.values():
        way()
    took: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(REPEATS if rows == 1 else REPEATS // 4):
        for name, way in ways.items():
            took[name].append(seconds(way))
    ms = {name: 1000 * median(times) for name, times in took.items()}
    scored = {"flat": length} | {f"m = {m}": min(-(-length // BLOCK) + m * BLOCK, length) for m in (16, 64)}
    copy = BlockKeys(index.total.clone(), index.count.clone(), index.first, BLOCK, "mean", length)
    one = torch.randn(1, 1, WIDTH)
    append = 1000 * median(seconds(lambda: copy.append(one)) for _ in range(REPEATS))
    faster = {name: ms["flat"] / value for name, value in ms.items()}
    return {
        "tokens": length, "queries": rows, "ms": ms, "faster": faster, "keys_scored": scored, "append_ms": append
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 32_768, 131_072])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    lines = Lines("hisa-speed", "hisa")
    with torch.inference_mode():
        for rows in (64, 1):
            for length in options.lengths:
                lines.keep("indexer", **case(length, rows))


if __name__ == "__main__":
    main()
