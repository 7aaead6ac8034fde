"""Train the network that predicts embeddings of merged tokens, for MiniLM or for Gemma 3.

    python recipes/hypernetwork.py --model all-minilm-l6-v2 --minutes 20 --out runs/hypernetwork

The model is frozen. Batches of texts (train split of the standard library's source, of Python's manual and of the
machine's manual pages in twenty languages, where there are any) are merged by random amounts, and the model with
predicted embeddings is taught by the model without: an encoder by the cosine between sentence embeddings and by the
hidden states of the pieces, a decoder by the distribution behind every token that both see. Every ten minutes the state
is saved; --resume goes on from it. The result is measured on held-out texts and written into card.json.

What is trained on Gemma's weights falls under the Gemma terms: it is written into the user's cache when no --out is
given, and does not ship.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenmill import corpora, models
from tokenmill.errors import UnsupportedError
from tokenmill.models._state import load_state, save_state
from tokenmill.text import DynamicBPE, DynamicInputs, HyperNetwork, MeanEmbedder
from tokenmill.text._embedders import mean_state

ENCODER = "all-minilm-l6-v2"
SHAPES: dict[str, dict[str, Any]] = {
    ENCODER: {"hidden": 384, "layers": 2, "heads": 6, "ff": 768, "surface_maxlen": 7},
    "gemma-3-270m": {"hidden": 384, "layers": 2, "heads": 6, "ff": 768, "surface_maxlen": 7},
}
LICENCES = {
    ENCODER: "Apache-2.0; trained on texts of Python (PSF-2.0) and on manual pages",
    "gemma-3-270m": "Gemma terms (a derivative of Gemma 3; not redistributed). NOTICE: Gemma is provided under and "
    "subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms",
}
KINDS = {"python-stdlib": 0.35, "python-reference": 0.2, "manual-pages": 0.45}  # share of a batch's texts
BOUNDARIES = ("pretoken", "word")
LEVELS = (0.25, 0.5, 0.75, 1.0)
BATCH, CHARS, TOKENS = {True: 32, False: 4}, {True: 500, False: 900}, {True: 128, False: 256}
SAVE_SECONDS = 600
STATE = "state.safetensors"


def load(name: str) -> tuple[Any, Any]:
    """The model in float32, frozen, and its tokenizer."""
    if name == ENCODER:
        model, tokenizer = models.encoder(name)
    else:
        model, tokenizer = models.load(name)
    return model.eval().requires_grad_(False), tokenizer


def texts(split: str, chars: int) -> dict[str, list[str]]:
    """Corpus -> pieces of its texts, cut at line ends; a corpus that this machine does not have is left out."""
    found: dict[str, list[str]] = {}
    for name in KINDS:
        try:
            records = corpora.load(name).split(split)
        except UnsupportedError as error:
            print(f"without {name}: {error}")
            continue
        found[name] = [part for record in records for part in pieces(record.text, chars)]
    return found


def pieces(text: str, chars: int) -> Iterator[str]:
    """Parts of about so many characters."""
    part = ""
    for line in text.splitlines(keepends=True):
        part += line[:chars]
        if len(part) >= chars:
            yield part.strip()
            part = ""
    if len(part.strip()) >= chars // 4:
        yield part.strip()


def draw(pool: dict[str, list[str]], rng: random.Random, size: int) -> list[str]:
    names = rng.choices(list(pool), [KINDS[name] for name in pool], k=size)
    return [rng.choice(pool[name]) for name in names]


def sentence(hidden: Tensor, mask: Tensor) -> Tensor:
    """(B, D) mean of the hidden states, of length 1: MiniLM's sentence embedding."""
    return F.normalize(mean_state(hidden, mask), dim=-1)


