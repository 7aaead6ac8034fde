"""Train a small word-pooled language model on the source of Python's standard library.

    python recipes/word_pooled.py --minutes 20 --out runs/word-pooled

Bytes of a word are pooled into one vector, a Llama of six layers reads these, and a small decoder writes the bytes of
the next word. Training uses the train split in pieces of about a kilobyte; the held-out files are measured in bits per
byte. Every five minutes the state is saved, and --resume goes on from it. card.json says how long the training took and
what it reached. `tokenmill run learn-your-tokens FILE --model runs/word-pooled` uses the result.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from tokenmill import corpora
from tokenmill.models._state import load_state, save_state
from tokenmill.text import LearnYourTokens, WordPooledLM
from tokenmill.text._word_generation import padded_words

CONTEXT, BATCH = 1024, 8  # bytes of a piece, pieces of a step
METHOD = LearnYourTokens(num_prefix=1, enc_layers=1, dec_layers=1, dec_heads=4, dropout=0.0)
BACKBONE: dict[str, Any] = {
    "hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 6, "num_key_value_heads": 6,
    "intermediate_size": 512, "max_position_embeddings": 2048,
}  # fmt: skip
SAVE_SECONDS = 300
STATE = "state.safetensors"


def pieces(split: str, most: int) -> list[str]:
    """Whole lines of at most CONTEXT bytes together, from files in an order of their own."""
    found: list[str] = []
    records = corpora.load("python-stdlib").split(split)
    for record in random.Random(0).sample(records, len(records)):
        part = ""
        for line in record.text.splitlines(keepends=True):
            if part and len((part + line).encode()) > CONTEXT:
                found.append(part)
                most -= len(part)
                part = ""
            part += line[:CONTEXT]
        if most < 0:
            break
    return found


def train(model: WordPooledLM, texts: list[str], out: Path, args: argparse.Namespace) -> tuple[int, float]:
    """Train for the minutes or steps that are left; steps and seconds in all."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.rate, betas=(0.9, 0.95), weight_decay=0.1)
    spent, step = 0.0, 0
    if args.resume and (out / STATE).is_file():
        spent, step = load_state(out / STATE, model, optimizer)
    assert model.segmenter is not None
    rng = random.Random(f"{args.seed} {step}")
    began, saved, mean = time.monotonic() - spent, time.monotonic(), 0.0
    while (done := step / args.steps if args.steps else (time.monotonic() - began) / (60 * args.minutes)) < 1:
        for group in optimizer.param_groups:
            share = min(1.0, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
            group["lr"] = args.rate * share
        batch = padded_words([model.segmenter.encode(text) for text in rng.choices(texts, k=BATCH)])
        loss = model(*batch, labels=True)["loss"]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        mean += (0.05 if step > 20 else 1 / step) * (loss.item() - mean)
        if step % 50 == 0:
            print(f"step {step}  {done:.0%}  loss {mean:.3f}", flush=True)
        if time.monotonic() - saved > SAVE_SECONDS:
            saved = time.monotonic()
            save_state(out / STATE, model, optimizer, seconds=saved - began, step=step)
    return step, time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--steps", type=int, help="stop after this many steps instead")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--resume", action="store_true", help="go on from the state in --out")
    parser.add_argument("--test-bytes", type=int, default=200_000)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    model = METHOD.model(METHOD.segmenter(), LlamaConfig(**BACKBONE)).train()
    steps, seconds = train(model, pieces("train", 10**9), args.out, args)
    model.eval()
    scores = model.score(pieces("test", args.test_bytes))
    bits = -sum(sum(one.log_probs) for one in scores) / math.log(2) / sum(one.bytes for one in scores)
    model.save_pretrained(args.out)
    corpus = corpora.load("python-stdlib")
    card = {
        "summary": "Word-pooled language model over the bytes of Python source.",
        "licence": f"Apache-2.0; trained on Python's library ({corpus.licence})",
        "data": {"name": corpus.name, "sha256": corpus.sha256},
        "command": " ".join(["python recipes/word_pooled.py", *sys.argv[1:]]),
        "weights": sum(p.numel() for p in model.parameters()),
        "steps": steps,
        "seconds": round(seconds),
        "threads": torch.get_num_threads(),
        "held_out_bits_per_byte": round(bits, 4),
    }
    (args.out / "card.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    (args.out / STATE).unlink(missing_ok=True)
    print(card)


if __name__ == "__main__":
    main()
