"""Scores of texts and new words, under a word-pooled model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from tokenmill.errors import LimitError

if TYPE_CHECKING:
    from tokenmill.text._word_pooled import WordPooledLM
    from tokenmill.text._word_segmenter import WordSegmenter


@dataclass(frozen=True, slots=True)
class WordScores:
    """What a model says of one text.

    Attributes:
        words: its words, as the model reads them.
        log_probs: of each word with its end, in nats.
        bytes: of the text in UTF-8.
    """

    words: list[str]
    log_probs: list[float]
    bytes: int

    @property
    def bits_per_byte(self) -> float:
        """Bits of the whole text by byte."""
        return -sum(self.log_probs) / math.log(2) / self.bytes


def padded_words(rows: Sequence[tuple[Any, Any]], *, left: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Units (B, T, c), lengths (B, T) and mask (B, T) of several texts' rows."""
    most = max(len(lengths) for _, lengths in rows)
    width = max((units.shape[1] for units, _ in rows), default=1)
    units = torch.zeros(len(rows), most, width, dtype=torch.int64)
    lengths = torch.zeros(len(rows), most, dtype=torch.int64)
    mask = torch.zeros(len(rows), most, dtype=torch.bool)
    for i, (own, sizes) in enumerate(rows):
        here = slice(most - len(sizes), most) if left else slice(len(sizes))
        units[i, here, : own.shape[1]] = torch.as_tensor(own)
        lengths[i, here] = torch.as_tensor(sizes)
        mask[i, here] = True
    return units, lengths, mask


@torch.no_grad()
def score(model: WordPooledLM, segmenter: WordSegmenter, texts: Sequence[str], batch_size: int) -> list[WordScores]:
    """Log-probability of each word of each text, each text behind the start alone.

    Raises:
        LimitError: an empty text.
    """
    for number, text in enumerate(texts):
        if not text:
            raise LimitError("WordPooledLM.score", f"texts[{number}]", "''", "at least one character")
    found: list[WordScores] = []
    for at in range(0, len(texts), batch_size):
        part = texts[at : at + batch_size]
        rows = [segmenter.encode(text) for text in part]
        units, lengths, mask = (t.to(model.device) for t in padded_words(rows))
        logits = model(units, lengths, mask)["logits"]
        width = logits.shape[2] - 1
        targets = model.targets(units[:, :, :width].flatten(0, 1), lengths.flatten())  # (BT, c + 1)
        losses = F.cross_entropy(logits.flatten(0, 2).float(), targets.flatten(), reduction="none")
        by_word = -losses.view(*lengths.shape, -1).sum(-1)
        for i, (text, (own, sizes)) in enumerate(zip(part, rows, strict=True)):
            words = [segmenter.decode(own[t : t + 1], sizes[t : t + 1]) for t in range(len(sizes))]
            found.append(WordScores(words, by_word[i, : len(sizes)].tolist(), len(text.encode())))
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """How a unit is chosen: the likeliest, or by chance."""

    sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise LimitError("WordPooledLM.generate", "temperature", self.temperature, "above 0")
        if self.top_k < 0:
            raise LimitError("WordPooledLM.generate", "top_k", self.top_k, "at least 0, which is no limit")

    def __call__(self, logits: Tensor) -> Tensor:
        """(N,) chosen among (N, V + 1)."""
        if not self.sample:
            return logits.argmax(-1)
        logits = logits.float() / self.temperature
        if self.top_k and self.top_k < logits.shape[1]:
            least = logits.topk(self.top_k, dim=-1).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        return torch.multinomial(logits.softmax(-1), 1, generator=self.generator)[:, 0]


