"""Task `generate`: continue a text. What a decoder saves against plain decoding, and whether it says the same.

All methods continue the same prompts by the same number of tokens: the end token does not stop them, so that times
compare. Greedy runs are compared with plain's output token for token; sampled ones by their log-likelihood.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from tokenmill import catalog
from tokenmill.bench.task import Item, MethodSpec, Metric, NoSettings, Outcome, Scalar, held_weights, read_spec
from tokenmill.bench.texts import Source, sources
from tokenmill.errors import LimitError, UnsupportedError


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the task `generate` can be asked for.

    Attributes:
        model: an embedded model, a folder, or a transformers id.
        draft: the model that drafts, for methods that need one.
        dtype: dtype of the weights.
        packed: prepack the linear layers, for plain decoding as well; the baseline "stock" goes without.
        data: names of corpora, or your own file of JSON lines with "text" and, if you like, "kind" and "id".
        limit: prompts of each kind.
        prompt_tokens: length of a prompt.
        new_tokens: tokens that are generated.
        sample: sample at temperature 1 instead of taking the likeliest token.
        warm: prompts of the train split that a method generates first, untimed, to fill its state.
        repeats: timings of each prompt; their median counts.
        seed: of the choice of prompts and of sampling.
    """

    model: str = "gemma-3-270m"
    draft: str = ""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    packed: bool = True
    data: str = "python-stdlib,python-reference,stdlib-json"
    limit: int = 5
    prompt_tokens: int = 256
    new_tokens: int = 96
    sample: bool = False
    warm: int = 0
    repeats: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("limit", "prompt_tokens", "new_tokens", "repeats"):
            if getattr(self, name) < 1:
                raise LimitError("bench generate", name, getattr(self, name), "at least 1")
        if self.warm < 0:
            raise LimitError("bench generate", "warm", self.warm, "at least 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptLookup:
    """The prompt look-up of transformers: the continuation of the last match in the text is the draft."""

    num_tokens: int = 10


_BASELINES: dict[str, Any] = {
    "plain": NoSettings,
    "stock": NoSettings,
    "prompt-lookup": PromptLookup,
    "assisted": NoSettings,
}


class Task:
    """Text continuation with one model. Models are loaded when the first subject needs them."""

    name = "generate"
    BASELINES = tuple(_BASELINES)
    METRICS: Mapping[str, Metric] = {
        "identical": Metric("outputs equal to plain's", "higher"),
        "agree": Metric("tokens before the first difference", "higher"),
        "log_likelihood": Metric("log-likelihood per token under the model", "higher"),
    }

    def __init__(self, options: Options) -> None:
        self.options = options
        self._prompts: dict[tuple[str, str], list[Item]] = {}

    def model_name(self) -> str:
        return self.options.model

    def weights(self) -> str:
        return held_weights(self.options.model, self.options.dtype, packed=self.options.packed)

    def settings(self) -> dict[str, Scalar]:
        """The options that tell two measurements of a method apart."""
        o = self.options
        names = ("draft", "dtype", "packed", "prompt_tokens", "new_tokens", "sample", "warm", "repeats")
        return {name: getattr(o, name) for name in names}

    def kinds(self) -> list[str]:
        return list(self._sources)

    def data(self, kind: str, /) -> dict[str, str]:
        source = self._sources[kind]
        return {"name": source.name, "kind": kind, "sha256": source.sha256, "split": source.split}

    def items(self, kind: str, /) -> list[Item]:
        """`limit` prompts of a kind, the same ones for every method and every run with this seed."""
        return self._take(kind, "test", self.options.limit)

    def check(self, spec: MethodSpec, /) -> MethodSpec:
        """The spec with its settings as values, refused before anything is loaded when it cannot work.

        Raises:
            LimitError: unknown method or setting, or a value outside its limit.
            UnsupportedError: a method of another kind, or one that needs a draft model when none is given.
        """
        params, card = read_spec(self.name, _BASELINES, spec)
        if card is None:
            needs = {"draft_model"} if spec.slug == "assisted" else set()
        elif card.kind != "decoder":
            raise UnsupportedError("bench generate", f"{spec.slug} is a {card.kind}, not a decoder")
        else:
            needs = card.needs
            if "draft_model" not in needs:
                catalog.method(spec.slug)(**params)
        if "draft_model" in needs and not self.options.draft:
            raise UnsupportedError("bench generate", f"{spec.slug} needs a draft model", "Give one with --draft.")
        if spec.slug == "stock" and not self.options.packed:
            raise UnsupportedError("bench generate", "stock is plain without packed layers", "Use --packed, or plain.")
        return MethodSpec(spec.slug, params)

    def subject(self, spec: MethodSpec, kind: str, /) -> Any:
        """The method, ready and warm."""
        from ._generation import Subject

        o = self.options
        model = self.stock if spec.slug == "stock" else self.target
        arguments: dict[str, Any] = {}
        decoder: Any = None
        if spec.slug == "prompt-lookup":
            arguments["prompt_lookup_num_tokens"] = PromptLookup(**dict(spec.params)).num_tokens  # type: ignore[arg-type]
        elif spec.slug == "assisted":
            arguments["assistant_model"] = self.draft
        elif spec.slug not in _BASELINES:
            first = [self.draft] if "draft_model" in catalog.card(spec.slug).needs else []
            decoder = catalog.method(spec.slug)(*first, **spec.params)
            if o.warm and hasattr(decoder, "hot"):
                decoder = decoder.hot(model)
        subject = Subject(model, decoder, arguments, new_tokens=o.new_tokens, sample=o.sample, seed=o.seed)
        warm = self._take(kind, "train", max(o.warm, 1))
        for item in warm if o.warm and decoder is not None else []:
            subject.run(item)
        subject.warm_up(warm[0])
        return subject

    def quality(self, item: Item, plain: Outcome, ours: Outcome, /) -> dict[str, float]:
        if self.options.sample:
            from ._generation import log_likelihood

            return {"log_likelihood": log_likelihood(self.target, item.content, ours.output)}
        same = [a == b for a, b in zip(plain.output, ours.output, strict=False)]
        agree = same.index(False) if False in same else len(same)
        return {
            "identical": float(list(plain.output) == list(ours.output)),
            "agree": agree / max(len(plain.output), len(ours.output), 1),
        }

    def derive(self, totals: Mapping[str, float], /) -> dict[str, float]:
        """Tokens for each model call after the prompt's: 1 for plain decoding."""
        calls = totals["step_calls"]
        return {"tokens_per_call": totals["step_tokens"] / calls} if calls else {}

    @property
    def target(self) -> Any:
        return self._loaded[0]

    @property
    def tokenizer(self) -> Any:
        return self._loaded[1]

    @cached_property
    def draft(self) -> Any:
        return self._load(self.options.draft, packed=self.options.packed)[0]

    @cached_property
    def stock(self) -> Any:
        """The target with its layers as they were loaded."""
        return self._load(self.options.model, packed=False)[0]

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        return self._load(self.options.model, packed=self.options.packed)

    def _load(self, name: str, *, packed: bool) -> tuple[Any, Any]:
        from tokenmill import models

        model: Any
        model, tokenizer = models.load(name, dtype=self.options.dtype, packed=packed)
        # These models are the bench's own: nothing but the length ends a text, so that times compare.
        model.generation_config.eos_token_id = None
        if model.generation_config.pad_token_id is None:
            model.generation_config.pad_token_id = 0
        return model, tokenizer

    @cached_property
    def _sources(self) -> dict[str, Source]:
        return sources("bench generate", self.options.data, self.options.limit)

    def _take(self, kind: str, split: str, n: int) -> list[Item]:
        """`n` prompts: a stretch of each text that starts at a random line, long enough in tokens."""
        texts = self._sources[kind].texts.get(split, {})
        found = self._prompts.setdefault((kind, split), [])
        if len(found) < n:
            names = sorted(texts)
            random.Random(f"{self.options.seed} {kind} {split}").shuffle(names)
            prompts = (self._prompt(kind, name, texts[name]) for name in names)
            found[:] = itertools.islice((item for item in prompts if item is not None), n)
        if len(found) < n:
            wanted = f"at most {len(found)}, the number of texts of kind {kind} in {split} with enough tokens"
            raise LimitError("bench generate", "limit" if split == "test" else "warm", n, wanted)
        return found[:n]

    def _prompt(self, kind: str, name: str, text: str) -> Item | None:
        length = self.options.prompt_tokens
        lines = text.splitlines(keepends=True)
        start = random.Random(f"{self.options.seed} {name}").randrange(max(1, len(lines) // 2))
        part = "".join(lines[start:])[: 24 * length]  # no tokenizer makes tokens longer than this on average
        ids = self.tokenizer(part)["input_ids"][:length]
        return Item(f"{name}:{start + 1}", kind, ids) if len(ids) == length else None
