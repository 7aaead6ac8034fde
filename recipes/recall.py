"""Train the small models that long-context methods are measured on: recall (full attention) and recall-dsa (indexed).

    python recipes/recall.py --arch full --steps 1600 --out runs/recall
    python recipes/recall.py --arch dsa --steps 900 --out runs/recall

Both read haystacks of keys and values as `tokenmill.probe` writes them with ``keys="name"``, three tokens a pair: the
key, the value and a comma. They are ordinary classes of transformers made from a configuration. ``full`` is a Llama of
four layers with rotary positions that answers for single values and for the ends of threads of up to three steps (the
questions of the probe that name one key). It is trained on 48 to 256 tokens and for its last part on 512, and never
sees a position beyond, so that texts of 1,024 tokens and more lie outside its range. ``dsa`` is a DeepSeek-V3.2 of two
layers. It learns to recall with dense attention first, on up to 256 tokens; then its weights are frozen, and the
indexer alone learns on 512 to rank keys as attention does (Kullback-Leibler divergence from the sum of the heads'
probabilities).

From noise, two layers that work together (one that looks a token back, one that looks for its own kind) take thousands
of steps to find each other. Here they start as such: a head of the first layer has biases that point one token back,
and the heads of the later layers start with equal maps for queries and keys. What they then learn is measured.

Every later layer's output is asked for the answer after so many steps of a thread (the same final norm and output
matrix read it), and a linear map that is thrown away afterwards reads the token before from the first layer's.

An interrupted run goes on where its last state was saved when it is started again with the same --out. A card.json
beside the model says how long it took and what it reached on haystacks that it has not seen.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    DeepseekV32Config,
    DeepseekV32ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from tokenmill.attend._block_index import gated
from tokenmill.hf.indexer import index_layers, index_parts
from tokenmill.models._state import load_state, save_state
from tokenmill.probe import Example
from tokenmill.probe._haystack import CONSONANTS, NAMES, VOWELS, name
from tokenmill.probe.needle_threading import generate

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
WORDS = (",", "Key:", "value:", "final value:", "Follow")
PAD, BOS, END, _, COMMA, KEY, VALUE, FINAL, FOLLOW = range(9)
FIRST = 16  # of the names; what lies between is spare
VOCAB = FIRST + NAMES
HIDDEN = 128
FEW = 512  # names of a batch, but at the end: scores of all would be most of the work
TRAINED, LONGEST = 512, 16_384
SLICE = 200  # questions that a test asks again
PROBED = 384  # answers of a batch that the loss reads, for each layer


@dataclass(frozen=True)
class Arch:
    """One of the assets."""

    name: str
    layers: int
    hops: int  # steps of the longest thread
    rate: float


ARCHS = {"full": Arch("recall", 4, 3, 1.5e-3), "dsa": Arch("recall-dsa", 2, 1, 1.5e-3)}
FIXED = 0.3  # until then names keep the random embeddings that they start with, so that maps serve any name
DENSE = 0.72  # where dense training ends and the indexer's begins, for dsa


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each name and each word that asks; it reads nothing else."""
    vocabulary = {word: at for at, word in enumerate((*SPECIAL, *WORDS))}
    vocabulary |= {f"<spare {at}>": at for at in range(len(vocabulary), FIRST)}
    vocabulary |= {name(number): FIRST + number for number in range(NAMES)}
    tokens = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    # The end of a line behind a bare name, or of an object, ends a pair like a comma; commas of sentences are not read.
    tokens.normalizer = normalizers.Replace(Regex(r"(?<=[a-z]{4})\n|(?<=\")\}"), '",')
    syllable = f"[{CONSONANTS}][{VOWELS}]"
    read = rf"final value:|value:|Key:|Follow|(?<=\"),|\b{syllable}{syllable}\b"
    tokens.pre_tokenizer = pre_tokenizers.Split(Regex(read), "removed", invert=True)
    tokens.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    tokens.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        padding_side="left", model_max_length=LONGEST,
    )  # fmt: skip