@torch.no_grad()
def generate(
    model: WordPooledLM, segmenter: WordSegmenter, prompts: Sequence[str], *, max_new_words: int, draw: Draw,
    use_cache: bool, on_word: Callable[[int, str], None] | None,
) -> list[str]:  # fmt: skip
    """Texts that go on behind prompts.

    The last word of a prompt may be unfinished: its units are forced as the beginning of the first new word.
    """
    if max_new_words < 1:
        raise LimitError("WordPooledLM.generate", "max_new_words", max_new_words, "at least 1")
    if not prompts:
        return []
    device = model.device
    encoded = [segmenter.encode(prompt) for prompt in prompts]
    # A full last word is closed: nothing can be added to it.
    opened = [len(sizes) > 0 and int(sizes[-1]) < segmenter.c_max for _, sizes in encoded]
    closed = [(u[:-1], s[:-1]) if o else (u, s) for (u, s), o in zip(encoded, opened, strict=True)]
    units, lengths, mask = (t.to(device) for t in padded_words(closed, left=True))
    vectors = model.pool(units, lengths, mask) if units.shape[1] else model.start.new_zeros(len(prompts), 0, 1, 1)
    vectors, mask = _with_start(model, vectors, mask)
    cache = DynamicCache() if use_cache else None
    states, cache = model.read(vectors, mask, cache)
    alive = torch.ones(len(prompts), dtype=torch.bool, device=device)
    beginning, sizes = (t.to(device) for t in _beginnings(encoded, opened, segmenter.c_max))
    none = torch.zeros_like(sizes)
    written: list[tuple[list[list[int]], list[int], list[int]]] = []  # units, where new ones begin, where they end
    for step in range(max_new_words):
        words, lengths = _word(model, states[:, -1], beginning, sizes if step == 0 else none, draw)
        begun = (sizes if step == 0 else none).tolist()
        written.append((words.tolist(), begun, torch.where(alive, lengths, 0).tolist()))
        if on_word is not None:
            for row, new in enumerate(_new(written[-1])):
                if new:
                    on_word(row, segmenter.decode([new], [len(new)]))
        alive &= lengths > 0  # a word of no units ends a text
        if not alive.any() or step == max_new_words - 1:
            break
        one = torch.ones_like(alive)[:, None]
        pooled = model.pool(words[:, None], lengths[:, None], one)
        mask = torch.cat([mask, one], dim=1)
        if cache is None:
            vectors = torch.cat([vectors, pooled], dim=1)
            states, _ = model.read(vectors, mask)
        else:
            states, cache = model.read(pooled, mask, cache, mask[:, :-1].sum(1))
    rows = zip(*(_new(one) for one in written), strict=True)
    return [segmenter.decode(row, [len(new) for new in row]) for row in rows]


def _new(word: tuple[list[list[int]], list[int], list[int]]) -> list[list[int]]:
    """The units of one word of each row that were not in the prompt."""
    return [units[begin:end] for units, begin, end in zip(*word, strict=True)]


def _beginnings(encoded: Sequence[tuple[Any, Any]], opened: Sequence[bool], c_max: int) -> tuple[Tensor, Tensor]:
    """Units (N, c) and their number (N,) of the words that prompts leave open."""
    units, sizes = torch.zeros(len(opened), c_max, dtype=torch.int64), torch.zeros(len(opened), dtype=torch.int64)
    for row, ((own, lengths), is_open) in enumerate(zip(encoded, opened, strict=True)):
        if is_open:
            units[row], sizes[row] = torch.as_tensor(own[-1]), int(lengths[-1])
    return units, sizes


def _with_start(model: WordPooledLM, vectors: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The start before each row's first word, behind its padding."""
    b, t = mask.shape
    p, dim = model.start.shape
    wide = torch.cat([vectors.new_zeros(b, 1, p, dim), vectors.view(b, t, p, dim)], dim=1)
    first = t - mask.sum(1)  # the place in the widened row
    rows = torch.arange(b, device=mask.device)
    wide[rows, first] = model.start.to(wide.dtype)
    seen = F.pad(mask, (1, 0))
    seen[rows, first] = True
    return wide, seen


def _word(model: WordPooledLM, states: Tensor, beginning: Tensor, sizes: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
    """Units (N, c) and lengths (N,) of one word for each state (N, p, D), drawn behind `sizes` given units."""
    p, c, end = model.config.num_prefix, model.config.c_max, model.config.unit_vocab_size
    units, lengths = torch.zeros_like(beginning), torch.zeros_like(sizes)
    running = torch.ones_like(sizes, dtype=torch.bool)
    logits, cache = model.decode(states + model.out_position[:p], None)
    for place in range(c):
        chosen = torch.where(place < sizes, beginning[:, place], draw(logits[:, -1]))
        running = running & (chosen != end)
        units[:, place] = torch.where(running, chosen, 0)
        lengths += running
        if place == c - 1 or not running.any():
            break
        fed = model.embedding(units[:, place])[:, None] + model.out_position[p + place]
        logits, cache = model.decode(fed, cache)
    return units, lengths
