"""Train the vision-language models that visual token pruning is measured on: digits and pages, LLaVA and Qwen2.5-VL.

    python recipes/digits_vlm.py --arch llava --minutes 70 --out runs/vlm
    python recipes/digits_vlm.py --arch qwen2.5-vl --minutes 86 --out runs/vlm
    python recipes/digits_vlm.py --arch pages --minutes 30 --out runs/vlm

The first two answer questions about coloured handwritten digits on cluttered backgrounds
(`tokenmill.corpora.digit_scenes`). They are ordinary classes of transformers, made from their configurations: a CLIP
tower with a class token, a two-layer projector and a Llama decoder, or Qwen2.5-VL's windowed tower, patch merger and
decoder with mRoPE. Each gives 64 visual tokens for a picture and has 8 decoder layers. The third is a smaller LLaVA
that reads pages of rendered entries (`tokenmill.corpora.page_scenes`), for compression by a page's own density.

Training has four stages: the tower and projector learn to name, in the decoder's own words, what each patch belongs
to (features that a classifier of its own can read say nothing to the decoder); then the whole model learns to answer
which digit has a colour and what colour a digit has; then counting and position come in, and the naming of patches
stays in the loss with a small weight; at last the tower and projector are frozen, and three of four batches lack some
of their visual tokens: a random share, other parts of the background than of the things, but something of each thing. A
model that never saw fewer than 64 tokens counts by how much of a picture is background, which any pruning changes, and
one that lacks random tokens alone still does. `--last MODEL` learns the last stage again, from a trained model.

An interrupted run goes on where its last state was saved when it is started again with the same --out. A card.json
beside the model says how long it took and what it reached on pictures of held-out digits.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from tokenmill import corpora
from tokenmill.corpora import Picture
from tokenmill.models import load
from tokenmill.models._state import load_state, save_state
from tokenmill.prune._positions import full_positions

SIDE, PATCH = 8, 8  # visual tokens a side, pixels of each
TOKENS = SIDE * SIDE
BATCH, TURNS = 32, 6
TOWER, PAIRS, WHOLE = 0.12, 0.4, 0.8  # where the first three stages end
LEAST = 0.1  # share of visual tokens that a batch of the last stage has at least
PEAK, FLOOR, WARM_UP = 1.5e-3, 0.02, 0.02
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>", "<vision>", "</vision>", "<video>", "user", "assistant")
DIGITS = tuple("0123456789")
SLICE = 200  # pictures that a test measures again


@dataclass(frozen=True)
class Data:
    """What a model learns: pictures, kinds of questions (those of the second stage first), words that name patches."""

    scenes: Callable[..., list[Picture]]
    kinds: tuple[str, ...]
    first: tuple[str, ...]
    naming: tuple[tuple[str, ...], tuple[str, ...]]
    most: tuple[int, int, int]  # things on a picture when answering begins, a little later, and then
    licence: str


@dataclass(frozen=True)
class Arch:
    """One of the assets."""

    name: str
    family: str
    layers: int  # of the decoder
    before: str  # the picture, as text before the first question
    data: Data


SCENES = Data(
    corpora.digit_scenes,
    corpora.SCENE_KINDS,
    ("colour", "digit"),
    (DIGITS, tuple(corpora.COLOURS)),
    (2, 3, corpora.MOST_DIGITS),
    corpora.DIGITS_LICENCE,
)
PAGES = Data(
    corpora.page_scenes,
    corpora.PAGE_KINDS,
    ("number",),
    (DIGITS, corpora.LETTERS),
    (2, 4, corpora.MOST_ENTRIES),
    "pages that are drawn by this repository",
)
LLAVA_PICTURE = "<s> " + "<image> " * TOKENS
QWEN_PICTURE = "<s> <vision> " + "<image> " * TOKENS + "</vision> "


ARCHS = {
    "llava": Arch("digits-llava", "llava", 8, LLAVA_PICTURE, SCENES),
    "qwen2.5-vl": Arch("digits-qwen2.5-vl", "qwen2.5-vl", 8, QWEN_PICTURE, SCENES),
    "pages": Arch("pages-llava", "llava", 4, LLAVA_PICTURE, PAGES),
}


def build_tokenizer(arch: str) -> PreTrainedTokenizerFast:
    """One token a word: the words of the questions and answers, and the marks of turns and pictures."""
    pictures = ARCHS[arch].data.scenes("train", 400)
    words = {w for p in pictures for q in p.questions for w in f"{q.text} {q.answer}".split()}
    vocabulary = [*SPECIAL, *sorted(words)]
    tokens = Tokenizer(models.WordLevel({word: at for at, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokens.normalizer = normalizers.Lowercase()
    isolated = pre_tokenizers.Split("?", "isolated")
    tokens.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), isolated])
    tokens.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokens,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>", "<vision>", "</vision>", "<video>"],
        padding_side="left",
        model_max_length=512,
    )
    # A content is a text, or a list of pictures and texts; pictures come first, as in training.
    picture = ARCHS[arch].before.strip().removeprefix("<s> ").replace("<image> " * (TOKENS - 1), "") + " "
    made.chat_template = (
        "<s> {% for m in messages %}{% set parts = [{'type': 'text', 'text': m.content}] if m.content is string "
        "else m.content %}{% for p in parts if p.type == 'image' %}" + picture + "{% endfor %}{{ m.role }} "
        "{% for p in parts if p.type == 'text' %}{{ p.text }} {% endfor %}"
        "{% if m.role == 'assistant' %}</s> {% endif %}{% endfor %}{% if add_generation_prompt %}assistant{% endif %}"
    )
    return made


def build_model(arch: str, words: int) -> PreTrainedModel:
    decoder: dict[str, Any] = {
        "vocab_size": words,
        "hidden_size": 128,
        "intermediate_size": 320,
        "num_hidden_layers": ARCHS[arch].layers,
        "num_attention_heads": 8,
        "max_position_embeddings": 1024,
        # Weights of the usual 0.02 give a model of this width attention that is flat for thousands of steps.
        "initializer_range": 128**-0.5,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if ARCHS[arch].family == "llava":
        tower = CLIPVisionConfig(
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=5,
            num_attention_heads=6,
            image_size=SIDE * PATCH,
            patch_size=PATCH,
            projection_dim=96,
        )
        text = LlamaConfig(num_key_value_heads=8, **decoder)
        # The features of the last layer but one, without the class token: LLaVA-1.5's own choice.
        return LlavaForConditionalGeneration(
            LlavaConfig(
                vision_config=tower,
                text_config=text,
                image_token_index=SPECIAL.index("<image>"),
                image_seq_length=TOKENS,
                tie_word_embeddings=True,
            )
        )
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            vision_config={
                "depth": 4,
                "hidden_size": 64,
                "intermediate_size": 160,
                "num_heads": 4,
                "patch_size": PATCH // 2,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
                "window_size": 4 * PATCH,
                "fullatt_block_indexes": [1, 3],
                "out_hidden_size": 128,
                "tokens_per_second": 2,
            },
            # A small base: eight rows and columns have to differ in the slow part of a head of width 16.
            text_config={
                **decoder,
                "num_key_value_heads": 4,
                "rope_parameters": {"rope_type": "default", "rope_theta": 30.0, "mrope_section": [2, 3, 3]},
                "use_sliding_window": False,
            },
            image_token_id=SPECIAL.index("<image>"),
            video_token_id=SPECIAL.index("<video>"),
            vision_start_token_id=SPECIAL.index("<vision>"),
            vision_end_token_id=SPECIAL.index("</vision>"),
            tie_word_embeddings=True,
        )
    )


def build_image_processor(arch: str) -> Any:
    side = SIDE * PATCH
    plain: dict[str, Any] = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    if ARCHS[arch].family == "llava":
        return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side}, **plain)
    return Qwen2VLImageProcessorPil(
        patch_size=PATCH // 2, merge_size=2, temporal_patch_size=2, min_pixels=side**2, max_pixels=side**2, **plain
    )


def dialogue(tokenizer: Any, arch: str, pictures: Sequence[Picture], turns: int) -> dict[str, Tensor]:
    """Right-padded token ids (B, T) of up to `turns` questions a picture.

    ``labels`` hold the answers and their ends; ``early`` the answer where a question names its digit or colour.
    """
    ids, labels, early = [], [], []
    before, naming = ARCHS[arch].before, ARCHS[arch].data.naming
    named = set(tokenizer.convert_tokens_to_ids([word for words in naming for word in words]))
    for picture in pictures:
        row = list(tokenizer(before, add_special_tokens=False)["input_ids"])
        wanted, hints = [-100] * len(row), [-100] * len(row)
        for question in picture.questions[:turns]:
            asked = tokenizer(f"user {question.text} assistant", add_special_tokens=False)["input_ids"]
            answer = tokenizer(f"{question.answer} </s>", add_special_tokens=False)["input_ids"]
            row += asked + answer
            wanted += [-100] * len(asked) + answer
            hints += [answer[0] if token in named else -100 for token in asked] + [-100] * len(answer)
        ids.append(row)
        labels.append(wanted)
        early.append(hints)
    width = max(map(len, ids))

    def padded(rows: list[list[int]], value: int) -> Tensor:
        return torch.tensor([row + [value] * (width - len(row)) for row in rows])

    full, mask = padded(ids, 0), padded([[1] * len(row) for row in ids], 0)
    return {"input_ids": full, "labels": padded(labels, -100), "early": padded(early, -100), "attention_mask": mask}


def patch_labels(arch: str, pictures: Sequence[Picture]) -> list[Tensor]:
    """What each visual token belongs to, for both groups of words: their indices (B, N), one more for background."""
    found = []
    for group, words in enumerate(ARCHS[arch].data.naming):
        labels = torch.full((len(pictures), SIDE, SIDE), len(words))
        for at, picture in enumerate(pictures):
            for thing in picture.things:
                rows, columns = (slice(2 * x, 2 * x + 2) for x in (thing.row, thing.column))
                labels[at, rows, columns] = words.index(thing.names[group])
        found.append(labels.flatten(1))
    return found


class Trainee(nn.Module):
    """The model with the heads that name patches in training and are thrown away after it."""

    def __init__(self, arch: str, tokenizer: Any) -> None:
        super().__init__()
        self.model = build_model(arch, len(tokenizer))
        # The backward pass of fused attention takes most of a step's time on a CPU, at these sizes.
        self.model.set_attn_implementation("eager")
        self.arch = arch
        self.words = [tokenizer.convert_tokens_to_ids(list(names)) for names in ARCHS[arch].data.naming]
        self.background = nn.Linear(128, 2)
        self.sharpness = nn.Parameter(torch.tensor(10.0))
        self.whole = nn.Linear(96, sum(map(len, self.words))) if ARCHS[arch].family == "llava" else None

    def features(self, pixels: dict[str, Tensor]) -> tuple[Any, Tensor, Tensor | None]:
        """The encoder's output as the decoder takes it, the same as (B, N, D), and the class token (B, D) if any."""
        summary: list[Tensor] = []
        inner: Any = self.model.model
        handle = None
        if self.whole is not None:
            # The class token where the features are taken, so that it looks at the digits there.
            layer = inner.vision_tower.encoder.layers[-2]
            handle = layer.register_forward_hook(lambda _m, _i, out: summary.append(_first(out)[:, 0]))
        encoded = inner.get_image_features(**pixels, return_dict=True)
        if handle is not None:
            handle.remove()
        return encoded, torch.stack(tuple(encoded.pooler_output)), summary[0] if summary else None

    def naming_loss(self, tokens: Tensor, summary: Tensor | None, pictures: Sequence[Picture]) -> Tensor:
        embeddings: Any = self.model.get_input_embeddings()
        vocabulary: Tensor = embeddings.weight
        nothing = self.background(tokens).float()
        loss = torch.zeros(())
        for at, (words, wanted) in enumerate(zip(self.words, patch_labels(self.arch, pictures), strict=True)):
            scores = torch.cat([self.sharpness * (tokens @ vocabulary[words].T).float(), nothing[..., at : at + 1]], -1)
            loss = loss + F.cross_entropy(scores.flatten(0, 1), wanted.flatten())
        if self.whole is not None and summary is not None:
            first, second = ARCHS[self.arch].data.naming
            there = torch.zeros(len(pictures), len(first) + len(second))
            for at, picture in enumerate(pictures):
                for one, other in (thing.names for thing in picture.things):
                    there[at, [first.index(one), len(first) + second.index(other)]] = 1
            loss = loss + F.binary_cross_entropy_with_logits(self.whole(summary).float(), there)
        return loss


