"""Train what two visual pruners need for a model: IDPruner's scorer, and VFlowOpt's settings for some budgets.

    python recipes/prune_parts.py --model digits-llava --out runs/parts

The scorer learns on questions about pictures of the train split, with the model frozen (VisionSelector's recipe: the
answers' loss through a differentiable top-k at a budget of 0.2, and a second loss that sharpens it, weighted less than
in the paper: these models answer well through a soft mask, and the paper's weights confirm a random choice). VFlowOpt's
search looks at 30 prompts without their answers. Written are OUT/<model>-scorer and OUT/<model>-vflowopt, in the form
in which the bench finds them among the assets; each has a card that says how long it took and what it reached.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tokenmill import corpora, models
from tokenmill.prune import optimize, train_scorer

BATCH, PROMPTS = 24, 30


def batches(processor: Any, seed: int) -> Iterator[dict[str, Any]]:
    """Batches of one question a picture with its answer behind it; labels on the answer and the end token."""
    step = 0
    while True:
        pictures = corpora.digit_scenes("train", BATCH, seed=5_000_000 + seed * 100_000 + step)
        step += 1
        asked = [p.questions[at % len(p.questions)] for at, p in enumerate(pictures)]
        end = processor.tokenizer.eos_token
        texts = [f"{processor.prompt(q.text)} {q.answer} {end}" for q in asked]
        inputs = processor(texts, [p.pixels for p in pictures])
        labels = torch.full_like(inputs["input_ids"], -100)
        for row, question in enumerate(asked):
            said = processor.tokenizer(f"{question.answer} {end}", add_special_tokens=False)["input_ids"]
            labels[row, -len(said) :] = torch.tensor(said)
        yield {**inputs, "labels": labels}


def train(model: Any, processor: Any, folder: Path, options: argparse.Namespace) -> None:
    """The scorer and its card."""

    def told(step: int, loss: float) -> None:
        if step % 25 == 0:
            print(f"scorer: step {step} of {options.steps}, loss {loss:.3f}", flush=True)

    scorer, report = train_scorer(
        model,
        batches(processor, options.seed),
        budget=options.budget,
        steps=options.steps,
        rate=options.rate,
        sharpen=tuple(options.sharpen),
        seed=options.seed,
        on_step=told,
    )
    scorer.save(folder)
    card = {
        "name": folder.name,
        "licence": f"Apache-2.0; trained on {corpora.DIGITS_LICENCE}",
        "weights": sum(p.numel() for p in scorer.parameters()),
        "budget": options.budget,
        "steps": report.steps,
        "seconds": round(report.seconds),
        "threads": torch.get_num_threads(),
        "first_loss": round(report.first_loss, 4),
        "last_loss": round(report.last_loss, 4),
        "seed": options.seed,
        "command": f"python recipes/prune_parts.py --model {options.name} --steps {options.steps} "
        f"--rate {options.rate:g} --sharpen {options.sharpen[0]:g} {options.sharpen[1]:g} --out DIR",
    }
    (folder / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    print(f"{folder.name}: loss {report.first_loss:.3f} -> {report.last_loss:.3f} in {report.seconds:.0f} s")


def search(model: Any, processor: Any, folder: Path, options: argparse.Namespace) -> None:
    """VFlowOpt's settings for each budget, one file each."""
    pictures = corpora.digit_scenes("train", PROMPTS, seed=9_000_000 + options.seed)
    prompts = [processor(processor.prompt(p.questions[0].text), [p.pixels]) for p in pictures]
    facts: dict[str, Any] = {}
    for keep in options.keeps:

        def told(done: int, best: float, keep: float = keep) -> None:
            if done % 10 == 0:
                print(f"search at {keep:g}: {done} of {options.calls}, best {best:.4f}", flush=True)

        began = time.monotonic()
        found = optimize(model, prompts, keep, n_calls=options.calls, n_init=min(27, options.calls), on_trial=told)
        found.save(folder / f"keep-{keep:g}.json")
        facts[f"{keep:g}"] = {"cosine": round(found.value, 4), "seconds": round(time.monotonic() - began)}
    card = {
        "name": folder.name,
        "licence": "Apache-2.0",
        "prompts": PROMPTS,
        "calls": options.calls,
        "threads": torch.get_num_threads(),
        "budgets": facts,
        "command": f"python recipes/prune_parts.py --model {options.name} --calls {options.calls} --out DIR",
    }
    (folder / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    print(f"{folder.name}: {facts}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="digits-llava", help="an asset, or the folder of a trained model")
    parser.add_argument("--steps", type=int, default=400, help="of the scorer; 0 leaves it out")
    parser.add_argument("--budget", type=float, default=0.2)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--sharpen", type=float, nargs=2, default=[0.0, 0.1], help="weight of the second loss")
    parser.add_argument("--calls", type=int, default=60, help="evaluations of a search; 0 leaves it out")
    parser.add_argument("--keeps", type=float, nargs="+", default=[0.5, 0.25, 0.125])
    parser.add_argument("--threads", type=int, help="threads of torch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    loaded: Any = models.load(options.model)
    model, processor = loaded
    options.name = Path(options.model).name
    if options.steps:
        train(model, processor, options.out / f"{options.name}-scorer", options)
    if options.calls:
        search(model, processor, options.out / f"{options.name}-vflowopt", options)


if __name__ == "__main__":
    main()
