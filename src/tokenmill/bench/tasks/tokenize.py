"""Task `tokenize`: held-out documents cut by vocabularies; how many tokens a character costs, and the time to cut.

A method trains a vocabulary on the train split of one kind of text (the domain). ``plain`` is a byte-level BPE of the
same size and without custom tokens, trained in the same way on another kind. ``vocabulary`` is one that you name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tokenmill import catalog, settings
from tokenmill.bench.task import Item, MethodSpec, Metric, NoSettings, Outcome, Scalar, read_spec
from tokenmill.bench.texts import Source, sources
from tokenmill.errors import LimitError, unknown_name

WHERE = "bench tokenize"
_CHARS = 200_000  # of a document at most, so that one giant file does not take all the time


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the task `tokenize` can be asked for.

    Attributes:
        data: names of corpora, or your own file of JSON lines with "text", "kind" and "id".
        domain: the kind of text that methods are trained on.
        general: the kind of text that plain is trained on.
        vocab_size: of methods and plain.
        train_chars: characters of the train split that are used at most; 0 is all of it.
        limit: held-out documents of each kind.
        repeats: timings of each document; their median counts.
        seed: of what is drawn in training.
    """

    data: str = "python-stdlib,python-reference"
    domain: str = "code"
    general: str = "prose"
    vocab_size: int = 4096
    train_chars: int = 1_000_000
    limit: int = 20
    repeats: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("vocab_size", 512), ("train_chars", 0), ("limit", 1), ("repeats", 1)):
            if getattr(self, name) < least:
                raise LimitError(WHERE, name, getattr(self, name), f"at least {least}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """A vocabulary that exists: a tokenizer.json, a folder, or a model's id; ``bpe_openai/cl100k_base`` is packaged."""

    path: str = ""

    def __post_init__(self) -> None:
        if not self.path:
            raise LimitError(WHERE, "path", "", "a tokenizer.json, a folder, or a model's id", "Write vocabulary:path=")


_BASELINES: dict[str, Any] = {"plain": NoSettings, "vocabulary": Vocabulary}


@dataclass(frozen=True, slots=True)
class Cutting:
    """A tokenizer on documents."""

    encode: Any

    def run(self, item: Item, /) -> Outcome:
        tokens = len(self.encode(item.content))
        return Outcome(tokens, {"tokens": tokens, "characters": len(item.content), "bytes": len(item.content.encode())})


class Task:
    """Vocabularies on held-out documents. They are trained when they are first needed, and kept."""

    name = "tokenize"
    BASELINES = tuple(_BASELINES)
    METRICS: Mapping[str, Metric] = {
        "tokens_per_char": Metric("tokens for each character", "lower"),
        "reduction": Metric("tokens saved against plain", "higher"),
    }

    def __init__(self, options: Options) -> None:
        self.options = options
        self._trained: dict[str, Any] = {}

    def model_name(self) -> str:
        """No model takes part."""
        return "none"

    def weights(self) -> str:
        return "none"

    def settings(self) -> dict[str, Scalar]:
        o = self.options
        return {k: getattr(o, k) for k in ("domain", "general", "vocab_size", "train_chars")}

    def kinds(self) -> list[str]:
        return [kind for kind, source in self._sources.items() if source.texts.get("test")]

    def data(self, kind: str, /) -> dict[str, str]:
        source = self._sources[kind]
        return {"name": source.name, "kind": kind, "sha256": source.sha256, "split": source.split}

    def items(self, kind: str, /) -> list[Item]:
        """The first `limit` held-out documents by id."""
        texts = self._sources[kind].texts["test"]
        names = [name for name in sorted(texts) if texts[name]][: self.options.limit]
        return [Item(name, kind, texts[name][:_CHARS]) for name in names]

    def check(self, spec: MethodSpec, /) -> MethodSpec:
        """The spec with its settings as values, before anything is trained.

        Raises:
            LimitError: unknown method, setting or kind, or a value outside its limit.
            UnsupportedError: a method of another task.
        """
        params, _ = read_spec(self.name, _BASELINES, spec)
        for name in ("domain", "general"):
            if (kind := getattr(self.options, name)) not in self._sources:
                raise unknown_name(WHERE, name, kind, self._sources)
        return MethodSpec(spec.slug, params)

    def subject(self, spec: MethodSpec, kind: str, /) -> Cutting:
        """The tokenizer, trained or loaded, and warm."""
        from tokenmill.text._tokenizer_report import encoder

        if spec.text not in self._trained:
            self._trained[spec.text] = encoder(self._tokenizer(spec))
        made = Cutting(self._trained[spec.text])
        made.run(Item("warm-up", kind, "def main(argv):\n    return 0\n"))
        return made

    def quality(self, item: Item, plain: Outcome, ours: Outcome, /) -> dict[str, float]:
        return {
            "tokens_per_char": ours.output / len(item.content),
            "reduction": (plain.output - ours.output) / plain.output,
        }

    def derive(self, totals: Mapping[str, float], /) -> dict[str, float]:
        """Over all documents, so that long ones count as much as they hold."""
        return {
            "tokens_per_char": totals["tokens"] / totals["characters"],
            "bytes_per_token": totals["bytes"] / totals["tokens"],
        }

    def _tokenizer(self, spec: MethodSpec) -> Any:
        o = self.options
        if spec.slug == "vocabulary":
            from tokenmill import models

            return models.tokenizer(str(spec.params["path"]), where=WHERE)
        if spec.slug == "plain":
            from tokenmill.text import CustomTokens, train_domain_bpe

            none = CustomTokens.only()
            return train_domain_bpe(self._train(o.general), o.vocab_size, custom_tokens=none, short="fill")
        main = catalog.method(spec.slug)
        own = dict(spec.params)
        if "seed" in settings.settings_of(main):
            own.setdefault("seed", o.seed)
        return main(self._train(o.domain), o.vocab_size, **own)

    def _train(self, kind: str) -> list[str]:
        """Texts of the train split in the order of their ids, until there are enough characters."""
        texts = self._sources[kind].texts.get("train", {})
        found: list[str] = []
        left = self.options.train_chars or sum(map(len, texts.values()))
        for name in sorted(texts):
            if left <= 0:
                break
            found.append(texts[name][:left])
            left -= len(found[-1])
        return found

    @cached_property
    def _sources(self) -> dict[str, Source]:
        return sources(WHERE, self.options.data, self.options.limit)