def _first(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def pixels_of(processor: Any, pictures: Sequence[Picture]) -> dict[str, Tensor]:
    return dict(processor(images=[picture.pixels for picture in pictures], return_tensors="pt"))


def rate_at(done: float) -> float:
    """Learning rate after a share of the training: linear warm-up, a cosine, and a straight line in the last stage."""
    if done < WARM_UP:
        return PEAK * max(done, 0.002) / WARM_UP
    if done >= WHOLE:
        return PEAK / 2 * (FLOOR + (1 - done) / (1 - WHOLE))
    return PEAK * (FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * (done - WARM_UP) / (1 - WARM_UP))))


def kinds_at(data: Data, done: float) -> tuple[str, ...]:
    """Kinds of questions after a share of the training; none in the first stage."""
    return () if done < TOWER else data.first if done < PAIRS else data.kinds


def some_tokens(pictures: Sequence[Picture], generator: torch.Generator) -> Tensor:
    """The same number k of tokens in each picture, (B, k) ascending, with at least one of each thing.

    How the background competes with the things is drawn for each picture, so that shares tell nothing.
    """
    k = round(TOKENS * LEAST ** float(torch.rand((), generator=generator)))
    keys = torch.rand(len(pictures), TOKENS, generator=generator)
    tilt = 3 * torch.rand(len(pictures), generator=generator) - 1.5
    things, firsts = torch.zeros_like(keys), torch.zeros_like(keys)
    for at, picture in enumerate(pictures):
        for thing in picture.things:
            block = torch.zeros(SIDE, SIDE)
            block[2 * thing.row : 2 * thing.row + 2, 2 * thing.column : 2 * thing.column + 2] = 1
            mine = block.flatten()
            things[at] += mine
            firsts[at, int((keys[at] * mine).argmax())] = 1
    return (keys + tilt[:, None] * things + 9 * firsts).topk(k, dim=1).indices.sort(1).values


