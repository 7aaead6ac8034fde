"""Train the filter of Learn2PD for a masked diffusion model.

    python recipes/diffusion_filter.py --model diffusion-long --threads 1 --out runs/diffusion

Prompts of the train split are answered one token a pass and then again by an oracle that reveals all that is final;
the filter learns from the confidences that the oracle met, which takes minutes. Its acceptance threshold is the one
with the fewest passes among those that keep the accuracy of one-token decoding, within `--loss`, on prompts of the
validation split. Written is OUT/<model>-filter, in the form in which the bench finds it among the assets, with a
card.json that says how long it took and what it reached.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from tokenmill import corpora, models
from tokenmill.diffuse import Diffusion, Quota, RevealRule
from tokenmill.diffuse.learn2pd import BlockFilter, FilterConfig, FilterRows, Learn2PD, oracle_replay, train_filter

PART = 100  # prompts that are decoded at once
THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.96, 0.97, 0.98, 0.99, 0.995, 0.999)


class Exercises:
    """A model with the exercises that it was trained for."""

    def __init__(self, name: str) -> None:
        loaded: Any = models.load(name)
        self.model, self.tokenizer = loaded
        self.task = Path(name).name.removeprefix("diffusion-")
        self.about = corpora.EXERCISE_TASKS[self.task]

    def parts(self, split: str, count: int, seed: int) -> list[list[corpora.Exercise]]:
        drawn = corpora.exercises(self.task, split, count, seed=seed)
        return [drawn[at : at + PART] for at in range(0, count, PART)]

    def inputs(self, asked: list[corpora.Exercise]) -> dict[str, torch.Tensor]:
        made = self.tokenizer([x.prompt for x in asked], padding=True, return_tensors="pt")
        return {"input_ids": made["input_ids"], "attention_mask": made["attention_mask"]}

    def measure(self, rule: RevealRule, block: int, split: str, count: int, seed: int) -> dict[str, float]:
        """Share of right answers, passes and places fed of a rule."""
        right, passes, positions = 0, 0, 0
        for asked in self.parts(split, count, seed):
            made, given = Diffusion(rule, block_length=block, seed=seed), self.inputs(asked)
            out = made.generate(self.model, **given, max_new_tokens=self.about.answer)
            texts = [corpora.answer_text(self.tokenizer, row) for row in out[:, given["input_ids"].shape[1] :].tolist()]
            right += sum(x.check(text) for x, text in zip(asked, texts, strict=True))
            passes, positions = passes + sum(made.trace.row_calls), positions + made.trace.positions
        return {"accuracy": right / count, "passes": passes / count, "positions": positions / count}


def replay(about: Exercises, block: int, count: int, seed: int) -> tuple[FilterRows, float, float]:
    """Rows of the oracle, its mean passes, and the share of prompts whose text it kept: all."""
    parts, passes, kept = [], 0, 0
    for asked in about.parts("train", count, 1_000 + seed):
        one = oracle_replay(about.model, **about.inputs(asked), max_new_tokens=about.about.answer, block_length=block)
        parts.append(one.rows)
        passes += int(one.passes.sum())
        kept += int((one.replayed == one.reference).all(1).sum())
        print(f"replayed {sum(len(p) for p in parts)} passes over blocks", flush=True)
    return FilterRows.together(parts), passes / count, kept / count


def choose(measure: Callable[[float], dict[str, float]], one_token: float, loss: float) -> tuple[float, dict[str, Any]]:
    """The threshold with the fewest passes whose accuracy is at most ``loss`` below, and what all of them reach."""
    tried = {tau: measure(tau) for tau in THRESHOLDS}
    good = [tau for tau, found in tried.items() if found["accuracy"] >= one_token - loss]
    best = min(good, key=lambda tau: tried[tau]["passes"]) if good else max(tried, key=lambda t: tried[t]["accuracy"])
    return best, {f"{tau:g}": {k: round(v, 4) for k, v in found.items()} for tau, found in tried.items()}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="diffusion-long", help="an asset, or the folder of a trained model")
    parser.add_argument("--block", type=int, help="length of a block; the exercises' own otherwise")
    parser.add_argument("--prompts", type=int, default=1_000, help="of the train split, to replay")
    parser.add_argument("--validation", type=int, default=300, help="prompts that the threshold is chosen on")
    parser.add_argument("--iterations", type=int, default=4_000)
    parser.add_argument("--hidden", type=int, default=32)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--loss", type=float, default=0.005, help="accuracy that the threshold may cost")
    parser.add_argument("--threads", type=int, help="threads of torch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    began = time.monotonic()
    about = Exercises(options.model)
    block = options.block or about.about.block
    rows, oracle, kept = replay(about, block, options.prompts, options.seed)

    def told(step: int, loss: float) -> None:
        if step % 500 == 0:
            print(f"filter: step {step} of {options.iterations}, loss {loss:.4f}", flush=True)

    config = FilterConfig(block_length=block, hidden=options.hidden, depth=options.depth)
    made, report = train_filter(rows, config, iterations=options.iterations, seed=options.seed, on_step=told)
    trained = time.monotonic() - began

    def measure(rule: RevealRule) -> dict[str, float]:
        return about.measure(rule, block, "validation", options.validation, 3_000 + options.seed)

    one_token = measure(Quota(1))
    best, tried = choose(lambda tau: measure(Learn2PD(made, threshold=tau)), one_token["accuracy"], options.loss)
    final = BlockFilter(replace(config, threshold=best))
    final.load_state_dict(made.state_dict())
    name = f"{Path(options.model).name}-filter"
    final.save(options.out / name)
    block_flag = f" --block {options.block}" if options.block else ""
    card = {
        "name": name,
        "licence": "Apache-2.0; trained on exercises made here",
        "weights": sum(p.numel() for p in made.parameters()),
        "block_length": block,
        "replayed": {"prompts": options.prompts, "rows": len(rows), "passes": round(oracle, 3), "text_kept": kept},
        "training": {k: round(v, 4) for k, v in asdict(report).items()},
        "threshold": best,
        "validation": {
            "prompts": options.validation,
            "one_token": {k: round(v, 4) for k, v in one_token.items()},
            "by_threshold": tried,
        },
        "seconds": round(trained),
        "threads": torch.get_num_threads(),
        "steps": options.iterations,
        "seed": options.seed,
        "command": f"python recipes/diffusion_filter.py --model {Path(options.model).name}{block_flag} "
        f"--prompts {options.prompts} --hidden {options.hidden} --depth {options.depth} "
        f"--iterations {options.iterations} --threads {torch.get_num_threads()} --seed {options.seed} --out DIR",
    }
    (options.out / name / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    print(f"{name}: threshold {best:g}, {tried[f'{best:g}']} against {card['validation']['one_token']}")


if __name__ == "__main__":
    main()
