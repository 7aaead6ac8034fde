"""Train the small masked diffusion language models of the family diffuse, and the causal models that guide them.

    python recipes/masked_diffusion.py --task mixed --out runs/diffusion
    python recipes/masked_diffusion.py --task long --out runs/diffusion
    python recipes/masked_diffusion.py --task hard --out runs/diffusion
    python recipes/masked_diffusion.py --task python --out runs/diffusion
    python recipes/masked_diffusion.py --task mixed --guide medium --out runs/diffusion

A masked diffusion model is a Llama without its causal mask (`is_causal=False`) that learns to fill in what is hidden:
of every row a share of the answer's tokens is replaced by the mask token, the share spread evenly over (0, 1], and the
loss is the mean cross-entropy of the hidden tokens. The answer fills a buffer whose rest is end-of-text tokens; every
second batch has a shorter buffer, since decoding may cut one. The model of Python source has no prompts: any byte of
a window of 128 may be hidden. A guide reads the same rows from left to right; a weak one has stopped early.

An interrupted run goes on where its last state was saved when it is started again with the same --out. A card.json
beside the model says how long it took and what it reached on held-out prompts, one token a pass.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tokenmill import corpora
from tokenmill.diffuse import Diffusion, Quota
from tokenmill.models._state import load_state, save_state

PAD, EOT, MASK = 0, 1, 2
SPECIAL = ("<pad>", "<eot>", "<mask>")
WARM_UP = 100
IN_ORDER = 0.75  # of the rows, where there are blocks
PART = 100  # rows that are measured at once
HELD_OUT, SLICE = 500, 60  # exercises of each kind that are measured, and those that a test measures again


@dataclass(frozen=True)
class Shape:
    """Size of a model and how it is trained."""

    hidden: int
    layers: int
    heads: int
    mlp: int
    batch: int
    rate: float
    steps: int
    theta: float = 10_000.0
    block: int = 0  # most rows are hidden as decoding by blocks of this length meets them


TASKS = {
    "mixed": Shape(hidden=64, layers=3, heads=4, mlp=192, batch=64, rate=2e-3, steps=5_000),
    "long": Shape(hidden=64, layers=4, heads=4, mlp=192, batch=24, rate=3e-3, steps=2_000, block=16),
    "hard": Shape(hidden=64, layers=4, heads=4, mlp=192, batch=64, rate=2e-3, steps=6_000),
    "python": Shape(hidden=128, layers=4, heads=4, mlp=384, batch=32, rate=1e-3, steps=1_800),
}
GUIDES = {
    "strong": Shape(hidden=48, layers=2, heads=4, mlp=144, batch=64, rate=3e-3, steps=8_000),
    "medium": Shape(hidden=48, layers=2, heads=4, mlp=144, batch=64, rate=2e-3, steps=3_000),
    "weak": Shape(hidden=48, layers=2, heads=4, mlp=144, batch=64, rate=2e-3, steps=900),
    "small": Shape(hidden=24, layers=2, heads=2, mlp=72, batch=64, rate=3e-3, steps=3_000),
}


@dataclass(frozen=True)
class Rows:
    """A batch of token ids (B, L), what may be hidden in it (B, L), and what attention may see (B, L)."""

    ids: Tensor
    answer: Tensor
    seen: Tensor

    @property
    def positions(self) -> Tensor:
        """Position ids (B, L), counted from the first token that is no padding."""
        return (self.seen.cumsum(1) - 1).clamp_min(0)


def build_tokenizer(task: str) -> PreTrainedTokenizerFast:
    """One token a character, or a byte for Python; prompts are padded on the left."""
    if task == "python":
        # The characters by which byte-level tokenizers write bytes: printable ones as they are, others from 256 on.
        shown = {*range(33, 127), *range(161, 173), *range(174, 256)}
        rest = iter(range(256, 512))
        order = [chr(byte if byte in shown else next(rest)) for byte in range(256)]
        made = Tokenizer(models.BPE({token: at for at, token in enumerate((*SPECIAL, *order))}, []))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        made.decoder = decoders.ByteLevel()
    else:
        words = {token: at for at, token in enumerate((*SPECIAL, "<unk>", *corpora.EXERCISE_TASKS[task].alphabet))}
        made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
        made.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
        made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token=SPECIAL[PAD],
        eos_token=SPECIAL[EOT],
        mask_token=SPECIAL[MASK],
        padding_side="left",
        model_max_length=512,
    )


def build_model(shape: Shape, words: int, *, causal: bool) -> LlamaForCausalLM:
    flags: dict[str, Any] = {"is_causal": causal, "mask_token_id": MASK}  # kept by the config, read by attention
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=words,
            hidden_size=shape.hidden,
            intermediate_size=shape.mlp,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.heads,
            max_position_embeddings=512,
            # Weights of the usual 0.02 give a model of this width attention that is flat for thousands of steps.
            initializer_range=0.08,
            tie_word_embeddings=False,
            rope_parameters={"rope_type": "default", "rope_theta": shape.theta},
            bos_token_id=None,
            eos_token_id=EOT,
            pad_token_id=PAD,
            **flags,
        )
    )


def exercise_rows(tokenizer: Any, task: str, count: int, *, step: int, whole: bool) -> Rows:
    """Training rows of a batch: prompts padded on the left, answers in a buffer that end-of-text tokens fill.

    The buffer of every second batch is shorter, unless it has to be ``whole``.
    """
    drawn = corpora.exercises(task, "train", count, seed=step)
    prompts = tokenizer([x.prompt for x in drawn])["input_ids"]
    answers = tokenizer([x.answer for x in drawn])["input_ids"]
    room, least = corpora.EXERCISE_TASKS[task].answer, max(map(len, answers)) + 1
    if step % 2 and not whole:
        room = int(torch.randint(least, room + 1, (), generator=torch.Generator().manual_seed(step)))
    width = max(map(len, prompts))
    ids = torch.full((count, width + room), EOT)
    seen = torch.zeros_like(ids, dtype=torch.bool)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        ids[row, : width - len(prompt)] = PAD
        ids[row, width - len(prompt) : width] = torch.tensor(prompt)
        ids[row, width : width + len(answer)] = torch.tensor(answer)
        seen[row, width - len(prompt) :] = True
    may_hide = torch.zeros_like(seen)
    may_hide[:, width:] = True
    return Rows(ids, may_hide, seen)


def python_rows(stream: Tensor, count: int, *, step: int) -> Rows:
    """Windows (B, 128) of a stream of token ids, in which everything may be hidden."""
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(len(stream) - corpora.PYTHON_WINDOW, (count,), generator=generator)
    ids = stream[starts[:, None] + torch.arange(corpora.PYTHON_WINDOW)]
    everything = torch.ones_like(ids, dtype=torch.bool)
    return Rows(ids, everything, everything)


def python_stream() -> Tensor:
    """The training files one after another, with an end-of-text token behind each; a byte's id is its value and 3."""
    files = corpora.load("python-stdlib").split("train")
    ends = torch.tensor([EOT])
    texts = [torch.frombuffer(bytearray(record.text.encode()), dtype=torch.uint8) for record in files]
    return torch.cat([part for text in texts for part in (text.long() + len(SPECIAL), ends)])


