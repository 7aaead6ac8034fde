"""Small language models over bytes, characters, subwords and pooled words: batches, FLOPs, losses, held-out words."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from tokenmill.bench.tasks._lm_training import small_llama
from tokenmill.text._word_generation import padded_words
from tokenmill.text._word_segmenter import WordSegmenter

_IGNORED = -100
BUCKETS = ("unseen", "rare", "some", "frequent")
_EDGES = (0, 5, 50)  # occurrences in the training texts up to which a bucket reaches


class Subject(Protocol):
    """A model with its units: what training and the look at held-out texts need."""

    model: Any

    def batch(self, pieces: Sequence[str], /) -> Any: ...
    def flops(self, batch: Any, /) -> float: ...
    def loss(self, model: Any, batch: Any, /) -> Tensor: ...
    def held_out(self, pieces: Sequence[str], /) -> list[tuple[float, list[bool]]]: ...


def batches(subject: Subject, pieces: Sequence[str], size: int, seed: int) -> Iterator[Any]:
    """Batches of pieces without end, every pass in another order; the same pieces for every subject."""
    rng = random.Random(seed)
    while True:
        order = rng.sample(range(len(pieces)), len(pieces))
        for at in range(0, len(order) - size + 1, size):
            yield subject.batch([pieces[i] for i in order[at : at + size]])


def llama_flops(model: Any, sequences: int, length: int) -> float:
    """Multiply-adds times two of one forward pass, attention causal; embedding look-ups cost nothing."""
    config = model.config
    blocks = sum(p.numel() for p in model.model.layers.parameters() if p.ndim == 2)
    head = config.hidden_size * config.vocab_size
    attention = config.num_hidden_layers * 2 * length * config.hidden_size  # scores and values, half of them masked
    return 2.0 * sequences * length * (blocks + head + attention / 2)


class UnitLM:
    """A Llama over units: bytes, characters, or the tokens of a tokenizer; 0 to V - 1, and V as the start.

    Args:
        encode: text -> units.
        bytes_of: unit -> its bytes.
        size: V.
    """

    def __init__(
        self, encode: Callable[[str], Sequence[int]], bytes_of: Callable[[int], bytes], size: int, *, width: int,
        layers: int, context: int, seed: int,
    ) -> None:  # fmt: skip
        self.encode, self.bytes_of, self.size = encode, bytes_of, size
        self.model = small_llama(size + 1, width=width, layers=layers, context=context, seed=seed)

    def batch(self, pieces: Sequence[str], /) -> Tensor:
        """(B, 1 + L) units behind the start, -100 behind the end."""
        rows = [torch.tensor([self.size, *self.encode(piece)]) for piece in pieces]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=_IGNORED)

    def flops(self, batch: Tensor, /) -> float:
        """Of one forward pass."""
        return llama_flops(self.model, batch.shape[0], batch.shape[1] - 1)

    def loss(self, model: Any, batch: Tensor, /) -> Tensor:
        """Mean cross entropy of a unit; padding stands on the right, where causal attention does not see it."""
        logits = model(input_ids=batch[:, :-1].clamp(min=0), use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), ignore_index=_IGNORED)

    @torch.no_grad()
    def held_out(self, pieces: Sequence[str], /) -> list[tuple[float, list[bool]]]:
        """For each piece its nats, and for each of its words whether the likeliest units write it and then end it."""
        found = []
        for piece in pieces:
            batch = self.batch([piece])
            logits = self.model(input_ids=batch[:, :-1], use_cache=False).logits[0]
            targets = batch[0, 1:]
            nats = float(F.cross_entropy(logits, targets, reduction="sum"))
            best = logits.argmax(-1)
            right = (best == targets).tolist()
            ends = np.cumsum([len(self.bytes_of(int(unit))) for unit in targets])
            found.append((nats, self._words(piece, right, best.tolist(), ends)))
        return found

    def _words(self, piece: str, right: list[bool], best: list[int], ends: NDArray[np.int64]) -> list[bool]:
        words = _SEGMENTER.words(piece)
        stops = np.cumsum([len(word.encode()) for word in words])
        first = np.searchsorted(ends, stops - [len(word.encode()) for word in words], side="right")
        last = np.searchsorted(ends, stops, side="left")  # the unit that completes the word
        made = []
        for word, a, b, stop in zip(words, first.tolist(), last.tolist(), stops.tolist(), strict=True):
            ok = all(right[a : b + 1])
            if ok and ends[b] == stop and b + 1 < len(best):
                # What would be written next must not go on with the word.
                unit = best[b + 1]
                ok = unit == self.size or _begins_anew(word, self.bytes_of(unit))
            made.append(ok)
        return made


_SEGMENTER = WordSegmenter()


def _begins_anew(word: str, following: bytes) -> bool:
    """Whether bytes behind a word begin another one; the beginning of a character counts as a letter."""
    text = following.decode("utf-8", "ignore") or "é"
    return _SEGMENTER.words(word + text)[0] == word


class PooledLM:
    """A word-pooled model."""

    def __init__(
        self, method: Any, segmenter: WordSegmenter, *, width: int, layers: int, words: int, seed: int
    ) -> None:
        backbone = small_llama(1, width=width, layers=layers, context=words * method.num_prefix, seed=seed).config
        self.segmenter = segmenter
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = method.model(segmenter, backbone)

    def batch(self, pieces: Sequence[str], /) -> tuple[Tensor, Tensor, Tensor]:
        """Units, lengths and mask of the words."""
        return padded_words([self.segmenter.encode(piece) for piece in pieces])

    def flops(self, batch: tuple[Tensor, Tensor, Tensor], /) -> float:
        """Of one forward pass: what is computed, padding inside words included."""
        units, lengths, mask = batch
        config, dim = self.model.config, self.model.config.hidden_size
        encoder = sum(p.numel() for p in self.model.encoder.parameters() if p.ndim == 2)
        decoder = sum(p.numel() for p in self.model.decoder.parameters() if p.ndim == 2)
        coded = written = 0.0
        for rows, width in self.model.by_length(lengths[:, :-1][mask[:, :-1]]):
            canvas = config.num_prefix + width  # 2 canvas D multiply-adds of a position: scores and values
            coded += len(rows) * canvas * (encoder + config.enc_layers * 2 * canvas * dim)
        for rows, width in self.model.by_length(lengths[mask]):
            canvas = config.num_prefix + width
            written += len(rows) * canvas * (decoder + config.dec_layers * canvas * dim)
            written += len(rows) * canvas * dim * (config.unit_vocab_size + 1)
        own = self.model.backbone
        blocks = sum(p.numel() for p in own.layers.parameters() if p.ndim == 2)
        length = units.shape[1] * config.num_prefix
        read = units.shape[0] * length * (blocks + own.config.num_hidden_layers * length * dim)
        return 2.0 * (coded + written + read)

    def loss(self, model: Any, batch: tuple[Tensor, Tensor, Tensor], /) -> Tensor:
        """Mean cross entropy of a unit or an end."""
        return model(*batch, labels=True)["loss"]

    @torch.no_grad()
    def held_out(self, pieces: Sequence[str], /) -> list[tuple[float, list[bool]]]:
        """As `UnitLM.held_out`; a word of several rows is right when all are."""
        found = []
        for piece in pieces:
            units, lengths, mask = self.batch([piece])
            logits = self.model(units, lengths, mask)["logits"][0]  # (T, c + 1, V + 1)
            targets = self.model.targets(units[0, :, : logits.shape[1] - 1], lengths[0])
            nats = float(F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"))
            right = ((logits.argmax(-1) == targets) | (targets == _IGNORED)).all(1).tolist()
            rows = np.cumsum([len(self._rows(word)) for word in self.segmenter.words(piece)]).tolist()
            found.append((nats, [all(right[a:b]) for a, b in zip([0, *rows], rows, strict=False)]))
        return found

    def _rows(self, word: str) -> NDArray[np.int64]:
        return self.segmenter.encode(word)[1]


@dataclass(slots=True)
class Words:
    """Which words of the held-out pieces were right, by how often the training texts hold them.

    Attributes:
        asked: bucket -> words.
        right: bucket -> words that were right.
    """

    asked: Counter[str] = field(default_factory=Counter)
    right: Counter[str] = field(default_factory=Counter)

    def add(self, words: Sequence[str], right: Sequence[bool], counts: Counter[str]) -> None:
        """Count the words of one piece."""
        for word, ok in zip(words, right, strict=True):
            bucket = BUCKETS[sum(counts[word] > edge for edge in _EDGES)]
            self.asked[bucket] += 1
            self.right[bucket] += ok

    def shares(self) -> dict[str, float]:
        """Accuracy over all words, and for each bucket that has any."""
        found = {"next_word": self.right.total() / self.asked.total()}
        return found | {f"next_word_{b}": self.right[b] / self.asked[b] for b in BUCKETS if self.asked[b]}


def measured(subject: Subject, pieces: Sequence[str], counts: Counter[str]) -> dict[str, float]:
    """Bits per byte and next-word accuracy on held-out pieces."""
    nats, size, words = 0.0, 0, Words()
    for piece, (cost, right) in zip(pieces, subject.held_out(pieces), strict=True):
        nats += cost
        size += len(piece.encode())
        words.add(_SEGMENTER.words(piece), right, counts)
    return {"bits_per_byte": nats / math.log(2) / size, **words.shares()}


def word_counts(pieces: Sequence[str]) -> Counter[str]:
    """How often each word stands in the pieces."""
    counts: Counter[str] = Counter()
    for piece in pieces:
        counts.update(_SEGMENTER.words(piece))
    return counts