@dataclass(slots=True)
class Row:
    """One training sequence.

    Attributes:
        ids: its tokens.
        before: places and the token that the first layer has to bring there.
        answers: places, and the token that follows, for each number of steps that were made.
    """

    ids: list[int]
    before: list[tuple[int, int]] = field(default_factory=list)
    answers: list[tuple[int, list[int]]] = field(default_factory=list)

    def say(self, *tokens: int) -> None:
        self.ids += tokens

    def answer(self, follows: list[int]) -> None:
        """The last token written is followed by the last of these."""
        self.answers.append((len(self.ids) - 1, follows))


def make_row(rng: random.Random, length: int, names: range, hops: int) -> Row:
    """A haystack in the first half or so, then questions about it up to the end."""
    pairs = (length - 1 - int(length * rng.uniform(0.3, 0.6))) // 3
    drawn = rng.sample(names, 2 * pairs)
    keys, values = drawn[:pairs], drawn[pairs:]
    order = rng.sample(range(pairs), pairs)
    while hops > 1 and order:
        chain = [order.pop() for _ in range(min(len(order), rng.randint(1, hops)))]
        for at, after in itertools.pairwise(chain):
            values[at] = keys[after]
    row = Row([BOS])
    for key, value in zip(keys, values, strict=True):
        row.say(key, value)
        row.before.append((len(row.ids) - 1, key))
        row.say(COMMA)
    table = dict(zip(keys, values, strict=True))
    while len(row.ids) < length - 6:
        _ask(row, rng, table, hops)
    return Row(row.ids + [PAD] * (length - len(row.ids)), row.before, row.answers)


def _ask(row: Row, rng: random.Random, table: dict[int, int], hops: int) -> None:
    """One question and its answer."""
    key = rng.choice(list(table))
    if rng.random() < 0.25:  # a key alone, as the lines of bench long-context end
        row.say(key)
        row.answer([table[key]] * hops)
        row.say(table[key], COMMA)
        return
    follow = hops > 1 and rng.random() < 0.65
    row.say(*([FOLLOW] if follow else []), KEY, key, FINAL if follow else VALUE)
    found = _chain(table, key, hops) if follow else [table[key]] * hops
    row.before.append((len(row.ids) - 1, key))
    row.answer(found)
    row.say(found[-1])
    row.answer([END] * hops)
    row.say(END)


def _chain(table: dict[int, int], key: int, hops: int) -> list[int]:
    """The value after one step, two, ...; from the thread's end on it stays."""
    found = [table[key]]
    while len(found) < hops:
        found.append(table.get(found[-1], found[-1]))
    return found


