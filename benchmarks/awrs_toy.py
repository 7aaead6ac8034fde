"""How fast AWRS's particles approach the exact posterior, on a toy whose every text can be listed.

python benchmarks/awrs_toy.py     # a few minutes on one core

The model has two letters and an end token; its favourite first letter leads into a branch that the constraint nearly
closes. Masked sampling (LCD) walks into it as often as the model would. For each number of particles, the line holds
KL(estimate || posterior), where the estimate is the weighted distribution over the texts of one run (a mean over runs),
and for LCD the same with equal weights, and that of its exact law. Another line compares the mean weight of 10,000
runs with the normaliser.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from itertools import product
from pathlib import Path

import torch

from tokenmill.bench.environment import environment
from tokenmill.decode import WeightedSequences, smc
from tokenmill.text import TokenBytes

RESULTS = Path(__file__).parent / "results" / "awrs-toy.jsonl"
LETTERS, END, MOST = TokenBytes.from_list([b"a", b"b", None], {"<end>": 2}), 2, 5
STRINGS = {b"abb", b"aabb", b"b", b"ba", b"bb", b"bab", b"abab"}
PREFIXES = {s[:i] for s in STRINGS for i in range(len(s) + 1)}
RUNS = {1: 2000, 4: 1000, 16: 400, 64: 200}
UNBIASED_RUNS = 10_000


def law(text: bytes) -> torch.Tensor:
    """The model's probabilities of a, b and the end."""
    if text.startswith(b"a"):
        return torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    return torch.tensor([0.6, 0.3, 0.1] if not text else [0.3, 0.3, 0.4], dtype=torch.float64)


class Table:
    """The model as a batch of texts."""

    texts: list[bytes]

    def start(self, n: int) -> torch.Tensor:
        self.texts = [b""] * n
        return self._rows()

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        self.texts = [t + (LETTERS[i] or b"") for t, i in zip(self.texts, tokens.tolist(), strict=True)]
        return self._rows()

    def select(self, rows: torch.Tensor) -> None:
        self.texts = [self.texts[i] for i in rows.tolist()]

    def _rows(self) -> torch.Tensor:
        return torch.stack([law(t).log() for t in self.texts])


class Language:
    """The constraint, with dead ends: prefixes that lead nowhere count as possible up to three letters."""

    def prefix(self, context: bytes) -> float:
        return 0.0 if context in PREFIXES or (len(context) < 4 and context.startswith(b"aa")) else -math.inf

    def complete(self, context: bytes) -> float:
        return 0.0 if context in STRINGS else -math.inf


def probability(text: bytes) -> float:
    """Of a whole text under the model."""
    p = float(law(text)[END])
    for at in range(len(text)):
        p *= float(law(text[:at])[text[at] - ord("a")])
    return p


def masked() -> dict[bytes, float]:
    """The exact law of masked sampling, over the texts that it finishes."""
    constraint, found = Language(), {}
    for length in range(MOST):
        for letters in product(b"ab", repeat=length):
            text, p = bytes(letters), 1.0
            for at in range(length + 1):
                here = text[:at]
                row = law(here)
                allowed = [constraint.prefix(here + b"a") == 0, constraint.prefix(here + b"b") == 0]
                allowed.append(constraint.complete(here) == 0)
                total = sum(float(row[i]) for i in range(3) if allowed[i])
                pick = END if at == length else text[at] - ord("a")
                p *= float(row[pick]) / total if allowed[pick] else 0.0
            if p > 0:
                found[text] = p
    total = sum(found.values())
    return {text: p / total for text, p in found.items()}


def divergence(estimate: dict[bytes, float], posterior: dict[bytes, float]) -> float:
    """KL(estimate || posterior) in nats."""
    return sum(q * math.log(q / posterior[text]) for text, q in estimate.items() if q > 0)


def run(n: int, method: str, generator: torch.Generator) -> WeightedSequences:
    return smc(Table(), Language(), LETTERS, [END], n_particles=n, max_tokens=MOST, method=method, generator=generator)  # type: ignore[arg-type]


def main() -> None:
    weights = {s: probability(s) for s in STRINGS}
    z = sum(weights.values())
    posterior = {s: p / z for s, p in weights.items()}
    lcd = divergence(masked(), posterior)
    generator = torch.Generator().manual_seed(0)
    about = {"schema": 1, "task": "awrs-toy", "cmd": " ".join(["python", *sys.argv]), "env": environment()}
    lines = [{"what": "posterior", "normaliser": z, "kl_lcd_law": lcd, "status": "ok", **about}]
    for n, runs in RUNS.items():
        for method in ("paper", "recursive", "auto", "lcd"):
            found = [run(n, method, generator) for _ in range(runs)]
            kls = [divergence(f.posterior(), posterior) for f in found if f.alive]
            mean: dict[bytes, float] = {}
            for f in found:
                for text, share in f.posterior().items():
                    mean[text] = mean.get(text, 0.0) + share / sum(one.alive for one in found)
            lines.append({
                "what": "kl", "method": method, "n_particles": n, "runs": runs, "alive": len(kls) / runs,
                "kl": statistics.fmean(kls), "kl_of_mean_law": divergence(mean, posterior), "status": "ok", **about,
            })  # fmt: skip
            print(json.dumps({k: v for k, v in lines[-1].items() if k not in about}), flush=True)
    for method in ("paper", "recursive", "geometric"):
        found = [math.exp(run(4, method, generator).log_ml) for _ in range(UNBIASED_RUNS)]
        error = statistics.stdev(found) / math.sqrt(len(found))
        lines.append({
            "what": "weight", "method": method, "n_particles": 4, "runs": len(found), "normaliser": z,
            "mean_weight": statistics.fmean(found), "standard_error": error,
            "errors_away": (statistics.fmean(found) - z) / error, "status": "ok", **about,
        })  # fmt: skip
        print(json.dumps({k: v for k, v in lines[-1].items() if k not in about}), flush=True)
    with RESULTS.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


if __name__ == "__main__":
    main()
