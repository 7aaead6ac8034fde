"""Task `transplant`: a model under another tokenizer, as it is or after a few steps. Bits a byte of held-out text.

``plain`` is the model with its own tokenizer, which no transplant is expected to reach. The baselines make new rows as
the mean of all rows, as random draws, as the mean of the token's old pieces, or as FOCUS does. With ``train_steps`` the
rows (and nothing else) are trained on texts of the first kind before the measurement, for every method alike.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from tokenmill.bench.task import Item, MethodSpec, Metric, NoSettings, Outcome, Scalar, held_weights, read_spec
from tokenmill.bench.texts import Source, sources
from tokenmill.errors import LimitError, unknown_name

TRAINED = ("domain", "super")
EXISTING = ("gpt2",)
_BASELINES: dict[str, Any] = dict.fromkeys(("plain", "random", "mean", "piece-mean", "focus"), NoSettings)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the task `transplant` can be asked for.

    Attributes:
        model: an embedded model, a folder, or a transformers id.
        dtype: dtype of the weights.
        data: names of corpora, or your own file of JSON lines with "text" and, if you like, "kind" and "id".
        targets: new tokenizers with commas: domain or super (trained on the train split of the first kind), one that
            exists (gpt2), or a folder with a tokenizer.
        vocab_size: of the tokenizers that are trained here.
        embedder: the space of texts: all-minilm-l6-v2, or hash, which needs no weights.
        limit: texts of each kind.
        chars: characters of a text at most.
        train_chars: characters that a tokenizer is trained on, about.
        train_steps: steps on the rows alone behind the transplant; 0 is none.
        train_tokens: of a step, one piece of text.
        train_rate: learning rate of these steps (Adam), falling to zero.
        repeats: timings of each text; their median counts.
        seed: of the choice of texts, of random rows, and of the order of the steps.
    """

    model: str = "gemma-3-270m"
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    data: str = "python-stdlib,python-reference"
    targets: str = "domain"
    vocab_size: int = 8192
    embedder: Literal["all-minilm-l6-v2", "hash"] = "all-minilm-l6-v2"
    limit: int = 12
    chars: int = 1500
    train_chars: int = 3_000_000
    train_steps: int = 0
    train_tokens: int = 256
    train_rate: float = 1e-3
    repeats: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("limit", "chars", "repeats", "train_chars"):
            if getattr(self, name) < 1:
                raise LimitError("bench transplant", name, getattr(self, name), "at least 1")
        if self.train_steps < 0 or self.train_tokens < 2:
            limit = "at least 0 steps of at least 2 tokens"
            raise LimitError("bench transplant", "train_steps", self.train_steps, limit)
        if not 0 < self.train_rate < 1:
            raise LimitError("bench transplant", "train_rate", self.train_rate, "in (0, 1)")
        if self.train_steps and self.dtype != "float32":
            mend = "Small steps vanish in it: use dtype=float32."
            raise LimitError("bench transplant", "dtype", self.dtype, "float32 with train_steps", mend)
        for target in self.targets.split(","):
            if target not in (*TRAINED, *EXISTING) and not (Path(target) / "tokenizer.json").is_file():
                known = (*TRAINED, *EXISTING, "a folder with tokenizer.json")
                raise unknown_name("bench transplant", "targets", target, known)