def fewer(
    model: Any, inputs: dict[str, Tensor], tokens: Tensor, kept: Tensor, labels: Tensor, early: Tensor
) -> tuple[Any, Tensor, Tensor]:
    """The forward of a batch whose pictures have only the tokens ``kept`` (B, k) of theirs (B, N, D).

    Also gives the labels and hints of what is left. Positions stay.
    """
    batch, _, width = tokens.shape
    visual = inputs["input_ids"] == SPECIAL.index("<image>")  # the same columns in every row
    first = int(visual[0].int().argmax())
    text = (~visual[0]).nonzero()[:, 0].expand(batch, -1)
    index = torch.cat([text, first + kept], 1).sort(1).values
    cut = {
        name: value.gather(-1, index if value.dim() == 2 else index.expand(len(value), -1, -1))
        for name, value in inputs.items()
    }
    features: Any = list(tokens.gather(1, kept[..., None].expand(-1, -1, width)))
    out = model(
        **cut, mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=features)}, use_cache=False
    )
    return out, labels.gather(1, index), early.gather(1, index)


def most_at(data: Data, done: float) -> int:
    """Things on a picture at most: answering begins with two, so that guessing among them does not pay for long."""
    few, some, many = data.most
    return few if TOWER <= done < 0.2 else some if TOWER <= done < 0.3 else many


