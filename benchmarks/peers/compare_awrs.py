"""AWRS beside genlm-control's, one after the other on the same prompts, predicates, model and machine.

make peers                                   # the peer's environment, once
python benchmarks/peers/compare_awrs.py      # about ten minutes on two cores

Each side runs in a process of its own and does nothing while the other works. Times are of one whole call: prompt,
particles, posterior. The mean weight of many short runs, with its standard error, says whether both sides
estimate the same normaliser.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from _pipe import HERE, Peer

RESULTS = HERE.parent / "results" / "awrs-peer.jsonl"
PREDICATES = ("no_letter_e", "short_words")
PROMPTS = (
    "The capital of France is",
    "My favourite food is",
    "In the morning the old man",
    "The weather in London today is",
    "She opened the door and",
    "A good way to learn music is",
)


class Ours:
    """tokenmill in this process."""

    def __init__(self, about: dict[str, Any], *, packed: bool) -> None:
        import torch

        import tokenmill as tm

        sys.path.insert(0, str(HERE))
        torch.set_num_threads(about["threads"])
        self.torch, self.tm = torch, tm
        self.model, self.tokenizer = tm.models.load("gemma-3-270m", dtype=about["dtype"], packed=packed)

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        import predicates  # pyright: ignore[reportMissingImports]

        constraint = self.tm.decode.predicate(getattr(predicates, request["predicate"]))
        decoder = self.tm.decode.AWRS(
            constraint, self.tokenizer, n_particles=request["n_particles"], seed=request["seed"]
        )
        ids = self.torch.tensor([request["prompt_ids"]])
        start = time.perf_counter()
        # All particles may die, on either side; the posterior is empty then.
        with contextlib.suppress(self.tm.decode.NoValidContinuation):
            self.model.generate(
                ids, attention_mask=self.torch.ones_like(ids), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                max_new_tokens=request["max_tokens"], custom_generate=decoder,
            )  # fmt: skip
        ms = (time.perf_counter() - start) * 1e3
        found, trace = decoder.sequences, decoder.trace
        posterior = {text.hex(): p for text, p in found.posterior().items()}
        return {"ms": ms, "log_ml": found.log_ml, "posterior": posterior, "checks": trace.checks,
                "tokens": trace.particle_tokens}  # fmt: skip


def speed(sides: dict[str, Any], tokenizer: Any, tokens: int, repeats: int, prompts: int) -> list[dict[str, Any]]:
    """Medians of interleaved calls."""
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for predicate in PREDICATES:
        for number, prompt in enumerate(PROMPTS[:prompts]):
            for repeat in range(repeats):
                names = list(sides)
                turn = (number + repeat) % len(names)
                for name in names[turn:] + names[:turn]:
                    request = {"prompt_ids": tokenizer(prompt)["input_ids"], "predicate": predicate, "n_particles": 5,
                               "max_tokens": tokens, "seed": number * 100 + repeat}  # fmt: skip
                    rows.setdefault((predicate, name), []).append(sides[name].ask(request))
    lines = []
    for (predicate, name), found in rows.items():
        lines.append({
            "what": "speed", "predicate": predicate, "side": name, "n": len(found), "n_particles": 5,
            "max_tokens": tokens, "ms_p50": statistics.median(f["ms"] for f in found),
            "ms_per_token_p50": statistics.median(f["ms"] / max(f["tokens"], 1) for f in found),
            "checks_per_token": sum(f["checks"] for f in found) / max(sum(f["tokens"] for f in found), 1),
        })  # fmt: skip
    return lines


def agreement(sides: dict[str, Any], tokenizer: Any, runs: int) -> list[dict[str, Any]]:
    """The mean weight of short texts, which both sides estimate without bias: how much mass satisfies the predicate."""
    weights: dict[str, list[float]] = {name: [] for name in sides}
    ids = tokenizer("The opposite of no is")["input_ids"]
    for seed in range(runs):
        for name, side in sides.items():
            request = {"prompt_ids": ids, "predicate": "short_words", "n_particles": 10, "max_tokens": 3, "seed": seed}
            found = side.ask(request)
            weights[name].append(math.exp(found["log_ml"]))
    lines = []
    for name, one in weights.items():
        lines.append({"what": "mean weight", "side": name, "runs": runs, "value": statistics.fmean(one),
                      "standard_error": statistics.stdev(one) / math.sqrt(runs)})  # fmt: skip
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=len(PROMPTS))
    parser.add_argument("--runs", type=int, default=60)
    args = parser.parse_args()
    from tokenmill.bench.environment import environment

    about: dict[str, Any] = {"dtype": "bfloat16", "threads": 2}
    packed = Ours(about, packed=True)
    plain = Ours(about, packed=False)
    folder = Path(plain.model.config._name_or_path)
    peer = Peer("genlm-control", {**about, "folder": str(folder)})
    sides = {"tokenmill, packed": packed, "tokenmill": plain, "genlm-control": peer}
    warm = {"prompt_ids": plain.tokenizer("Hello")["input_ids"], "predicate": "no_letter_e", "n_particles": 2,
            "max_tokens": 3, "seed": 0}  # fmt: skip
    for side in sides.values():
        side.ask(warm)
    shared = {"schema": 1, "task": "awrs-peer", "model": "gemma-3-270m", "status": "ok", **about,
              "peer": "genlm-control 0.4.1", "cmd": " ".join(["python", *sys.argv]), "env": environment()}  # fmt: skip
    keep(speed(sides, plain.tokenizer, args.tokens, args.repeats, args.prompts), shared)
    keep(agreement({"tokenmill": plain, "genlm-control": peer}, plain.tokenizer, args.runs), shared)
    peer.close()


def keep(lines: list[dict[str, Any]], shared: dict[str, Any]) -> None:
    """Append lines at once: the second part may be interrupted."""
    with RESULTS.open("a", encoding="utf-8") as file:
        for line in lines:
            print(json.dumps(line), flush=True)
            file.write(json.dumps({**line, **shared}) + "\n")


if __name__ == "__main__":
    main()
