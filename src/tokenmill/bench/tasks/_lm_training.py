"""Train a small causal language model on texts that a recipe turned into tokens, and ask what it has learnt."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from tokenmill.bench.tasks._langgame import OPTIONS, Question
from tokenmill.text import TokenBytes

Ints = NDArray[np.int64]
_IGNORED = -100
_RIDGE = 1e-2


@dataclass(frozen=True, slots=True)
class Document:
    """A training text and its canonical tokens."""

    text: str
    ids: Ints


class Recipe(Protocol):
    """What a method does to the training texts. `epoch` counts the passes over them."""

    def __call__(self, documents: Sequence[Document], epoch: int, /) -> list[Ints]: ...


def canonical(documents: Sequence[Document], epoch: int, /) -> list[Ints]:  # noqa: ARG001
    """The recipe of plain: the tokens as the tokenizer gives them."""
    return [document.ids for document in documents]


def small_llama(vocab: int, *, width: int, layers: int, context: int, seed: int) -> Any:
    """A random Llama with tied embeddings; the global random state is left as it was."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=width * 5 // 2,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 32),
        num_key_value_heads=max(1, width // 32),
        max_position_embeddings=max(context, 256),
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


class Windows:
    """Batches of windows of tokens, pass after pass over the documents, shuffled by the seed.

    Attributes:
        tokens: how many tokens the recipe has given, separators left out.
        plain: how many the documents have in as many passes.
    """

    def __init__(self, documents: Sequence[Document], recipe: Recipe, *, context: int, end: int, seed: int) -> None:
        self.documents, self.recipe = documents, recipe
        self.context, self.end, self.seed = context, end, seed
        self.tokens = self.plain = 0

    def batches(self, size: int) -> Iterator[Tensor]:
        """(size, context + 1) int64 without end.

        Raises:
            ValueError: the documents do not fill one batch.
        """
        epoch, generator = 0, np.random.default_rng(self.seed)
        while True:
            windows = self._windows(epoch)
            if len(windows) < size:
                raise ValueError(f"the texts give {len(windows)} windows of {self.context} tokens, a batch has {size}")
            order = generator.permutation(len(windows))
            for at in range(0, len(order) - size + 1, size):
                yield torch.from_numpy(windows[order[at : at + size]])
            epoch += 1

    def _windows(self, epoch: int) -> Ints:
        rows = self.recipe(self.documents, epoch)
        self.tokens += sum(map(len, rows))
        self.plain += sum(len(document.ids) for document in self.documents)
        stop = np.array([self.end])
        stream = np.concatenate([part for row in rows for part in (row, stop)])
        step = self.context + 1
        return stream[: len(stream) // step * step].reshape(-1, step)


def next_token_loss(model: Any, batch: Any) -> Tensor:
    """Of ids (B, T), or of ids and labels with -100 where there is no loss."""
    ids, labels = batch if isinstance(batch, tuple) else (batch, batch)
    logits = model(ids[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=_IGNORED)


def train(
    model: Any, batches: Iterator[Any], steps: int, rate: float, loss_of: Callable[[Any, Any], Tensor] = next_token_loss
) -> float:
    """Train with AdamW, warm-up for a tenth of the steps, then a cosine; mean loss of the last tenth."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1)
    warm = max(1, steps // 10)
    model.train()
    losses = []
    for step in range(steps):
        batch = next(batches)
        share = min(1.0, (step + 1) / warm) * (0.1 + 0.45 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate * share
        loss = loss_of(model, batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    model.eval()
    last = losses[-max(1, steps // 10) :]
    return sum(last) / len(last)


@torch.no_grad()
def bits_per_byte(model: Any, view: TokenBytes, rows: Sequence[Ints], *, context: int, end: int) -> float:
    """Of held-out texts in their canonical tokens; the separators are not counted as bytes, and cost nothing."""
    stream = np.concatenate([part for row in rows for part in (np.array([end]), row)])
    bits = 0.0
    for at in range(0, len(stream) - 1, context):
        part = torch.from_numpy(stream[at : at + context + 1])
        targets = part[1:].clone()
        targets[targets == end] = _IGNORED
        logits = model(part[None, :-1], use_cache=False).logits[0]
        bits += float(F.cross_entropy(logits.double(), targets, ignore_index=_IGNORED, reduction="sum")) / math.log(2)
    counted = stream[1:]
    return bits / int(view.lengths[counted[counted != end]].sum())


def tuning_batches(
    view: TokenBytes, asked: Sequence[Question], size: int, end: int, rng: random.Random
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of questions with their answers, the loss on the answers alone, without end."""
    encoded = [(view.encode(q.prompt), [*view.encode(f" {q.options[q.answer]}"), end]) for q in asked]
    while True:
        rows = [(p + a, [_IGNORED] * len(p) + a) for p, a in rng.sample(encoded, min(size, len(encoded)))]
        yield _padded([ids for ids, _ in rows], end), _padded([labels for _, labels in rows], _IGNORED)


@torch.no_grad()
def answers(model: Any, view: TokenBytes, asked: Sequence[Question], end: int) -> list[bool]:
    """Whether the likeliest option, by the log-likelihood of its tokens behind the prompt, is right."""
    found = []
    for q in asked:
        prompt = view.encode(q.prompt)
        tails = [[*view.encode(f" {option}"), end] for option in q.options]
        ids = _padded([prompt + tail for tail in tails], end)
        labels = _padded([[_IGNORED] * len(prompt) + tail for tail in tails], _IGNORED)[:, 1:]
        logits = model(ids[:, :-1], use_cache=False).logits
        losses = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=_IGNORED, reduction="none")
        found.append(int(losses.sum(1).argmin()) == q.answer)
    return found


def normalised(accuracy: float) -> float:
    """0 for guessing among the options, 1 for all right."""
    return (OPTIONS * accuracy - 1) / (OPTIONS - 1)


@torch.no_grad()
def spelling(model: Any, view: TokenBytes, seed: int) -> dict[str, float]:
    """What a ridge regression reads off the input embeddings of tokens it has not seen, one in five.

    Returns:
        "first_letter" and "last_letter", accuracies; "length_r2", the share of variance explained.
    """
    words = [(i, t.strip().lower()) for i, t in enumerate(view.tokens) if t and t.strip().isalpha() and t.isascii()]
    words = [(i, t) for i, t in words if len(t) >= 2]
    if len(words) < 20:
        return {}
    random.Random(seed).shuffle(words)
    x = model.get_input_embeddings().weight[[i for i, _ in words]].double()
    cut = len(words) * 4 // 5
    x = (x - x[:cut].mean(0)) / (x[:cut].std(0) + 1e-9)
    first, last = (torch.tensor([t[at] - 97 for _, t in words]) for at in (0, -1))
    length = torch.tensor([len(t) for _, t in words], dtype=torch.float64)
    gram = x[:cut].T @ x[:cut] + _RIDGE * cut * torch.eye(x.shape[1], dtype=torch.float64)

    def predicted(y: Tensor) -> Tensor:
        mean = y[:cut].mean(0)
        return x[cut:] @ torch.linalg.solve(gram, x[:cut].T @ (y[:cut] - mean)) + mean

    found = {}
    for name, letters in (("first_letter", first), ("last_letter", last)):
        guess = predicted(F.one_hot(letters, 26).double()).argmax(1)
        found[name] = float((guess == letters[cut:]).double().mean())
    rest = length[cut:]
    error = ((predicted(length[:, None])[:, 0] - rest) ** 2).sum()
    return found | {"length_r2": float(1 - error / ((rest - rest.mean()) ** 2).sum().clamp_min(1e-9))}


def _padded(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (longest - len(row))] for row in rows])