def loss_of(trainee: Trainee, arch: str, tokenizer: Any, processor: Any, step: int, done: float) -> Tensor:
    data = ARCHS[arch].data
    kinds = kinds_at(data, done)
    pictures = data.scenes("train", BATCH, seed=step, kinds=kinds or data.kinds, most=most_at(data, done))
    pixels = pixels_of(processor, pictures)
    last = done >= WHOLE
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.set_grad_enabled(not last):
            encoded, tokens, summary = trainee.features(pixels)
        named = torch.zeros(()) if last else trainee.naming_loss(tokens, summary, pictures)
        if not kinds:
            return named
        asked = dialogue(tokenizer, arch, pictures, TURNS)
        labels, early = asked.pop("labels"), asked.pop("early")
        extra = {}
        if ARCHS[arch].family != "llava":
            extra["image_grid_thw"] = pixels["image_grid_thw"]
            extra["mm_token_type_ids"] = (asked["input_ids"] == SPECIAL.index("<image>")).int()
        if last and step % 4:
            inputs = {**asked, **extra, "position_ids": full_positions(trainee.model, {**asked, **extra})}
            inputs.pop("image_grid_thw", None)
            kept = some_tokens(pictures, torch.Generator().manual_seed(step))
            out, labels, early = fewer(trainee.model, inputs, tokens, kept, labels, early)
        else:
            out = trainee.model(**asked, **extra, mm_encoder_outputs={"image": encoded}, use_cache=False)
    answers = labels[:, 1:] != -100
    answered = F.cross_entropy(out.logits[:, :-1][answers].float(), labels[:, 1:][answers])
    # Looking a picture up takes one step from the word that names the digit, and two from the end of the question:
    # asking for the answer at that word as well shortens the wait from thousands of steps to hundreds.
    hinted = F.cross_entropy(out.logits[early != -100].float(), early[early != -100])
    return answered + hinted + 0.2 * named


