"""Train the pair of small models that speculative decoding runs on: python-target and python-draft.

    python recipes/python_pair.py --minutes 44 --out runs/pair

Both are Llama models with one vocabulary of 2,048 byte-level tokens, trained from scratch on the source of Python's
standard library (train split of `tokenmill.corpora.load("python-stdlib")`), and measured on the files held out.
Three quarters of the time go to the target (3.4 million weights), one quarter to the draft (0.2 million). One core is
enough; a card.json beside each model says how long its training took, on how many threads, and what it reached.

The pair that ships came from 44 minutes on one thread of a busy machine (17 and 6 minutes of processor time): 1.32 bits
per byte on the held-out files for the target, 1.76 for the draft.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tokenmill import corpora

VOCAB, CONTEXT, BATCH = 2_048, 512, 8
END = "<|endoftext|>"
SLICE_RECORDS, SLICE_CHARS = 12, 4_000  # the slice of held-out text that a test measures again


@dataclass(frozen=True)
class Part:
    """One model of the pair."""

    name: str
    hidden: int
    layers: int
    heads: int
    intermediate: int
    share: float  # of the minutes
    rate: float  # peak learning rate


PARTS = (
    Part("python-target", hidden=256, layers=4, heads=4, intermediate=608, share=0.75, rate=2e-3),
    Part("python-draft", hidden=64, layers=2, heads=2, intermediate=128, share=0.25, rate=6e-3),
)


def build_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE; every text starts with the end token, in training and when the tokenizer is called."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END, eos_token=END, pad_token=END, model_max_length=CONTEXT
    )


def build_model(part: Part) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=part.hidden,
            intermediate_size=part.intermediate,
            num_hidden_layers=part.layers,
            num_attention_heads=part.heads,
            num_key_value_heads=part.heads,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
    )


def batches(documents: list[list[int]], seed: int) -> Iterator[Tensor]:
    """Windows (B, T + 1) without end: files in an order drawn anew each epoch, joined, cut, the windows shuffled."""
    order = random.Random(seed)
    while True:
        files = order.sample(documents, len(documents))
        stream = torch.tensor([token for file in files for token in file])
        start = order.randrange(CONTEXT) if len(stream) > 2 * CONTEXT else 0
        windows = stream[start:].unfold(0, CONTEXT + 1, CONTEXT)
        shuffled = windows[torch.tensor(order.sample(range(len(windows)), len(windows)))]
        yield from shuffled.split(BATCH)


@torch.no_grad()
def bits_per_byte(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> float:
    """Mean cost of the texts in bits per byte; each text alone, in windows that do not see one another."""
    nats, size = 0.0, 0
    for text in texts:
        ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
        for at in range(0, len(ids) - 1, CONTEXT):
            window = ids[at : at + CONTEXT + 1]
            logits = model(input_ids=window[None, :-1]).logits[0].float()
            nats += float(F.cross_entropy(logits, window[1:], reduction="sum"))
        size += len(text.encode())
    return nats / math.log(2) / size


def rate_at(done: float, peak: float) -> float:
    """Learning rate after a share of the training: 2 % of linear warm-up, then a cosine down to 2 % of the peak."""
    warm_up, floor = 0.02, 0.02
    if done < warm_up:
        return peak * max(done, 0.002) / warm_up
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (done - warm_up) / (1 - warm_up))))


def train(
    part: Part, documents: list[list[int]], *, seconds: float, steps: int | None, seed: int
) -> tuple[LlamaForCausalLM, int]:
    """Train for `seconds`, or for `steps` when given; returns the model and the number of steps."""
    torch.manual_seed(seed)
    model = build_model(part).train()
    decay = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=part.rate, betas=(0.9, 0.95))
    began, step, mean = time.monotonic(), 0, math.log(VOCAB)
    for batch in batches(documents, seed):
        done = step / steps if steps is not None else (time.monotonic() - began) / seconds
        if done >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = rate_at(done, part.rate)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        mean += 0.02 * (loss.item() - mean)
        if step % 100 == 0:
            print(f"{part.name}: step {step}, {done:.0%} done, training loss {mean:.3f}", flush=True)
    return model.eval(), step


def save(
    part: Part,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    facts: dict[str, object],
    measure: int | None,
) -> None:
    """Write bfloat16 weights, config and tokenizer, and a card of what they reach on `measure` held-out files."""
    model.to(dtype=torch.bfloat16)  # pyright: ignore[reportCallIssue]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rounded = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    corpus = corpora.load("python-stdlib")
    held_out = corpus.split("test")[:measure]
    sample = held_out[:: max(1, len(held_out) // SLICE_RECORDS)][:SLICE_RECORDS]
    card = {
        "name": part.name,
        "licence": "Apache-2.0; trained on the source of Python's standard library (PSF-2.0)",
        "weights": model.num_parameters(),
        "data": {"name": corpus.name, "source": corpus.source, "sha256": corpus.sha256},
        "held_out_bits_per_byte": bits_per_byte(rounded, tokenizer, [record.text for record in held_out]),
        "slice": {
            "records": [record.id for record in sample],
            "chars": SLICE_CHARS,
            "bits_per_byte": bits_per_byte(rounded, tokenizer, [record.text[:SLICE_CHARS] for record in sample]),
        },
        **facts,
    }
    (folder / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    print(f"{part.name}: {card['held_out_bits_per_byte']:.3f} bits per byte on {len(held_out)} held-out files")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=44, help="for both models together")
    parser.add_argument("--steps", type=int, help="stop each model after this many steps instead")
    parser.add_argument("--files", type=int, help="train and measure on the first so many files only")
    parser.add_argument("--threads", type=int, help="threads of torch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)

    texts = [record.text for record in corpora.load("python-stdlib").split("train")][: options.files]
    tokenizer = build_tokenizer(texts)
    documents: list[list[int]] = tokenizer(texts, verbose=False)["input_ids"]  # pyright: ignore[reportAssignmentType]
    size = sum(len(text.encode()) for text in texts)
    print(f"{len(texts)} files, {size:,} bytes, {sum(map(len, documents)):,} tokens")
    for part in PARTS:
        wall, cpu = time.monotonic(), time.process_time()
        seconds = 60 * options.minutes * part.share
        model, steps = train(part, documents, seconds=seconds, steps=options.steps, seed=options.seed)
        facts: dict[str, object] = {
            "seconds": round(time.monotonic() - wall),
            "cpu_seconds": round(time.process_time() - cpu),
            "threads": torch.get_num_threads(),
            "steps": steps,
            "tokens_seen": steps * BATCH * CONTEXT,
            "seed": options.seed,
            "command": f"python recipes/python_pair.py --minutes {options.minutes:g} --seed {options.seed} --out DIR",
        }
        save(part, model, tokenizer, options.out / part.name, facts, options.files)
        print(f"{part.name}: trained in {facts['seconds']} s ({steps} steps)", flush=True)


if __name__ == "__main__":
    main()