class Task:
    """Held-out texts under one model with several tokenizers. Models and tokenizers are made when first needed."""

    name = "transplant"
    BASELINES = tuple(_BASELINES)
    METRICS: Mapping[str, Metric] = {
        "bits_per_byte": Metric("bits a byte of held-out text", "lower"),
        "tokens_per_char": Metric("tokens a character", "lower"),
    }

    def __init__(self, options: Options) -> None:
        self.options = options
        self._tokenizers: dict[str, Any] = {}
        self._made: dict[tuple[str, str], Any] = {}

    def model_name(self) -> str:
        return self.options.model

    def weights(self) -> str:
        return held_weights(self.options.model, self.options.dtype, packed=False)

    def settings(self) -> dict[str, Scalar]:
        """The options that tell two measurements of a method apart."""
        o = self.options
        trained = ("train_steps", "train_tokens", "train_rate") if o.train_steps else ()
        apart = ("dtype", "vocab_size", "embedder", "chars", "train_chars", "seed", *trained)
        return {k: getattr(o, k) for k in apart}

    def kinds(self) -> list[str]:
        return [f"{kind}, {target}" for target in self.options.targets.split(",") for kind in self._sources]

    def data(self, kind: str, /) -> dict[str, str]:
        source = self._sources[kind.partition(", ")[0]]
        return {"name": source.name, "kind": kind, "sha256": source.sha256, "split": source.split}

    def items(self, kind: str, /) -> list[Item]:
        """`limit` texts, the same ones for every method and target."""
        name = kind.partition(", ")[0]
        texts = self._sources[name].texts.get("test", {})
        chosen = sorted(texts)
        random.Random(f"{self.options.seed} {name}").shuffle(chosen)
        if len(chosen) < self.options.limit:
            limit = f"at most {len(chosen)}, the held-out texts of kind {name}"
            raise LimitError("bench transplant", "limit", self.options.limit, limit)
        return [Item(i, kind, texts[i][: self.options.chars]) for i in chosen[: self.options.limit]]

    def check(self, spec: MethodSpec, /) -> MethodSpec:
        """The spec with its settings as values.

        Raises:
            LimitError: unknown method or setting, or a value outside its limit.
            UnsupportedError: a method of another task.
        """
        params, card = read_spec(self.name, _BASELINES, spec)
        if card is not None:
            from tokenmill import catalog

            catalog.method(card.slug)(**params)
        return MethodSpec(spec.slug, params)

    def subject(self, spec: MethodSpec, kind: str, /) -> Any:
        """The transplanted model; the one before it is let go, since models are large."""
        from tokenmill.text import TokenAdapt

        from ._transplanted import Scorer

        model, old = self._loaded
        if spec.slug == "plain":
            return Scorer(model, old, {})
        target = kind.partition(", ")[2]
        key = (spec.text, target)
        if key not in self._made:
            self._made.clear()
            how: dict[str, Any] = dict(spec.params)
            if spec.slug in _BASELINES:
                how = {"method": spec.slug, "seed": self.options.seed}
            made = TokenAdapt(**how).transplant(model, old, self._tokenizer(target), self.options.embedder)
            counts = {f"rows_{name}": float(n) for name, n in made.report.counts.items()}
            if self.options.train_steps:
                counts |= self._trained(made.model, made.tokenizer)
            self._made[key] = Scorer(made.model, made.tokenizer, counts)
        return self._made[key]

    def quality(self, item: Item, plain: Outcome, ours: Outcome, /) -> dict[str, float]:  # noqa: ARG002
        return {"bits_per_byte": ours.output, "tokens_per_char": ours.counts["tokens"] / len(item.content)}

    def derive(self, totals: Mapping[str, float], /) -> dict[str, float]:  # noqa: ARG002
        return {}

    def _tokenizer(self, target: str) -> Any:
        if target not in self._tokenizers:
            self._tokenizers[target] = self._train(target) if target in TRAINED else _load(target)
        return self._tokenizers[target]

    def _trained(self, model: Any, tokenizer: Any) -> dict[str, float]:
        from ._transplanted import train_rows

        o = self.options
        losses = train_rows(
            model, tokenizer, self._texts, steps=o.train_steps, tokens=o.train_tokens, rate=o.train_rate, seed=o.seed
        )
        return {"first_loss": losses[0], "last_loss": sum(losses[-10:]) / len(losses[-10:])}

    @cached_property
    def _texts(self) -> list[str]:
        """Training texts of the first kind, as many as are asked for."""
        first = next(iter(self._sources.values()))
        texts, left = [], self.options.train_chars
        for name in sorted(first.texts.get("train", {})):
            if left <= 0:
                break
            texts.append(first.texts["train"][name])
            left -= len(texts[-1])
        return texts

    def _train(self, target: str) -> Any:
        from tokenmill.text import CustomTokens, train_domain_bpe, train_supertokenizer

        texts = self._texts
        if target == "super":
            return train_supertokenizer(texts, self.options.vocab_size)
        return train_domain_bpe(texts, self.options.vocab_size, custom_tokens=CustomTokens.only())

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        from tokenmill import models

        return models.load(self.options.model, dtype=self.options.dtype)

    @cached_property
    def _sources(self) -> dict[str, Source]:
        return sources("bench transplant", self.options.data, self.options.limit)


def _load(folder: str) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if folder in EXISTING:
        from tokenmill import models

        made, end = models.tokenizer(folder, where="bench transplant"), "<|endoftext|>"
        return PreTrainedTokenizerFast(tokenizer_object=made, bos_token=end, eos_token=end, pad_token=end)
    return AutoTokenizer.from_pretrained(folder)
