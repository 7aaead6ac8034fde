"""The best of a million tokens: a search index beside the exact product, for Gemma's own hidden states.

python benchmarks/large_vocabulary.py     # a quarter of an hour on two cores, 12 GB

The vocabulary is Gemma's own and, behind it, the runs of up to three words that save most tokens in Python's source and
in the manual pages; their rows come from the trained network where the user's cache has it, else they are means of
pieces. Queries are last hidden states of held-out texts. For each setting of the index: the share of queries
whose first token is the exact one (recall@1), the share of the exact twenty that it finds, and the time of one query at
a time, in turn with the exact product, medians. `--search ivf` measures cells instead of rows in four bits.
"""

from __future__ import annotations

import argparse
import time
from statistics import median
from typing import Any

import torch
from _lines import Lines
from torch import Tensor

from tokenmill import corpora, models
from tokenmill.errors import LimitError, UnsupportedError
from tokenmill.text import DynamicBPE, HyperNetwork, LargeVocabHead, LargeVocabulary, MeanEmbedder

MODEL = "gemma-3-270m"
SETTINGS = {"pq": ("depth", (1024, 4096, 8192)), "ivf": ("nprobe", (16, 32, 64, 128, 256, 512))}
K = 20


def texts(split: str, chars: int) -> list[str]:
    """Source and manual pages; a machine without pages has source alone."""
    found: list[str] = []
    for name in ("python-stdlib", "manual-pages"):
        try:
            records = corpora.load(name).split(split)
        except UnsupportedError:
            continue
        left = chars // 2
        for record in records:
            if left <= 0:
                break
            found.append(record.text)
            left -= len(record.text)
    return found


def embedder_of(model: Any, tokenizer: Any) -> tuple[str, Any]:
    try:
        return "hypernetwork", HyperNetwork.from_pretrained(MODEL, model, tokenizer)
    except LimitError:
        return "mean of pieces", MeanEmbedder(model)


@torch.inference_mode()
def queries(model: Any, tokenizer: Any, count: int) -> Tensor:
    """(count, D) hidden states behind places of held-out texts."""
    found: list[Tensor] = []
    for text in texts("test", 400_000):
        ids = tokenizer(text[:1500], return_tensors="pt")["input_ids"][:, :256]
        states = model.base_model(input_ids=ids).last_hidden_state[0]  # (n, D)
        found.append(states[8::8])
        if sum(map(len, found)) >= count:
            break
    return torch.cat(found)[:count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--search", choices=SETTINGS, default="pq")
    parser.add_argument("--size", type=int, default=1_000_000)
    parser.add_argument("--chars", type=int, default=12_000_000, help="of the texts that the vocabulary comes from")
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--timed", type=int, default=60, help="queries that are timed, one at a time")
    args = parser.parse_args()
    model: Any
    model, tokenizer = models.load(MODEL)
    bpe = DynamicBPE(tokenizer, boundary="word")
    base = model.get_input_embeddings().weight.shape[0]
    began = time.perf_counter()
    vocabulary = LargeVocabulary.from_texts(bpe, texts("train", args.chars), args.size, base=base)
    counted = time.perf_counter() - began
    name, embedder = embedder_of(model, tokenizer)
    began = time.perf_counter()
    head = LargeVocabHead(model, vocabulary, embedder, search=args.search)
    built = time.perf_counter() - began
    lines = Lines(
        "large-vocabulary", "dynamic-tokenization", model=MODEL, tokens=len(vocabulary), rows=name,
        queries=args.queries, seconds={"counting": counted, "rows and index": built},
    )  # fmt: skip
    asked = queries(model, tokenizer, args.queries)
    exact = torch.cat([(part @ head.output.T).topk(K, dim=-1).indices for part in asked.split(50)])
    lines.keep("text", **saved(bpe, vocabulary))
    setting, values = SETTINGS[args.search]
    for value in values:
        setattr(head if setting == "depth" else head.index, setting, value)
        found = torch.cat([head.candidates(part, K)[0] for part in asked.split(50)])
        first = float((found[:, 0] == exact[:, 0]).float().mean())
        shared = float((found[:, :, None] == exact[:, None, :]).any(-1).float().mean())
        ways = {"index": lambda q: head.candidates(q, K), "exact": lambda q: (q @ head.output.T).topk(K, dim=-1)}
        took: dict[str, list[float]] = {way: [] for way in ways}
        for query in asked[: args.timed, None]:
            for way, run in ways.items():
                start = time.perf_counter()
                run(query)
                took[way].append(1000 * (time.perf_counter() - start))
        times = {way: median(found) for way, found in took.items()}
        lines.keep(
            "search", index=args.search, setting=setting, value=value, recall_1=first, recall_20=shared, ms=times,
            faster=times["exact"] / times["index"],
        )  # fmt: skip


def saved(bpe: DynamicBPE, vocabulary: LargeVocabulary) -> dict[str, float]:
    """Tokens of held-out texts with the base vocabulary and with the large one."""
    ids = [[i for unit in units for i in unit] for units in bpe.units(texts("test", 400_000))]
    before, after = sum(map(len, ids)), sum(len(vocabulary.encode(row)) for row in ids)
    return {"base_tokens": before, "large_tokens": after, "cut": 1 - after / before}


if __name__ == "__main__":
    main()