def hidden(rows: Rows, generator: torch.Generator) -> Tensor:
    """Which tokens of a batch are hidden (B, L): shares spread evenly over the rows, at least one token in each."""
    count = len(rows.ids)
    shift = torch.rand((), generator=generator)
    share = ((shift + torch.randperm(count, generator=generator)) / count) % 1
    keys = torch.rand(rows.ids.shape, generator=generator).masked_fill(~rows.answer, torch.inf)
    first = keys.argmin(1, keepdim=True)
    return (keys < share[:, None]).scatter(1, first, True)


def by_blocks(rows: Rows, hide: Tensor, block: int, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """What is hidden when the first ``count`` rows are met as decoding by blocks meets them, and what is asked there.

    A block of each is drawn, up to the one in which the text ends. What stands in front of it is known, what stands
    behind it is hidden and not asked.

    Args:
        rows: the batch.
        hide: (B, L) bool, what is hidden otherwise; inside the drawn block it stays.
        block: length of a block.
        count: rows.
        generator: of the draws.
    """
    asked, hide = hide.clone(), hide.clone()
    place = torch.arange(rows.ids.shape[1])
    first = rows.answer.int().argmax(1)
    blocks = (rows.answer & (rows.ids != EOT)).sum(1) // block + 1
    start = first + block * (torch.rand(len(first), generator=generator) * blocks).long()
    inside = rows.answer & (place >= start[:, None]) & (place < start[:, None] + block)
    within = hide & inside
    within |= inside & ~within.any(1, keepdim=True)  # something has to be asked
    behind = rows.answer & (place >= start[:, None] + block)
    hide[:count], asked[:count] = (within | behind)[:count], within[:count]
    return hide, asked


def loss_of(model: LlamaForCausalLM, rows: Rows, causal: bool, step: int, block: int) -> Tensor:
    """Cross-entropy of what is hidden and asked; of every token of the answer for a causal model."""
    if causal:
        out = model(input_ids=rows.ids, attention_mask=rows.seen.long(), position_ids=rows.positions, use_cache=False)
        wanted = rows.answer[:, 1:]
        return F.cross_entropy(out.logits[:, :-1][wanted], rows.ids[:, 1:][wanted])
    generator = torch.Generator().manual_seed(step)
    hide = hidden(rows, generator)
    count = int(IN_ORDER * len(rows.ids)) if block else 0
    hide, asked = by_blocks(rows, hide, block, count, generator) if block else (hide, hide)
    given = rows.ids.masked_fill(hide, MASK)
    out = model(input_ids=given, attention_mask=rows.seen.long(), position_ids=rows.positions, use_cache=False)
    # Rows by blocks ask for few tokens, and weigh as much as others.
    parts = [slice(count), slice(count, None)] if count else [slice(None)]
    losses = [F.cross_entropy(out.logits[part][asked[part]], rows.ids[part][asked[part]]) for part in parts]
    return torch.stack(losses).mean()


def rate_at(step: int, done: float, peak: float) -> float:
    """Learning rate: linear warm-up over the first steps, then a cosine down to nothing."""
    return peak * min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


@dataclass(frozen=True)
class Plan:
    """How long to train, and where the state of an interrupted run lies."""

    seconds: float | None
    steps: int
    seed: int
    state: Path


def train(
    shape: Shape, words: int, batch_at: Callable[[int], Rows], plan: Plan, *, causal: bool
) -> tuple[LlamaForCausalLM, int, float]:
    """Train for `plan.seconds`, or for `plan.steps`; gives the model, the steps and the seconds."""
    torch.manual_seed(plan.seed)
    model = build_model(shape, words, causal=causal).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=shape.rate, betas=(0.9, 0.98), weight_decay=0.01)
    before, step = load_state(plan.state, model, optimizer) if plan.state.exists() else (0.0, 0)
    began, saved, mean = time.monotonic() - before, time.monotonic(), None
    while True:
        spent = time.monotonic() - began
        done = step / plan.steps if plan.seconds is None else spent / plan.seconds
        if done >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, done, shape.rate)
        loss = loss_of(model, batch_at(step), causal, plan.seed * 10_000_000 + step, shape.block)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        mean = loss.item() if mean is None else mean + 0.02 * (loss.item() - mean)
        if step % 100 == 0:
            print(f"step {step}, {done:.1%} done, {spent:.0f} s, training loss {mean:.4f}", flush=True)
        if time.monotonic() - saved > 60:
            save_state(plan.state, model, optimizer, seconds=time.monotonic() - began, step=step)
            saved = time.monotonic()
    save_state(plan.state, model, optimizer, seconds=spent, step=step)
    return model.eval(), step, spent