def train(
    arch: str,
    tokenizer: Any,
    processor: Any,
    *,
    seconds: float,
    steps: int | None,
    seed: int,
    state: Path,
    last: str | None = None,
) -> tuple[PreTrainedModel, int, float]:
    """Train for `seconds`, or for `steps` when given; goes on from a saved state.

    With ``last``, a trained model, only the last stage is learned, and takes all of that time.
    """
    torch.manual_seed(seed)
    trainee = Trainee(arch, tokenizer).train()
    first = 0.0
    if last is not None:
        found: Any = load(last)[0]
        trainee.model.load_state_dict(found.state_dict())
        first = WHOLE
    decay = [p for p in trainee.parameters() if p.dim() > 1]
    others = [p for p in trainee.parameters() if p.dim() <= 1]
    groups = [{"params": decay, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK, betas=(0.9, 0.98))
    spent, step = load_state(state, trainee, optimizer) if state.exists() else (0.0, 0)
    began, saved, mean = time.monotonic() - spent, time.monotonic(), None
    while (spent := step / steps if steps is not None else (time.monotonic() - began) / seconds) < 1:
        done = first + (1 - first) * spent
        for group in optimizer.param_groups:
            group["lr"] = rate_at(done)
        loss = loss_of(trainee, arch, tokenizer, processor, seed * 10_000_000 + step, done)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainee.parameters(), 1.0)
        optimizer.step()
        step += 1
        mean = loss.item() if mean is None else mean + 0.02 * (loss.item() - mean)
        if step % 50 == 0:
            print(f"{arch}: step {step}, {done:.1%} done, training loss {mean:.3f}", flush=True)
        if time.monotonic() - saved > 120:
            save_state(state, trainee, optimizer, seconds=time.monotonic() - began, step=step)
            saved = time.monotonic()
            if done > TOWER:
                right = accuracy(trainee.model.eval(), arch, tokenizer, processor, 64)
                print({name: round(value[0], 3) for name, value in right.items()}, flush=True)
                trainee.train()
    spent = time.monotonic() - began
    save_state(state, trainee, optimizer, seconds=spent, step=step)
    return trainee.model.eval(), step, spent