def by_token(hidden: Tensor, batch: Any, left: bool) -> Tensor:
    """(N, D): for each dynamic token the mean of the teacher's hidden states over its pieces."""
    rows, counts = [], []
    for row, found in enumerate(batch.pieces):
        n = len(batch.base_ids[row])
        rows.append(hidden[row, hidden.shape[1] - n :] if left else hidden[row, :n])
        counts += [len(token) for token in found]
    flat = torch.cat(rows)  # (pieces, D)
    sizes = torch.tensor(counts, device=flat.device)
    owner = torch.repeat_interleave(torch.arange(len(counts), device=flat.device), sizes)
    total = flat.new_zeros(len(counts), flat.shape[1]).index_add(0, owner, flat)
    return total / sizes[:, None]


def encoder_loss(model: Any, tokenizer: Any, inputs: Any, net: HyperNetwork, batch: Any) -> Tensor:
    with torch.no_grad():
        plain = tokenizer.pad({"input_ids": batch.base_ids}, return_tensors="pt")
        teacher = model(**plain).last_hidden_state.float()
    given = inputs.assemble(batch, needed := inputs.needed(batch), predict(net, needed))
    student = model(**given).last_hidden_state.float()
    mask = given["attention_mask"].bool()
    cosine = (sentence(teacher, plain["attention_mask"]) * sentence(student, mask)).sum(-1)
    wanted = by_token(teacher, batch, left=False)
    tokens = F.mse_loss(student[mask], wanted) / wanted.var()
    return 5 * (1 - cosine).mean() + tokens


def decoder_loss(model: Any, tokenizer: Any, inputs: Any, net: HyperNetwork | MeanEmbedder, batch: Any) -> Tensor:
    """Kullback-Leibler divergence behind the last piece of every token, over the base vocabulary."""
    with torch.no_grad():
        plain = tokenizer.pad({"input_ids": batch.base_ids}, return_tensors="pt", padding_side="left")
        states = model.base_model(**plain).last_hidden_state
    given = inputs.assemble(batch, needed := inputs.needed(batch), predict(net, needed))
    student = model.base_model(**given).last_hidden_state
    rows = []
    for row, found in enumerate(batch.pieces):
        ends = torch.tensor([len(token) for token in found]).cumsum(0) - 1
        rows.append(states[row, states.shape[1] - len(batch.base_ids[row]) :][ends])
    wanted, got = torch.cat(rows), student[given["attention_mask"].bool()]
    some = torch.randperm(len(wanted))[:128]  # the vocabulary is large: a part of the places says enough
    teacher = model.lm_head(wanted[some]).float().log_softmax(-1)
    ours = model.lm_head(got[some]).float().log_softmax(-1)
    return F.kl_div(ours, teacher, log_target=True, reduction="batchmean") + F.mse_loss(got, wanted) / wanted.var()


def predict(net: HyperNetwork | MeanEmbedder, tokens: list[Any]) -> Tensor:
    from tokenmill.text._token_embedders import padded

    if not tokens:
        return torch.zeros(0, 1)
    if isinstance(net, MeanEmbedder):
        return net.embed(tokens).input
    ids, mask = padded(tokens, net.config.surface_maxlen)
    return net(ids, mask).input