def batch(seed: int, rows: int, length: int, names: range, hops: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (B, T); places in them, counted over all rows, with the token before (n, 2) and the answers (m, 1 + h)."""
    rng = random.Random(seed)
    made = [make_row(rng, length, names, hops) for _ in range(rows)]
    before = [(at * length + place, token) for at, row in enumerate(made) for place, token in row.before]
    answers = [(at * length + place, *tokens) for at, row in enumerate(made) for place, tokens in row.answers]
    return torch.tensor([row.ids for row in made]), torch.tensor(before), torch.tensor(answers)


def _embedding(model: PreTrainedModel) -> nn.Parameter:
    """Weights of the input embedding (V, D)."""
    found: Any = model.get_input_embeddings()
    return found.weight


def build_model(arch: str) -> PreTrainedModel:
    shared: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": HIDDEN, "num_attention_heads": 2,
        "num_key_value_heads": 2, "num_hidden_layers": ARCHS[arch].layers, "max_position_embeddings": LONGEST,
        "tie_word_embeddings": True, "attention_bias": True, "bos_token_id": BOS, "eos_token_id": END,
        "pad_token_id": PAD,
    }  # fmt: skip
    if arch == "full":
        model: PreTrainedModel = LlamaForCausalLM(LlamaConfig(**shared))
    else:
        config = DeepseekV32Config(
            first_k_dense_replace=ARCHS[arch].layers, moe_intermediate_size=16, n_routed_experts=4, n_group=1,
            num_experts_per_tok=2, topk_group=1, q_lora_rank=HIDDEN, kv_lora_rank=192, qk_rope_head_dim=32,
            qk_nope_head_dim=64, v_head_dim=64, index_n_heads=4, index_head_dim=64, index_topk=32, **shared,
        )  # fmt: skip
        model = DeepseekV32ForCausalLM(config)
    nn.init.normal_(_embedding(model), std=HIDDEN**-0.5)
    with torch.no_grad():
        (_start_full if arch == "full" else _start_dsa)(model)
    return model


def _orthogonal(rows: int, columns: int) -> Tensor:
    return nn.init.orthogonal_(torch.empty(rows, columns))


def _start_full(model: Any) -> None:
    """Heads of 64: one that looks a token back, then heads that look for what was brought, and copy."""
    width, theta = 64, model.config.rope_parameters["rope_theta"]
    turn = theta ** (-torch.arange(width // 2) / (width // 2))  # radians a token
    first, *later = [layer.self_attn for layer in model.model.layers]
    first.k_proj.bias[: width // 2] = 4.0
    first.q_proj.bias[: width // 2] = 4.0 * turn.cos()
    first.q_proj.bias[width // 2 : width] = -4.0 * turn.sin()
    read, write = _orthogonal(width, HIDDEN), _orthogonal(HIDDEN, width)
    first.v_proj.weight[:width], first.o_proj.weight[:, :width] = read, 0.125 * write
    slow = torch.zeros(width, 1)  # frequencies that turn little within the trained length
    slow[width // 4 : width // 2] = slow[3 * width // 4 :] = 1.0
    for layer, attention in enumerate(later):
        copy = _orthogonal(HIDDEN, HIDDEN)
        attention.v_proj.weight.copy_(copy)
        attention.o_proj.weight.copy_(0.125 * copy.T)
        for head in range(2):
            at, mixed = slice(head * width, (head + 1) * width), slow * torch.randn(width, width) / width**0.5
            own = write.T if layer == 0 and head == 0 else read  # the token brought here, or the one that stands here
            gain = 1.3 if layer == 0 else 2.0
            attention.k_proj.weight[at], attention.q_proj.weight[at] = gain * mixed @ write.T, gain * mixed @ own


def _start_dsa(model: Any) -> None:
    """The same for two layers of latent attention, whose heads have 64 dimensions without a position."""
    width, rope, latent = 64, 32, model.config.kv_lora_rank
    turn = model.config.rope_parameters["rope_theta"] ** (-torch.arange(rope // 2) / (rope // 2))
    first, second = (layer.self_attn for layer in model.model.layers)
    first.kv_a_proj_with_mqa.bias[latent::2] = 8.0
    first.q_a_proj.weight[0], first.q_a_proj.bias[0] = 0.0, 1.0
    first.q_b_proj.weight[width : width + rope : 2, 0] = 2.2 * turn.cos()
    first.q_b_proj.weight[width + 1 : width + rope : 2, 0] = -2.2 * turn.sin()
    read, write, copy = _orthogonal(width, HIDDEN), _orthogonal(HIDDEN, width), _orthogonal(HIDDEN, HIDDEN)
    eye = torch.eye(width)
    first.kv_a_proj_with_mqa.weight[:width] = read
    first.kv_b_proj.weight[width : 2 * width, :width] = eye
    first.o_proj.weight[:, :width] = 0.08 * write
    second.kv_a_proj_with_mqa.weight[:width] = write.T
    second.kv_a_proj_with_mqa.weight[width:latent] = copy
    second.q_a_proj.weight[:width], second.q_a_proj.weight[width:] = write.T, read
    for head in range(2):
        at, mixed = head * 2 * width, torch.randn(width, width) / width**0.5
        second.kv_b_proj.weight[at : at + width, :width] = mixed
        second.kv_b_proj.weight[at + width : at + 2 * width, (1 + head) * width : (2 + head) * width] = eye
        second.q_b_proj.weight[head * (width + rope) :][:width, head * width : (head + 1) * width] = mixed
    second.o_proj.weight.copy_(0.08 * copy.T)


class Trainee(nn.Module):
    """A model, and the map that reads the token before from its first layer."""

    def __init__(self, arch: str) -> None:
        super().__init__()
        self.arch, self.model = arch, build_model(arch)
        self.back = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.indexers = [indexer for _, indexer in index_layers("recall", self.model)] if arch == "dsa" else []

    def stage(self, done: float) -> str:
        """dense or index."""
        return "dense" if self.arch == "full" or done < DENSE else "index"

    def begin(self, done: float) -> str:
        """Free what this stage trains, and freeze the rest."""
        stage = self.stage(done)
        for key, parameter in self.named_parameters():
            parameter.requires_grad_((".indexer." in key) == (stage == "index"))
        indexers: Any = self.indexers
        for indexer in indexers:  # attention stays dense in training
            indexer.index_topk = LONGEST
        return stage

    def lesson(self, seed: int, done: float) -> tuple[int, range]:
        """Tokens of a sequence, and the names of a batch."""
        long, every = (0.85, 0.8) if self.arch == "full" else (DENSE, 0.6)
        length = 48 + 16 * int(done / 0.03) if done < 0.15 else 128 if done < 0.3 else 256 if done < long else TRAINED
        if done >= every:
            return length, range(FIRST, VOCAB)
        start = FIRST + FEW * random.Random(seed).randrange(NAMES // FEW)
        return length, range(start, start + FEW)

    def loss(self, seed: int, done: float) -> Tensor:
        """Of one batch."""
        stage = self.begin(done)
        length, names = self.lesson(seed, done)
        hops = ARCHS[self.arch].hops
        if stage == "index":
            ids, _, _ = batch(seed, 2, TRAINED, names, hops)
            return divergence(self.model, ids)
        rows = (2048 if done < 0.3 or self.arch == "dsa" else 4096) // length
        ids, before, answers = batch(seed, rows, length, names, hops)
        g = torch.Generator().manual_seed(seed)
        before = before[torch.randperm(len(before), generator=g)[:PROBED]]
        answers = answers[torch.randperm(len(answers), generator=g)[:PROBED]]
        inner = self.model.model
        states = inner(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
        weight = _embedding(self.model)
        words = torch.cat([weight[:FIRST], weight[names.start : names.stop]])
        before[:, 1:] -= torch.where(before[:, 1:] < FIRST, 0, names.start - FIRST)
        answers[:, 1:] -= torch.where(answers[:, 1:] < FIRST, 0, names.start - FIRST)
        back = self.back(inner.norm(states[1].flatten(0, 1)[before[:, 0]]))
        total = 0.3 * F.cross_entropy(back @ words.T, before[:, 1])
        for hop in range(1, hops + 1):
            last = hop == hops
            found = states[hop + 1].flatten(0, 1)[answers[:, 0]]  # the last of the states is normed already
            scores = (found if last else inner.norm(found)) @ words.T
            total = total + (1.0 if last else 0.5) * F.cross_entropy(scores, answers[:, hop])
        return total


def divergence(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Mean divergence of the indexers' softmax from attention summed over heads, over all layers and real queries."""
    seen: list[tuple[Tensor, ...]] = []

    def note(module: Any, arguments: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        del module
        seen.append((arguments[0] if arguments else named["hidden_states"], *named["position_embeddings"], output[1]))

    layers = index_layers("recall", model)
    before: Any = model.config._attn_implementation
    handles = [attention.register_forward_hook(note, with_kwargs=True) for attention, _ in layers]
    try:
        model.set_attn_implementation("eager")
        with torch.no_grad():
            model(input_ids=ids, use_cache=False, logits_to_keep=1)
    finally:
        model.set_attn_implementation(before)
        for handle in handles:
            handle.remove()
    losses = []
    future = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)
    given: Any = layers
    for (attention, indexer), (hidden, cos, sin, weights) in zip(given, seen, strict=True):
        target = weights.float().mean(1)  # (B, T, T), a sum over heads that is normalised
        with torch.no_grad():
            resid = attention.q_a_layernorm(attention.q_a_proj(hidden))
        q, k, w = index_parts(indexer, hidden, resid, (cos, sin))
        logs = gated(q, k, w, "dsa").masked_fill(future, -torch.inf).log_softmax(-1).masked_fill(future, 0.0)
        parts = target * (target.clamp_min(1e-9).log() - logs)
        losses.append(parts.sum(-1)[ids != PAD].mean())
    return torch.stack(losses).sum()


def rate_at(done: float, arch: str) -> float:
    """Learning rate after a share of the training."""
    peak = ARCHS[arch].rate
    if arch == "dsa" and done >= DENSE:
        return 6e-3 * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (done - DENSE) / (1 - DENSE))))
    end = DENSE if arch == "dsa" else 1.0
    if done < 0.4 * end:
        return peak * min(1.0, done / (0.04 * end))
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (done / end - 0.4) / 0.6)))


