"""Task `shorten`: fewer tokens for a text encoder, by merging those of each batch. How close its embeddings stay.

An item is a batch of texts. ``plain`` reads the ordinary tokens. ``mean`` and ``last-piece`` merge as the method does
and give a merged token the mean of its pieces' rows, or the last one's; ``truncate`` cuts each text to the length that
it has with merging. The embedding of a text is the mean of its last hidden states, with length 1. Tokenising, merging
and predicting rows count in the time; the cache of rows stays warm from batch to batch, as it would in use.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from tokenmill.bench.task import Item, MethodSpec, Metric, NoSettings, Outcome, Scalar, read_spec
from tokenmill.bench.texts import Source, sources
from tokenmill.errors import LimitError

_WHERE = "bench shorten"
_MINILM = "all-minilm-l6-v2"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the task `shorten` can be asked for.

    Attributes:
        model: all-minilm-l6-v2, a folder, or a transformers id of an encoder.
        network: the method's hypernetwork: a folder, or the name of a model that has one; none is the model's name.
        data: names of corpora, or your own file of JSON lines with "text" and, if you like, "kind" and "id".
        batch: texts of a batch.
        chars: characters of a text at most.
        max_length: tokens of a text at most.
        cache: rows that the method keeps.
        positions: of merged tokens: keep (that of the first piece) or compact.
        limit: batches of each kind.
        repeats: timings of each batch; their median counts.
        seed: of the choice of texts.
    """

    model: str = _MINILM
    network: str = ""
    data: str = "python-stdlib,python-reference,manual-pages:german+french+english"
    batch: int = 32
    chars: int = 500
    max_length: int = 128
    cache: int = 5000
    positions: Literal["keep", "compact"] = "keep"
    limit: int = 6
    repeats: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("batch", "chars", "max_length", "cache", "limit", "repeats"):
            if getattr(self, name) < 1:
                raise LimitError(_WHERE, name, getattr(self, name), "at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Merged:
    """How much is merged: the settings of the method, for a baseline.

    Attributes:
        boundary: what a merge may not cross.
        max_merges: of a batch.
        target_reduction: share of what can be saved.
    """

    boundary: Literal["pretoken", "word", "word_hyphen", "sentence"] = "pretoken"
    max_merges: int | None = None
    target_reduction: float | None = None


_BASELINES: dict[str, Any] = {"plain": NoSettings, "mean": Merged, "last-piece": Merged, "truncate": Merged}


class Task:
    """Batches of held-out texts in front of an encoder. Model and network are read when they are first needed."""

    name = "shorten"
    BASELINES = tuple(_BASELINES)
    METRICS: Mapping[str, Metric] = {
        "cut": Metric("tokens saved", "higher"),
        "cosine": Metric("cosine to the ordinary embedding", "higher"),
        "recall": Metric("own text is the nearest of the batch", "higher"),
    }

    def __init__(self, options: Options) -> None:
        self.options = options

    def model_name(self) -> str:
        return self.options.model

    def weights(self) -> str:
        return "as published, run in float32"

    def settings(self) -> dict[str, Scalar]:
        """The options that tell two measurements of a method apart."""
        return {k: getattr(self.options, k) for k in ("network", "batch", "chars", "max_length", "cache", "positions")}

    def kinds(self) -> list[str]:
        return list(self._sources)

    def data(self, kind: str, /) -> dict[str, str]:
        source = self._sources[kind]
        return {"name": source.name, "kind": kind, "sha256": source.sha256, "split": source.split}

    def items(self, kind: str, /) -> list[Item]:
        """`limit` batches of held-out texts, the same ones for every method."""
        o = self.options
        texts = self._sources[kind].texts.get("test", {})
        parts = [part for name in sorted(texts) for part in _parts(texts[name], o.chars)]
        random.Random(f"{o.seed} {kind}").shuffle(parts)
        most = len(parts) // o.batch
        if most < o.limit:
            raise LimitError(_WHERE, "limit", o.limit, f"at most {most} batches of {o.batch} texts of kind {kind}")
        batches = [parts[i * o.batch : (i + 1) * o.batch] for i in range(o.limit)]
        return [Item(f"batch {i}", kind, batch) for i, batch in enumerate(batches)]

    def check(self, spec: MethodSpec, /) -> MethodSpec:
        """The spec with its settings as values, refused before anything is loaded when it cannot work.

        Raises:
            LimitError: unknown method or setting, or a value outside its limit.
            UnsupportedError: a method of another task.
        """
        from tokenmill.text import dynamic_tokenization

        params, _ = read_spec(self.name, _BASELINES, spec)
        if spec.slug != "plain":
            dynamic_tokenization.DynamicBPE(dynamic_tokenization.small().tokenizer, **params)
        return MethodSpec(spec.slug, params)

    def subject(self, spec: MethodSpec, kind: str, /) -> Any:
        """The encoder behind a method, warm."""
        from tokenmill.text import CachedEmbedder, DynamicBPE, DynamicInputs, HyperNetwork, MeanEmbedder

        from ._shortened import Encoding, LastPiece

        model, tokenizer = self._loaded
        o = self.options
        made = Encoding(model, tokenizer, o.max_length)
        if spec.slug != "plain":
            made.bpe = DynamicBPE(tokenizer, **spec.params)
        if spec.slug == "truncate":
            made.truncates = True
        elif spec.slug != "plain":
            embedder: Any = MeanEmbedder(model) if spec.slug == "mean" else LastPiece(model)
            if spec.slug not in _BASELINES:
                embedder = HyperNetwork.from_pretrained(o.network or o.model, model, tokenizer)
                embedder = made.cache = CachedEmbedder(embedder, o.cache)
            made.inputs = DynamicInputs(model, embedder, positions=o.positions)
        made.run(self.items(kind)[0])
        return made

    def quality(self, item: Item, plain: Outcome, ours: Outcome, /) -> dict[str, float]:  # noqa: ARG002
        like = ours.output @ plain.output.T  # (B, B)
        nearest = like.argmax(1) == np.arange(len(like))
        return {
            "cut": 1 - ours.counts["tokens"] / plain.counts["tokens"],
            "cosine": float(like.diagonal().mean()),
            "recall": float(nearest.mean()),
        }

    def derive(self, totals: Mapping[str, float], /) -> dict[str, float]:
        """How often a row was in the cache."""
        asked = totals.get("hits", 0.0) + totals.get("misses", 0.0)
        return {"hit_rate": totals["hits"] / asked} if asked else {}

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        from tokenmill import models

        return models.encoder(self.options.model, where=_WHERE)

    @cached_property
    def _sources(self) -> dict[str, Source]:
        return sources(_WHERE, self.options.data, self.options.limit)


def _parts(text: str, chars: int) -> list[str]:
    """A text in parts of at most so many characters, cut at line ends; short ends are left out."""
    found, part = [], ""
    for line in text.splitlines(keepends=True):
        if part and len(part) + len(line) > chars:
            found.append(part.strip()[:chars])
            part = ""
        part += line
    found.append(part.strip()[:chars])
    return [one for one in found if len(one) >= chars // 4]
