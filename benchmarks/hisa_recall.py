"""Recall on a model with a trained indexer: DSA, HISA in its place, and whole blocks by pooled score, equal budgets.

python benchmarks/hisa_recall.py     # about half an hour on one core

The model `recall-dsa` has the classes of DeepSeek-V3.2; its indexer chooses 32 keys a query and was trained on 512
tokens. HISA scores a quarter of the blocks (compression 4). `blocks` reads whole blocks for the same 32 keys: the
query's own block, and the others by their pooled score alone. One question a haystack; an answer counts when the
likeliest next token is the value. The keys of every query of the prompt are chosen by the method, in both layers.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import Any

import torch
from _lines import Lines
from recall_beyond import questions
from torch import Tensor, nn

import tokenmill as tm
from tokenmill.attend._block_index import BlockKeys, gated
from tokenmill.hf.indexer import index_layers, index_parts
from tokenmill.probe._scores import wilson

MODEL = "recall-dsa"


class WholeBlocks(nn.Module):
    """In an indexer's place: its budget in whole blocks, the own one and the best others by pooled score."""

    def __init__(self, indexer: Any, size: int) -> None:
        super().__init__()
        self.indexer, self.size = indexer, size

    def forward(self, hidden: Tensor, q_resid: Tensor, phases: Any, *_: Any, **__: Any) -> Tensor:
        q, k, w = index_parts(self.indexer, hidden, q_resid, phases)
        batch, length = k.shape[:2]
        index = BlockKeys.empty(torch.zeros(batch, dtype=torch.long), k.shape[-1], self.size)
        index.append(k)
        scores = gated(q, index.keys, w, "dsa")  # (B, S, M)
        own = torch.arange(length) // self.size
        blocks = torch.arange(scores.shape[-1])
        scores = scores.masked_fill(blocks > own[:, None], -torch.inf).masked_fill(blocks == own[:, None], torch.inf)
        count = min(self.indexer.index_topk // self.size, scores.shape[-1])
        at = scores.topk(count, dim=-1).indices[..., None] * self.size + torch.arange(self.size)
        return at.flatten(2).clamp_max(length - 1).to(torch.int32)


def swapped(model: Any, size: int) -> ExitStack:
    """Whole blocks in place of every indexer, until the stack is closed."""
    undo = ExitStack()
    for attention, indexer in index_layers("hisa_recall", model):
        undo.callback(setattr, attention, "indexer", indexer)
        attention.indexer = WholeBlocks(indexer, size)  # pyright: ignore[reportAttributeAccessIssue]
    return undo


def everything(model: Any) -> ExitStack:
    """Dense attention: indexers that choose every key."""
    undo = ExitStack()
    indexers: list[Any] = [indexer for _, indexer in index_layers("hisa_recall", model)]
    for indexer in indexers:
        undo.callback(setattr, indexer, "index_topk", indexer.index_topk)
        indexer.index_topk = 1 << 20
    return undo


def ways(model: Any, sizes: list[int]) -> Iterator[tuple[str, Any]]:
    yield "dense", partial(everything, model)
    yield "dsa", nullcontext
    for size in sizes:
        yield f"hisa, B = {size}", partial(tm.attend.HISA(block_size=size, compression=4).attach, model)
        yield f"blocks, B = {size}", partial(swapped, model, size)


@torch.inference_mode()
def right(model: Any, ids: Tensor, wanted: Tensor, attach: Any, rows: int = 10) -> int:
    found = 0
    inside: AbstractContextManager[Any] = attach()
    with inside:
        for part, answers in zip(ids.split(rows), wanted.split(rows), strict=True):
            said = model(input_ids=part, use_cache=False, logits_to_keep=1).logits[:, -1].argmax(-1)
            found += int((said == answers).sum())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512])
    parser.add_argument("--sizes", type=int, nargs="+", default=[16, 8])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    lines = Lines("hisa-recall", "hisa", model=MODEL)
    model, tokenizer = tm.models.load(MODEL)
    for tokens in options.lengths:
        asked = questions(1, tokens, options.count)
        ids = torch.tensor([tokenizer(example.prompt)["input_ids"] for example in asked])
        wanted = torch.tensor([tokenizer.convert_tokens_to_ids(example.values[0]) for example in asked])
        for name, attach in ways(model, options.sizes):
            share = right(model, ids, wanted, attach) / len(asked)
            lines.keep(
                "recall", way=name, tokens=ids.shape[1], n=len(asked), accuracy=share,
                interval=wilson(share, len(asked)),
            )  # fmt: skip


if __name__ == "__main__":
    main()
