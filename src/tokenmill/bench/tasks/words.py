"""Task `words`: small language models over units, words and subwords, trained at equal compute.

Texts are cut into pieces of some hundred bytes; a piece is what a model sees at once, so that all have the same context
in bytes, and all get the same pieces in the same order until their compute is spent. Compute is counted by formula
(matrix products and attention of every part, three times a forward pass), so a busy machine changes nothing. ``plain``
reads the tokens of a byte-level BPE that is trained here; ``byte`` and ``char`` read bytes and characters. An item is a
seed. A next word is right when the likeliest units write all of it and then begin another.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tokenmill import catalog
from tokenmill.bench.task import Item, MethodSpec, Metric, NoSettings, Outcome, Scalar, read_spec
from tokenmill.bench.texts import Source, sources
from tokenmill.errors import LimitError

_WHERE = "bench words"
_BASELINES: dict[str, Any] = dict.fromkeys(("plain", "byte", "char"), NoSettings)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the task `words` can be asked for.

    Attributes:
        data: names of corpora, or your own file of JSON lines with "text" and, if you like, "kind" and "id".
        gigaflops: of a training.
        width: of the models.
        layers: of the language model; a pooled one has an encoder and a decoder of words besides.
        context: bytes of a piece at most.
        batch: pieces of a step.
        rate: learning rate at its highest.
        vocab_size: of the subwords.
        train_bytes: of training text at most.
        test_bytes: of held-out text at most.
        limit: seeds, each a training.
        repeats: timings of each training; their median counts.
        seed: the first seed.
    """

    data: str = "python-stdlib,python-reference"
    gigaflops: int = 6_000
    width: int = 128
    layers: int = 8
    context: int = 512
    batch: int = 4
    rate: float = 2e-3
    vocab_size: int = 4096
    train_bytes: int = 3_000_000
    test_bytes: int = 60_000
    limit: int = 3
    repeats: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if isinstance(value, int) and value < (0 if name == "seed" else 1):
                raise LimitError(_WHERE, name, value, f"at least {0 if name == 'seed' else 1}")
        if not 0 < self.rate < 1:
            raise LimitError(_WHERE, "rate", self.rate, "in (0, 1)")
        if self.width % 32:
            raise LimitError(_WHERE, "width", self.width, "a multiple of 32, the width of a head")


class Task:
    """Language models from scratch, each with the same compute."""

    name = "words"
    BASELINES = tuple(_BASELINES)
    METRICS: Mapping[str, Metric] = {
        "bits_per_byte": Metric("bits per byte of held-out text", "lower"),
        "next_word": Metric("next word right", "higher"),
        "next_word_unseen": Metric("the same, words that training has not", "higher"),
        "next_word_rare": Metric("the same, 1 to 5 times in training", "higher"),
        "next_word_some": Metric("the same, 6 to 50 times", "higher"),
        "next_word_frequent": Metric("the same, more often", "higher"),
    }

    def __init__(self, options: Options) -> None:
        self.options = options

    def model_name(self) -> str:
        return f"llama of {self.options.layers} layers of {self.options.width}"

    def weights(self) -> str:
        return "trained here in float32"

    def settings(self) -> dict[str, Scalar]:
        """The options that tell two measurements of a method apart."""
        names = ("gigaflops", "context", "batch", "rate", "vocab_size", "train_bytes", "test_bytes")
        return {k: getattr(self.options, k) for k in names}

    def kinds(self) -> list[str]:
        return list(self._sources)

    def data(self, kind: str, /) -> dict[str, str]:
        source = self._sources[kind]
        return {"name": source.name, "kind": kind, "sha256": source.sha256, "split": source.split}

    def items(self, kind: str, /) -> list[Item]:
        """One a seed."""
        first = self.options.seed
        return [Item(f"seed {seed}", kind, seed) for seed in range(first, first + self.options.limit)]

    def check(self, spec: MethodSpec, /) -> MethodSpec:
        """The spec with its settings as values, refused before anything is trained when it cannot work.

        Raises:
            LimitError: unknown method or setting, or a value outside its limit.
            UnsupportedError: a method of another task.
        """
        params, card = read_spec(self.name, _BASELINES, spec)
        if card is not None:
            made = catalog.method(card.slug)(**params)
            for name in ("enc_heads", "dec_heads"):
                if self.options.width % getattr(made, name):
                    raise LimitError(_WHERE, name, getattr(made, name), f"a divisor of width={self.options.width}")
        return MethodSpec(spec.slug, params)

    def subject(self, spec: MethodSpec, kind: str, /) -> _Training:
        """The method, ready to train; the texts are read here."""
        return _Training(self, spec, self.pieces(kind, "train"), self.pieces(kind, "test"))

    def quality(self, item: Item, plain: Outcome, ours: Outcome, /) -> dict[str, float]:  # noqa: ARG002
        return {name: value for name, value in ours.output.items() if name in self.METRICS}

    def derive(self, totals: Mapping[str, float], /) -> dict[str, float]:  # noqa: ARG002
        return {}

    def pieces(self, kind: str, split: str) -> list[str]:
        """The texts of a split in pieces of at most `context` bytes, cut at line ends, in an order of their own."""
        texts = self._sources[kind].texts.get(split) or {}
        names = sorted(texts)
        random.Random(0).shuffle(names)  # the files of a small share are of all folders
        most = self.options.train_bytes if split == "train" else self.options.test_bytes
        found: list[str] = []
        for name in names:
            for piece in _pieces(texts[name], self.options.context):
                most -= len(piece.encode())
                if most < 0:
                    break
                found.append(piece)
        if len(found) < (self.options.batch if split == "train" else 1):
            what = f"{len(found)} pieces of kind {kind}, split {split}"
            raise LimitError(_WHERE, "data", what, f"at least a batch of {self.options.batch}")
        return found

    @cached_property
    def _sources(self) -> dict[str, Source]:
        return sources(_WHERE, self.options.data, 50)