@torch.no_grad()
def accuracy(
    model: PreTrainedModel, arch: str, tokenizer: Any, processor: Any, count: int, seed: int = 0
) -> dict[str, tuple[float, int]]:
    """Share of right answers and number of questions, for each kind; one question a prompt, held-out digits."""
    kinds = ARCHS[arch].data.kinds
    right: dict[str, list[bool]] = {kind: [] for kind in kinds}
    pictures = ARCHS[arch].data.scenes("test", count, seed=seed)
    for start in range(0, count, 50):
        part = pictures[start : start + 50]
        # Each picture is asked one question of each kind that it has.
        for kind in kinds:
            asked = [
                Picture(p.id, p.pixels, tuple(q for q in p.questions if q.kind == kind)[:1])
                for p in part
                if any(q.kind == kind for q in p.questions)
            ]
            inputs = dialogue(tokenizer, arch, asked, 1)
            labels = inputs.pop("labels")
            inputs.pop("early")
            extra = dict(pixels_of(processor, asked))
            if ARCHS[arch].family != "llava":
                extra["mm_token_type_ids"] = (inputs["input_ids"] == SPECIAL.index("<image>")).int()
            logits = model(**inputs, **extra, use_cache=False).logits
            first = (labels != -100).int().argmax(1)  # where the answer stands
            rows = torch.arange(len(asked))
            right[kind] += (logits[rows, first - 1].argmax(-1) == labels[rows, first]).tolist()
    return {kind: (sum(found) / len(found), len(found)) for kind, found in right.items()}


def save(
    arch: str, model: PreTrainedModel, tokenizer: Any, processor: Any, folder: Path, facts: dict[str, Any], count: int
) -> None:
    """Write bfloat16 weights, configurations and tokenizer, and a card of what they reach on held-out digits."""
    model.to(dtype=torch.bfloat16)  # pyright: ignore[reportCallIssue]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor.save_pretrained(folder)
    rounded = type(model).from_pretrained(folder, dtype=torch.float32).eval()
    reached = accuracy(rounded, arch, tokenizer, processor, count)
    sliced = accuracy(rounded, arch, tokenizer, processor, min(SLICE, count), seed=1)
    card = {
        "name": ARCHS[arch].name,
        "licence": f"Apache-2.0; trained on {ARCHS[arch].data.licence}",
        "weights": sum(p.numel() for p in model.parameters()),
        "prompt": ARCHS[arch].before.strip().replace("<image> " * (TOKENS - 1), "") + " user QUESTION assistant",
        "visual_tokens": TOKENS,
        "held_out_accuracy": {kind: round(share, 4) for kind, (share, _) in reached.items()},
        "held_out_questions": {kind: number for kind, (_, number) in reached.items()},
        "slice": {"pictures": SLICE, "seed": 1, "accuracy": {k: round(share, 4) for k, (share, _) in sliced.items()}},
        **facts,
    }
    (folder / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    print(f"{card['name']}: {card['held_out_accuracy']}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=ARCHS, required=True)
    parser.add_argument("--minutes", type=float, default=80)
    parser.add_argument("--steps", type=int, help="stop after this many steps instead")
    parser.add_argument("--last", metavar="MODEL", help="learn only the last stage, from an asset or a folder")
    parser.add_argument("--pictures", type=int, default=1000, help="held-out pictures to measure on")
    parser.add_argument("--threads", type=int, help="threads of torch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    name = ARCHS[options.arch].name
    tokenizer, processor = build_tokenizer(options.arch), build_image_processor(options.arch)
    cpu = time.process_time()
    model, steps, seconds = train(
        options.arch,
        tokenizer,
        processor,
        seconds=60 * options.minutes,
        steps=options.steps,
        seed=options.seed,
        state=options.out / f"{name}.state.safetensors",
        last=options.last,
    )
    facts = {
        "seconds": round(seconds),
        "cpu_seconds_of_last_run": round(time.process_time() - cpu),
        "threads": torch.get_num_threads(),
        "steps": steps,
        "pictures_seen": steps * BATCH,
        "seed": options.seed,
        "command": f"python recipes/digits_vlm.py --arch {options.arch} --minutes {options.minutes:g} "
        f"--seed {options.seed} --out DIR",
    }
    save(options.arch, model, tokenizer, processor, options.out / name, facts, options.pictures)


if __name__ == "__main__":
    main()
