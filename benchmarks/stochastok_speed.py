"""How fast tokens are expanded, beside the paper's loop over a Python list.

python benchmarks/stochastok_speed.py     # some minutes on one core

Each case is expanded in turn by the loop (an attempt at a time: a place, a pair, an insertion) and by StochasTok, with
lists and with arrays, several times; the medians count. The table is built before. A line holds tokens a second of the
original text, the growth, and how many times faster than the loop. Another line holds the time to build the table.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
from _lines import Lines, seconds

from tokenmill import models
from tokenmill.bench.texts import sources
from tokenmill.text import ExpansionTable, StochasTok, TokenBytes

TOKENIZERS = ("python-target", "gemma-3-270m")
CASES = ((512, 2000), (4096, 250), (1_000_000, 1), (512, 1))  # tokens of a row, rows
PS = (0.1, 1.0)
REPEATS = 5
LOOP_SECONDS = 8.0  # the loop gets as many rows as it may do in about this time
MAX_ATTEMPTS = 40_000  # of the loop in one row: an insertion moves the rest of the list


def loop(pairs: list[list[tuple[int, int]]], ids: list[int], p: float, rng: random.Random) -> list[int]:
    """The process as the paper tells it."""
    ids = list(ids)
    for _ in range(int(p * len(ids))):
        at = rng.randrange(len(ids))
        if pairs[ids[at]]:
            ids[at : at + 1] = rng.choice(pairs[ids[at]])
    return ids


def case(table: ExpansionTable, text: np.ndarray, n: int, rows: int, p: float) -> dict[str, Any]:
    """Interleaved medians of one case; what the loop cannot do in time it does on fewer rows."""
    pairs = [table.pairs(i) for i in range(len(table))]
    arrays = [np.take(text, np.arange(i * n, (i + 1) * n), mode="wrap") for i in range(rows)]
    lists = [row.tolist() for row in arrays]
    how = StochasTok(table, p=p, seed=0)
    rng = random.Random(0)
    some = lists[: max(1, min(rows, int(MAX_ATTEMPTS / max(p * n, 1))))]
    ways: dict[str, Callable[[], Any]] = {
        "arrays": lambda: how.expand_batch(arrays),
        "lists": lambda: how.expand_batch(lists),
    }
    if p * n <= MAX_ATTEMPTS * 5:
        ways["loop"] = lambda: [loop(pairs, row, p, rng) for row in some]
    took: dict[str, list[float]] = {name: [] for name in ways}
    for name, way in ways.items():
        if name != "loop":
            way()  # warm
    for _ in range(REPEATS):
        for name, way in ways.items():
            if name != "loop" or sum(took[name]) < LOOP_SECONDS:
                took[name].append(seconds(way))
    rates = {name: n * (len(some) if name == "loop" else rows) / median(times) for name, times in took.items()}
    grown = sum(map(len, how.expand_batch(arrays).input_ids)) / (n * rows) - 1
    found = {"tokens": n, "rows": rows, "p": p, "growth": grown, "tokens_a_second": rates}
    return found | {"against_loop": rates["arrays"] / rates["loop"] if "loop" in rates else None}


def main() -> None:
    lines = Lines("stochastok-speed", "stochastok")
    corpus = sources("stochastok_speed", "python-stdlib", 1)["code"].texts["train"]
    texts = [corpus[name] for name in sorted(corpus)][:600]  # one long string would cost the encoder gigabytes
    for name in TOKENIZERS:
        view = TokenBytes.of(models.load(name)[1])
        table = ExpansionTable.from_tokenizer(view)
        build = median(seconds(lambda v=view: ExpansionTable.from_tokenizer(v)) for _ in range(3))
        facts = {"vocabulary": len(table), "pairs": len(table.left), "splittable": int(table.splittable.sum())}
        lines.keep("table", tokenizer=name, seconds=build, **facts)
        ids = np.array([i for text in texts for i in view.encode(text)], dtype=np.int64)
        for p in PS:
            for n, rows in CASES:
                lines.keep("expand", tokenizer=name, **case(table, ids, n, rows, p))


if __name__ == "__main__":
    main()
