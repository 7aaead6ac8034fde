"""Task `lm`: a small language model is trained on a method's tokens, as many steps as on the ordinary ones.

What is measured is the model, always on the ordinary tokens: bits per byte of held-out texts; what its embeddings tell
about the spelling of tokens; and, after a short tuning on questions about letters, how many such questions it answers.
An item is a seed of weights, order and draws. ``bpe-dropout`` encodes the training texts with merges skipped at random.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from tokenmill import catalog
from tokenmill.bench.task import Item, MethodSpec, Metric, NoSettings, Outcome, Scalar, read_spec
from tokenmill.bench.texts import Source, sources
from tokenmill.errors import LimitError, UnsupportedError

from . import _langgame as game

if TYPE_CHECKING:
    from . import _lm_training as training

_PART = 2000  # bytes of a training text at most: files are cut at line ends


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the task `lm` can be asked for.

    Attributes:
        tokenizer: an embedded model, a folder, or a transformers id whose tokenizer is used.
        data: names of corpora, or your own file of JSON lines with "text" and, if you like, "kind" and "id".
        width: of the model.
        layers: of the model.
        context: tokens of a window.
        batch: windows of a step.
        steps: of the training.
        rate: learning rate at its highest.
        tuning_steps: on questions, behind the training; 0 asks none.
        questions: that are asked at the end.
        train_bytes: of training text at most.
        test_bytes: of held-out text at most.
        limit: seeds, each a training.
        repeats: timings of each training; their median counts.
        seed: the first seed.
    """

    tokenizer: str = "python-target"
    data: str = "python-stdlib"
    width: int = 128
    layers: int = 2
    context: int = 128
    batch: int = 8
    steps: int = 400
    rate: float = 2e-3
    tuning_steps: int = 200
    questions: int = 240
    train_bytes: int = 3_000_000
    test_bytes: int = 60_000
    limit: int = 3
    repeats: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            least = 0 if name in ("tuning_steps", "seed") else 1
            if isinstance(value, int) and value < least:
                raise LimitError("bench lm", name, value, f"at least {least}")
        if not 0 < self.rate < 1:
            raise LimitError("bench lm", "rate", self.rate, "in (0, 1)")
        if self.width % 32:
            raise LimitError("bench lm", "width", self.width, "a multiple of 32, the width of a head")


@dataclass(frozen=True, slots=True, kw_only=True)
class BpeDropout:
    """Merges are skipped with this probability."""

    dropout: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.dropout <= 1:
            raise LimitError("bpe-dropout", "dropout", self.dropout, "in [0, 1]")


_BASELINES: dict[str, Any] = {"plain": NoSettings, "bpe-dropout": BpeDropout}