def train(
    name: str, net: HyperNetwork, model: Any, tokenizer: Any, out: Path, args: argparse.Namespace
) -> tuple[int, float]:
    """Train for the minutes or steps that are left; steps and seconds in all."""
    encoder = name == ENCODER
    loss_of = encoder_loss if encoder else decoder_loss
    inputs = DynamicInputs(model, net, positions="keep" if encoder else None)
    optimizer = torch.optim.AdamW(net.parameters(), lr=args.rate, betas=(0.9, 0.95), weight_decay=0.01)
    pool = texts("train", CHARS[encoder])
    spent, step = 0.0, 0
    if args.resume and (out / STATE).is_file():
        spent, step = load_state(out / STATE, net, optimizer)
    rng = random.Random(f"{args.seed} {step}")
    began, last, mean = time.monotonic() - spent, time.monotonic(), 0.0
    while (done := step / args.steps if args.steps else (time.monotonic() - began) / (60 * args.minutes)) < 1:
        boundary, level = rng.choice(BOUNDARIES), rng.uniform(0.15, 0.9)
        bpe = DynamicBPE(tokenizer, boundary=boundary, target_reduction=level, per_example=not encoder)
        batch = bpe.merge(draw(pool, rng, BATCH[encoder]), max_length=TOKENS[encoder])
        for group in optimizer.param_groups:
            group["lr"] = args.rate * min(1.0, (step + 1) / 50) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.half):
            loss = loss_of(model, tokenizer, inputs, net, batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        step += 1
        mean += (0.05 if step > 20 else 1 / step) * (loss.item() - mean)
        if step % 20 == 0:
            print(f"step {step}  {done:.0%}  loss {mean:.4f}", flush=True)
        if time.monotonic() - last > SAVE_SECONDS:
            last = time.monotonic()
            save_state(out / STATE, net, optimizer, seconds=last - began, step=step)
    return step, time.monotonic() - began


@torch.no_grad()
def measured(name: str, net: HyperNetwork, model: Any, tokenizer: Any, batches: int) -> dict[str, Any]:
    """Held-out texts by corpus and level: share of tokens saved, and how close the model stays."""
    encoder = name == ENCODER
    found: dict[str, Any] = {}
    for corpus, pool in texts("test", CHARS[encoder]).items():
        rng = random.Random(0)
        groups = [rng.sample(pool, min(32 if encoder else 4, len(pool))) for _ in range(batches)]
        for boundary, level in itertools.product(BOUNDARIES, LEVELS):
            bpe = DynamicBPE(tokenizer, boundary=boundary, target_reduction=level, per_example=not encoder)
            sums = {"cut": 0.0, "network": 0.0, "mean": 0.0}
            for group in groups:
                batch = bpe.merge(group, max_length=TOKENS[encoder])
                sums["cut"] += batch.cut / batches
                for label, embedder in (("network", net), ("mean", MeanEmbedder(model))):
                    inputs = DynamicInputs(model, embedder, positions="keep" if encoder else None)
                    if encoder:
                        plain = tokenizer.pad({"input_ids": batch.base_ids}, return_tensors="pt")
                        before = sentence(model(**plain).last_hidden_state, plain["attention_mask"])
                        given = inputs(batch)
                        after = sentence(model(**given).last_hidden_state, given["attention_mask"])
                        value = float((before * after).sum(-1).mean())
                    else:
                        value = float(decoder_loss(model, tokenizer, inputs, embedder, batch))
                    sums[label] += value / batches
            found[f"{corpus}, {boundary}, {level:g}"] = {key: round(value, 4) for key, value in sums.items()}
            print(corpus, boundary, level, found[f"{corpus}, {boundary}, {level:g}"], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(SHAPES), default=ENCODER)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--steps", type=int, help="stop after this many steps instead")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a folder; without it the user's cache")
    parser.add_argument("--resume", action="store_true", help="go on from the state in --out")
    parser.add_argument("--half", action="store_true", help="bfloat16 where torch thinks it safe")
    args = parser.parse_args()
    from tokenmill.models._cache import cache_dir

    out = args.out or cache_dir() / "hypernetworks" / args.model
    torch.manual_seed(args.seed)
    model, tokenizer = load(args.model)
    net = HyperNetwork.of(model, tokenizer, **SHAPES[args.model])
    steps, seconds = train(args.model, net, model, tokenizer, out, args)
    net.eval().save_pretrained(out)
    card = {
        "summary": f"Predicts embeddings of merged tokens for {args.model}.",
        "licence": LICENCES[args.model],
        "command": " ".join(["python recipes/hypernetwork.py", *sys.argv[1:]]),
        "weights": sum(p.numel() for p in net.parameters()),
        "steps": steps,
        "seconds": round(seconds),
        "threads": torch.get_num_threads(),
        "data": sorted(texts("test", 500)),
        "held_out": measured(args.model, net, model, tokenizer, batches=4),
    }
    (out / "card.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    (out / STATE).unlink(missing_ok=True)


if __name__ == "__main__":
    main()
