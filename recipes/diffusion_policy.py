"""Train an unmasking policy for a masked diffusion model by reinforcement.

    python recipes/diffusion_policy.py --model diffusion-mixed --alpha 1 --threads 1 --out runs/diffusion

Each update draws prompts of the train split, answers each of them eight times with the policy's own draws, and rewards
right answers by how few passes they took; the language model is never changed. Without --block the whole answer is one
block. --experts adds, to each prompt, answers that were decoded with constant thresholds, as if the policy had drawn
them. Written is OUT/<model>-policy, in the form in which the bench finds it among the assets, with a card.json that
says how long it took and what it reached on prompts of the validation split.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusion_filter import Exercises

from tokenmill import corpora
from tokenmill.diffuse.unmasking_policies import (
    GRPOConfig,
    PolicyBatch,
    PolicyConfig,
    PolicyNetwork,
    PolicyReport,
    UnmaskingPolicy,
    train_policy,
)

RECENT = 20


def batches(about: Exercises, prompts: int, seed: int) -> Iterator[PolicyBatch]:
    """Prompts of the train split, other ones in each batch."""
    step = 0
    while True:
        asked = corpora.exercises(about.task, "train", prompts, seed=2_000_000 + seed * 100_000 + step)
        step += 1

        def right(at: int, ids: list[int], asked: list[corpora.Exercise] = asked) -> bool:
            return asked[at].check(corpora.answer_text(about.tokenizer, ids))

        yield PolicyBatch(right=right, **about.inputs(asked))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="diffusion-mixed", help="an asset, or the folder of a trained model")
    parser.add_argument("--alpha", type=float, default=1.0, help="weight of speed")
    parser.add_argument("--form", choices=["multiplicative", "additive"], default="multiplicative")
    parser.add_argument("--sampling", choices=["bernoulli", "dpls"], default="bernoulli")
    parser.add_argument("--block", type=int, help="length of a block; the whole answer otherwise")
    parser.add_argument("--experts", type=float, nargs="*", default=[], help="thresholds")
    parser.add_argument("--updates", type=int, default=300)
    parser.add_argument("--prompts", type=int, default=16, help="of one update")
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--validation", type=int, default=300)
    parser.add_argument("--threads", type=int, help="threads of torch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    about = Exercises(options.model)
    length = about.about.answer
    torch.manual_seed(options.seed)
    network = PolicyNetwork(PolicyConfig(width=options.width, mlp=4 * options.width, time_width=options.width))
    rule = UnmaskingPolicy(network, sampling=options.sampling)
    config = GRPOConfig(
        max_new_tokens=length,
        block_length=options.block,
        group=options.group,
        alpha=options.alpha,
        form=options.form,
        rate=options.rate,
        warm_up=20,
        experts=tuple(options.experts),
        expert_block=about.about.block,
        seed=options.seed,
    )
    began = time.monotonic()

    def told(update: int, report: PolicyReport) -> None:
        if update % RECENT == 0:
            recent = [sum(x[-RECENT:]) / RECENT for x in (report.rewards, report.right, report.passes)]
            said = "reward {:.3f}, right {:.3f}, passes {:.2f}".format(*recent)
            print(f"update {update}, {time.monotonic() - began:.0f} s: {said}", flush=True)

    prompts = batches(about, options.prompts, options.seed)
    report = train_policy(about.model, rule, prompts, config, updates=options.updates, on_update=told)
    seconds = time.monotonic() - began
    block = options.block or length
    name = f"{Path(options.model).name}-policy"
    network.save(options.out / name)
    reached: dict[str, Any] = {}
    for temperature in (0.0, 0.5, 1.0):
        tried = UnmaskingPolicy(network, temperature=temperature)
        found = about.measure(tried, block, "validation", options.validation, 3_000 + options.seed)
        reached[f"{temperature:g}"] = {k: round(v, 4) for k, v in found.items()}
    card = {
        "name": name,
        "licence": "Apache-2.0; trained on exercises made here",
        "weights": sum(p.numel() for p in network.parameters()),
        "block_length": block,
        "alpha": options.alpha,
        "best_reward": round(report.best, 4),
        "first_reward": round(sum(report.rewards[:10]) / max(1, len(report.rewards[:10])), 4),
        "validation": {"prompts": options.validation, "by_temperature": reached},
        "seconds": round(seconds),
        "threads": torch.get_num_threads(),
        "steps": options.updates,
        "rollouts": options.updates * options.prompts * options.group,
        "seed": options.seed,
        "command": f"python recipes/diffusion_policy.py --model {Path(options.model).name} --alpha {options.alpha:g} "
        f"--form {options.form} --sampling {options.sampling}"
        + (f" --block {options.block}" if options.block else "")
        + (f" --experts {' '.join(f'{x:g}' for x in options.experts)}" if options.experts else "")
        + f" --updates {options.updates} --prompts {options.prompts} --group {options.group} --rate {options.rate:g} "
        f"--width {options.width} --threads {torch.get_num_threads()} --seed {options.seed} --out DIR",
    }
    (options.out / name / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    print(f"{name}: {reached}")


if __name__ == "__main__":
    main()