class Task:
    """A small language model, trained on a method's tokens and tested on the ordinary ones."""

    name = "lm"
    BASELINES = tuple(_BASELINES)
    METRICS: Mapping[str, Metric] = {
        "bits_per_byte": Metric("bits per byte of held-out text", "lower"),
        "langgame": Metric("questions about letters, normalised accuracy", "higher"),
        **{f"langgame_{kind}": Metric(f"the same, kind {kind!r}", "higher") for kind in game.KINDS},
        "first_letter": Metric("first letter read off the embedding", "higher"),
        "last_letter": Metric("last letter read off the embedding", "higher"),
        "length_r2": Metric("length read off the embedding, variance explained", "higher"),
    }

    def __init__(self, options: Options) -> None:
        self.options = options

    def model_name(self) -> str:
        return f"llama of {self.options.layers} layers of {self.options.width}"

    def weights(self) -> str:
        return "trained here in float32"

    def settings(self) -> dict[str, Scalar]:
        """The options that tell two measurements of a method apart."""
        apart = ("data", "width", "layers", "limit", "repeats", "seed")
        return {k: getattr(self.options, k) for k in self.options.__slots__ if k not in apart}

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
            UnsupportedError: a method of another task, or one that makes no training tokens.
        """
        params, card = read_spec(self.name, _BASELINES, spec)
        if card is not None and not hasattr(catalog.load(card.slug), "recipe"):
            raise UnsupportedError("bench lm", f"{card.slug} has no recipe of training tokens")
        return MethodSpec(spec.slug, params)

    def subject(self, spec: MethodSpec, kind: str, /) -> Any:
        """The method, ready to train; the texts are read and encoded here."""
        return _Training(self, spec, kind)

    def recipe(self, spec: MethodSpec, seed: int) -> training.Recipe:
        """What the method does to the training texts, drawn for this seed."""
        from . import _lm_training as training

        if spec.slug == "plain":
            return training.canonical
        if spec.slug == "bpe-dropout":
            values: dict[str, Any] = dict(spec.params)
            return _Dropout(self.tokenizer, BpeDropout(**values).dropout)
        return catalog.load(spec.slug).recipe(self.view, **({"seed": seed} | dict(spec.params)))

    def quality(self, item: Item, plain: Outcome, ours: Outcome, /) -> dict[str, float]:  # noqa: ARG002
        return dict(ours.output)

    def derive(self, totals: Mapping[str, float], /) -> dict[str, float]:
        """How much longer the training texts got."""
        return {"growth": totals["tokens"] / totals["plain_tokens"]} if totals.get("plain_tokens") else {}

    @cached_property
    def tokenizer(self) -> Any:
        from tokenmill import models

        return models.tokenizer(self.options.tokenizer, where="bench lm")

    @cached_property
    def view(self) -> Any:
        from tokenmill.text import TokenBytes

        return TokenBytes.of(self.tokenizer)

    @property
    def end(self) -> int:
        """The token between texts: one that stands for no text."""
        if not self.view.specials:
            raise UnsupportedError("bench lm", "the tokenizer has no special token to put between texts")
        eos = getattr(self.tokenizer, "eos_token_id", None)
        return eos if isinstance(eos, int) and self.view[eos] is None else min(self.view.specials.values())

    def documents(self, kind: str, split: str, most: int) -> list[training.Document]:
        """The texts of a split, cut into parts, and their tokens."""
        from . import _lm_training as training

        found: list[training.Document] = []
        total = 0
        texts = self._sources[kind].texts.get(split) or {}
        order = sorted(texts)
        random.Random(0).shuffle(order)  # the files of a small share are of all folders
        for text in (part for name in order for part in _parts(texts[name])):
            total += len(text.encode())
            if total > most:
                break
            ids = np.array(self.view.encode(text), dtype=np.int64)
            if len(ids):
                found.append(training.Document(text, ids))
        if not found:
            raise LimitError("bench lm", "data", self.options.data, f"texts with a {split} part of kind {kind}")
        return found

    @cached_property
    def _sources(self) -> dict[str, Source]:
        return sources("bench lm", self.options.data, 50)


class _Training:
    """One method: trains a model from each item's seed."""

    def __init__(self, task: Task, spec: MethodSpec, kind: str) -> None:
        self.task, self.spec, o = task, spec, task.options
        self.documents = task.documents(kind, "train", o.train_bytes)
        self.held_out = [document.ids for document in task.documents(kind, "test", o.test_bytes)]
        self.words = game.frequent_words(document.text for document in self.documents)

    def run(self, item: Item, /) -> Outcome:
        from . import _lm_training as training

        task, o, seed = self.task, self.task.options, int(item.content)
        view, end = task.view, task.end
        size = max(len(view), len(task.tokenizer))
        model = training.small_llama(size, width=o.width, layers=o.layers, context=o.context, seed=seed)
        recipe = task.recipe(self.spec, seed)
        windows = training.Windows(self.documents, recipe, context=o.context, end=end, seed=seed)
        loss = training.train(model, windows.batches(o.batch), o.steps, o.rate)
        found = {"bits_per_byte": training.bits_per_byte(model, view, self.held_out, context=o.context, end=end)}
        found |= training.spelling(model, view, seed)
        if o.tuning_steps:
            rng = random.Random(f"questions {seed}")
            asked = game.questions(self.words, 20 * o.questions + o.questions, rng)
            batches = training.tuning_batches(view, asked[o.questions :], o.batch, end, rng)
            training.train(model, batches, o.tuning_steps, o.rate / 4)
            found |= _scores(asked[: o.questions], training.answers(model, view, asked[: o.questions], end))
        counts = {"tokens": windows.tokens, "plain_tokens": windows.plain, "steps": o.steps, "loss": loss}
        return Outcome(found, {k: float(v) for k, v in counts.items()})


class _Dropout:
    """The recipe of bpe-dropout: the texts are encoded anew in every pass."""

    def __init__(self, tokenizer: Any, dropout: float) -> None:
        from tokenmill.text import bpe_dropout

        self.encoder = bpe_dropout(tokenizer, dropout)

    def __call__(self, documents: Sequence[training.Document], epoch: int, /) -> list[training.Ints]:  # noqa: ARG002
        made = self.encoder.encode_batch([d.text for d in documents], add_special_tokens=False)
        return [np.array(one.ids, dtype=np.int64) for one in made]


def _scores(asked: Sequence[game.Question], right: Sequence[bool]) -> dict[str, float]:
    from . import _lm_training as training

    found = {"langgame": training.normalised(sum(right) / len(right))}
    for kind in game.KINDS:
        own = [r for q, r in zip(asked, right, strict=True) if q.kind == kind]
        if own:
            found[f"langgame_{kind}"] = training.normalised(sum(own) / len(own))
    return found


def _parts(text: str) -> list[str]:
    """The text in pieces of whole lines."""
    found, size = [[]], 0
    for line in text.splitlines(keepends=True):
        if size + len(line) > _PART and found[-1]:
            found.append([])
            size = 0
        found[-1].append(line)
        size += len(line)
    return ["".join(lines) for lines in found]