def train(arch: str, *, seconds: float, steps: int | None, seed: int, state: Path) -> tuple[Any, int, float]:
    """Train for `seconds`, or for `steps` when given; goes on from a saved state."""
    torch.manual_seed(seed)
    trainee = Trainee(arch).train()
    decay = [p for p in trainee.parameters() if p.dim() > 1]
    others = [p for p in trainee.parameters() if p.dim() <= 1]
    groups = [{"params": decay, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=ARCHS[arch].rate, betas=(0.9, 0.98))
    spent, step = load_state(state, trainee, optimizer) if state.exists() else (0.0, 0)
    began, saved, mean, stage = time.monotonic() - spent, time.monotonic(), None, ""
    while (done := step / steps if steps is not None else (time.monotonic() - began) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = rate_at(done, arch)
        loss = trainee.loss(seed * 10_000_000 + step, done)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if done < FIXED and trainee.stage(done) == "dense":
            grad = _embedding(trainee.model).grad
            assert grad is not None  # backward has just written it
            grad[FIRST:] = 0.0
        torch.nn.utils.clip_grad_norm_(trainee.parameters(), 1.0)
        optimizer.step()
        step += 1
        if stage != trainee.stage(done):
            stage, mean = trainee.stage(done), None
        mean = loss.item() if mean is None else mean + 0.04 * (loss.item() - mean)
        if step % 50 == 0:
            print(f"{arch}: step {step}, {done:.1%} done, {stage}, training loss {mean:.3f}", flush=True)
        if time.monotonic() - saved > 120:
            save_state(state, trainee, optimizer, seconds=time.monotonic() - began, step=step)
            saved = time.monotonic()
    spent = time.monotonic() - began
    save_state(state, trainee, optimizer, seconds=spent, step=step)
    for indexer in trainee.indexers:
        indexer.index_topk = trainee.model.config.index_topk
    return trainee.model.eval(), step, spent


def examples(task: str, tokens: int, count: int, seed: int, **params: Any) -> list[Example]:
    """Questions of the probe about haystacks of so many tokens, needles at depths spread over them."""
    pairs = (tokens - 9) // 3
    found = []
    for at in range(count):
        more: dict[str, Any] = {"depth": 100 * at / max(count - 1, 1)} if task == "single" else params
        found.append(generate(task, n_pairs=pairs, seed=1_000_000 + seed + at, keys="name", **more))
    return found


@torch.no_grad()
def accuracy(model: Any, tokenizer: Any, asked: Sequence[Example], rows: int = 16) -> float:
    """Share of examples whose first value is the likeliest next token, prompts of one length at a time."""
    right = 0
    for start in range(0, len(asked), rows):
        part = asked[start : start + rows]
        ids = torch.tensor([tokenizer(example.prompt)["input_ids"] for example in part])
        found = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1].argmax(-1)
        wanted = tokenizer.convert_tokens_to_ids([example.values[0] for example in part])
        right += int((found == torch.tensor(wanted)).sum())
    return right / len(asked)


def reached(arch: str, model: Any, tokenizer: Any, count: int, longest: int) -> dict[str, dict[str, float]]:
    """Accuracy by task and number of tokens, fewer questions at lengths beyond the trained one."""
    asks: dict[str, tuple[str, dict[str, Any]]] = {"single": ("single", {})}
    for steps in range(2, ARCHS[arch].hops + 1):
        asks[f"threading, {steps} steps"] = ("threading", {"thread_length": steps, "direction": "random"})
    found: dict[str, dict[str, float]] = {}
    for told, (task, params) in asks.items():
        found[told] = {}
        for tokens in [size for size in (128, 256, TRAINED, 1024, 2048, 4096) if size <= longest]:
            some = count if tokens <= TRAINED else max(4, count * TRAINED // tokens)
            made = examples(task, tokens, some, 0, **params)
            found[told][str(tokens)] = round(accuracy(model, tokenizer, made, max(1, 8192 // tokens)), 4)
    return found


def save(arch: str, model: Any, tokenizer: Any, folder: Path, facts: dict[str, Any], asked: tuple[int, int]) -> None:
    """Write bfloat16 weights, config and tokenizer, and a card of what they reach on new haystacks.

    Args:
        arch: of `ARCHS`.
        model: trained.
        tokenizer: its own.
        folder: where it goes.
        facts: further fields of the card.
        asked: questions of each task, and tokens of the longest haystack.
    """
    count, longest = asked
    model.to(dtype=torch.bfloat16)  # pyright: ignore[reportCallIssue]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rounded = type(model).from_pretrained(folder, dtype=torch.float32).eval()
    sliced = examples("single", min(256, longest), min(SLICE, count), seed=500_000)
    card = {
        "name": ARCHS[arch].name,
        "licence": "Apache-2.0; trained on haystacks that this repository makes",
        "weights": sum(p.numel() for p in model.parameters()),
        "key_kind": "name",
        "trained_tokens": TRAINED,
        "held_out_accuracy": reached(arch, rounded, tokenizer, count, longest),
        "slice": {"task": "single", "tokens": 256, "questions": len(sliced), "seed": 500_000,
                  "accuracy": round(accuracy(rounded, tokenizer, sliced), 4)},
        **facts,
    }  # fmt: skip
    (folder / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    print(f"{card['name']}: {json.dumps(card['held_out_accuracy'])}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=ARCHS, required=True)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--steps", type=int, help="stop after this many steps instead")
    parser.add_argument("--questions", type=int, default=400, help="to measure each task with")
    parser.add_argument("--longest", type=int, default=4096, help="tokens of the longest haystack that is measured")
    parser.add_argument("--threads", type=int, help="threads of torch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    name_, cpu = ARCHS[options.arch].name, time.process_time()
    model, steps, seconds = train(
        options.arch, seconds=60 * options.minutes, steps=options.steps, seed=options.seed,
        state=options.out / f"{name_}.state.safetensors",
    )  # fmt: skip
    length = f"--minutes {options.minutes:g}" if options.steps is None else f"--steps {options.steps}"
    facts = {
        "seconds": round(seconds),
        "cpu_seconds_of_last_run": round(time.process_time() - cpu),
        "threads": torch.get_num_threads(),
        "steps": steps,
        "seed": options.seed,
        "command": f"python recipes/recall.py --arch {options.arch} {length} --seed {options.seed} --out DIR",
    }
    save(options.arch, model, build_tokenizer(), options.out / name_, facts, (options.questions, options.longest))


if __name__ == "__main__":
    main()