class _Training:
    """One method: trains a model from each item's seed until its compute is spent."""

    def __init__(self, task: Task, spec: MethodSpec, train: list[str], test: list[str]) -> None:
        from ._word_models import word_counts

        self.task, self.spec, self.train, self.test = task, spec, train, test
        self.counts: Counter[str] = word_counts(train)

    def run(self, item: Item, /) -> Outcome:
        from . import _word_models as words
        from ._lm_training import train

        o, seed = self.task.options, int(item.content)
        subject = self._made(seed)
        given = words.batches(subject, self.train, o.batch, seed)
        sample = [subject.flops(next(given)) for _ in range(20)]
        each = 3 * sum(sample) / len(sample)  # a backward pass costs two forward passes
        steps = max(1, round(1e9 * o.gigaflops / each))
        spent: list[float] = []

        def loss(model: Any, batch: Any) -> Any:
            spent.append(3 * subject.flops(batch))
            return subject.loss(model, batch)

        last = train(subject.model, words.batches(subject, self.train, o.batch, seed), steps, o.rate, loss)
        found = words.measured(subject, self.test, self.counts)
        counts = {"steps": steps, "gigaflops": sum(spent) / 1e9, "loss": last}
        counts["weights"] = sum(p.numel() for p in subject.model.parameters())
        return Outcome(found, {k: float(v) for k, v in counts.items()})

    def _made(self, seed: int) -> Any:
        from ._word_models import PooledLM, UnitLM

        o, slug = self.task.options, self.spec.slug
        shape = {"width": o.width, "layers": o.layers, "seed": seed}
        if slug == "plain":
            view = self._subwords
            return UnitLM(view.encode, lambda unit: view[unit] or b"", len(view), context=o.context + 1, **shape)
        if slug in ("byte", "char"):
            segmenter = self._characters if slug == "char" else _bytes()
            return UnitLM(
                lambda text: segmenter.flat(text).tolist(), segmenter.bytes, segmenter.size, context=o.context + 1,
                **shape,
            )  # fmt: skip
        own = {"dropout": 0.0, **self.spec.params}
        method = catalog.method(slug)(**own)
        tokenizer = self._tokenizer.backend_tokenizer if method.base == "sub" else None
        segmenter = method.segmenter(self.train, tokenizer=tokenizer)
        return PooledLM(method, segmenter, words=o.context + 1, **shape)

    @cached_property
    def _tokenizer(self) -> Any:
        from tokenmill.text import train_domain_bpe

        size = self.task.options.vocab_size
        return train_domain_bpe(self.train, size, custom_tokens="empty", normalization="none", short="fill")

    @cached_property
    def _subwords(self) -> Any:
        from tokenmill.text import TokenBytes

        return TokenBytes.of(self._tokenizer)

    @cached_property
    def _characters(self) -> Any:
        from tokenmill.text import WordSegmenter

        return WordSegmenter.of_characters(self.train, least=2)


def _bytes() -> Any:
    from tokenmill.text import WordSegmenter

    return WordSegmenter()


def _pieces(text: str, most: int) -> list[str]:
    """Whole lines of at most so many bytes together; a line that is longer by itself is left out."""
    found, size = [[]], 0
    for line in text.splitlines(keepends=True):
        n = len(line.encode())
        if n > most:
            continue
        if size + n > most:
            found.append([])
            size = 0
        found[-1].append(line)
        size += n
    return ["".join(lines) for lines in found if lines]
