"""What Token Sparse Attention loses by the share of tokens it keeps, and by which layers take part.

python benchmarks/token_sparsity.py     # about half an hour on one core

Gemma 3 270M on source files of Python's standard library that no asset of the library was trained on: 1,024 tokens of
each, of which the last 64 choose, always stay, and are scored (nats a token). First all three full layers by tau, then
one layer alone: the one with the least drift and the one with the most (drift is measured on another text). Differences
to dense attention are over the same texts; their 95 % intervals come from resampling the texts.
"""

from __future__ import annotations

import argparse
import random
from typing import Any

import torch
from _lines import Lines

import tokenmill as tm
from tokenmill import corpora
from tokenmill.attend.token_sparse_attention import choose_layers, profile_drift

MODEL, WINDOW, TOKENS = "gemma-3-270m", 64, 1024
TAUS = (0.005, 0.05, 0.2, 0.5)


def texts(tokenizer: Any, split: str, count: int, seed: int) -> list[torch.Tensor]:
    """The first tokens of `count` files that are long enough, begin token first; seeds share no file."""
    found = []
    records = sorted(corpora.load("python-stdlib").split(split), key=lambda record: record.id)
    random.Random(7).shuffle(records)
    for record in records:
        ids = tokenizer(record.text[: 8 * TOKENS])["input_ids"][:TOKENS]
        if len(ids) == TOKENS:
            found.append(torch.tensor([ids]))
        if len(found) == count * (seed + 1):
            break
    return found[count * seed :]


@torch.inference_mode()
def nll(model: Any, ids: torch.Tensor) -> float:
    """Nats of each of the last tokens, in the mean; all of them are scored by rows that stay."""
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=WINDOW).logits[0, :-1].float()
    return float(torch.nn.functional.cross_entropy(logits, ids[0, -WINDOW + 1 :]))


def interval(values: list[float]) -> tuple[float, float]:
    """95 % of the means of texts drawn again."""
    rng = random.Random(0)
    means = sorted(sum(rng.choices(values, k=len(values))) / len(values) for _ in range(4000))
    return means[100], means[3899]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--texts", type=int, default=4, help="of each seed")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    lines = Lines("token-sparsity", "token-sparse-attention", model=MODEL)
    model, tokenizer = tm.models.load(MODEL)
    full = tuple(layer for layer, kind in enumerate(model.config.layer_types) if kind == "full_attention")
    drift = profile_drift(model, texts(tokenizer, "train", 1, 0)[0])
    share = 1 / len(full)
    least = choose_layers(drift, share, among=full)
    most = choose_layers(-drift, share, among=full)
    lines.keep("drift", drift={str(layer): float(drift[layer]) for layer in full}, least=least, most=most)
    asked = [ids for seed in range(options.seeds) for ids in texts(tokenizer, "test", options.texts, seed)]
    dense = [nll(model, ids) for ids in asked]
    plans = [("all", full, tau) for tau in TAUS]
    plans += [(name, layers, tau) for tau in TAUS[2:] for name, layers in (("least", least), ("most", most))]
    for name, layers, tau in plans:
        how = tm.attend.TokenSparseAttention(tau=tau, window=WINDOW, min_tokens=64, layers=layers)
        more, density = [], []
        for ids, plain in zip(asked, dense, strict=True):
            with how.attach(model) as trace:
                more.append(nll(model, ids) - plain)
            density.append(trace.density)
        starts = range(0, len(more), options.texts)
        sets = [sum(more[at : at + options.texts]) / options.texts for at in starts]
        lines.keep(
            "loss", layers=name, which=layers, tau=tau, n=len(asked), dense=sum(dense) / len(dense),
            density=sum(density) / len(density), more=sum(more) / len(more), interval=interval(more), by_seed=sets,
        )  # fmt: skip


if __name__ == "__main__":
    main()