def accuracy(model: Any, tokenizer: Any, task: str, *, count: int, seed: int, causal: bool) -> dict[str, float]:
    """Share of right answers to held-out prompts of each kind, one token a pass; a guide writes from left to right."""
    about = corpora.EXERCISE_TASKS[task]
    how: dict[str, Any] = {} if causal else {"custom_generate": Diffusion(Quota(1), block_length=about.block)}
    reached = {}
    for kind in about.kinds:
        drawn, right = corpora.exercises(task, "test", count, seed=seed, kinds=[kind]), 0
        for start in range(0, count, PART):
            asked = drawn[start : start + PART]
            inputs = tokenizer([x.prompt for x in asked], padding=True, return_tensors="pt")
            given = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
            out = model.generate(**given, max_new_tokens=about.answer, do_sample=False, **how)
            rows = out[:, given["input_ids"].shape[1] :].tolist()
            right += sum(x.check(corpora.answer_text(tokenizer, row)) for x, row in zip(asked, rows, strict=True))
        reached[kind] = round(right / count, 4)
    return reached


@torch.no_grad()
def filled(model: Any, tokenizer: Any, *, count: int, seed: int) -> dict[str, float]:
    """Share of gaps in held-out Python filled byte by byte, one byte a pass, and bits a byte of the likelihood bound.

    The bound is the model's own objective: each window with a number m of hidden tokens spread evenly over 1 to L,
    weighted by L / m.
    """
    gaps = corpora.python_gaps("test", count, seed=seed)
    rows = torch.tensor([tokenizer(gap.text)["input_ids"] for gap in gaps])
    given = rows.clone()
    for row, gap in zip(given, gaps, strict=True):
        row[len(gap.before) : len(gap.before) + len(gap.gap)] = MASK
    right = 0
    for start in range(0, count, PART):
        out = Diffusion(Quota(1), infill=True).generate(model, given[start : start + PART], max_new_tokens=0)
        right += sum(tokenizer.decode(row) == gap.text for row, gap in zip(out, gaps[start:], strict=False))
    length = rows.shape[1]
    generator = torch.Generator().manual_seed(seed)
    number = 1 + (torch.arange(count) * length // count)[:, None]
    hide = torch.rand(rows.shape, generator=generator).argsort(1).argsort(1) < number
    nats = torch.cat(
        [
            F.cross_entropy(model(input_ids=x.masked_fill(h, MASK)).logits.transpose(1, 2), x, reduction="none") * h / n
            for x, h, n in zip(rows.split(PART), hide.split(PART), number.split(PART), strict=True)
        ]
    )
    return {"gaps": round(right / count, 4), "bits_per_byte": round(float(nats.sum(1).mean()) / math.log(2), 4)}


def measure(model: Any, tokenizer: Any, task: str, *, count: int, seed: int, causal: bool) -> dict[str, float]:
    """What the card says of a model."""
    if task == "python":
        return filled(model, tokenizer, count=count, seed=seed)
    return accuracy(model, tokenizer, task, count=count, seed=seed, causal=causal)


def save(model: Any, tokenizer: Any, folder: Path) -> Any:
    """Write bfloat16 weights and the tokenizer; gives the model as it will be loaded."""
    model.to(dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--guide", choices=GUIDES, help="train a causal guide of this size instead")
    parser.add_argument("--minutes", type=float, help="train for so long; the task's own number of steps otherwise")
    parser.add_argument("--steps", type=int, help="train for so many steps")
    parser.add_argument("--held-out", type=int, default=HELD_OUT, help="held-out prompts of each kind to measure on")
    parser.add_argument("--threads", type=int, help="threads of torch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    if options.guide and options.task == "python":
        parser.error("guides are trained on exercises")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    causal = options.guide is not None
    shape = GUIDES[options.guide] if causal else TASKS[options.task]
    name = f"diffusion-{options.task}" + (f"-guide-{options.guide}" if causal else "")
    tokenizer = build_tokenizer(options.task)
    stream = python_stream() if options.task == "python" else None

    def batch_at(step: int) -> Rows:
        number = options.seed * 10_000_000 + step
        if stream is not None:
            return python_rows(stream, shape.batch, step=number)
        return exercise_rows(tokenizer, options.task, shape.batch, step=number, whole=causal)

    plan = Plan(
        None if options.minutes is None else 60 * options.minutes,
        options.steps if options.steps is not None else shape.steps,
        options.seed,
        options.out / f"{name}.state.safetensors",
    )
    model, steps, seconds = train(shape, len(tokenizer), batch_at, plan, causal=causal)
    weights = sum(p.numel() for p in model.parameters())
    final = save(model, tokenizer, options.out / name)
    few = min(SLICE, options.held_out)
    task, stop = options.task, f" --minutes {options.minutes:g}" if options.minutes else f" --steps {steps}"
    card = {
        "name": name,
        "licence": "Apache-2.0; trained on "
        + (f"Python's standard library ({corpora.PYTHON_LICENCE})" if task == "python" else "exercises made here"),
        "weights": weights,
        "held_out": {"each_kind": options.held_out, "seed": 1}
        | measure(final, tokenizer, task, count=options.held_out, seed=1, causal=causal),
        "slice": {"each_kind": few, "seed": 2} | measure(final, tokenizer, task, count=few, seed=2, causal=causal),
        "seconds": round(seconds),
        "threads": torch.get_num_threads(),
        "steps": steps,
        "rows_seen": steps * shape.batch,
        "seed": options.seed,
        "command": f"python recipes/masked_diffusion.py --task {task}"
        + (f" --guide {options.guide}" if causal else "")
        + f"{stop} --threads {torch.get_num_threads()} --seed {options.seed} --out DIR",
    }
    (options.out / name / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    print(f"{name}: {card['held_out']} after {steps} steps, {seconds:.0f} s")


if __name__ == "__main__":
    main()
