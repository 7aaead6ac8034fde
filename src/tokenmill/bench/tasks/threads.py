"""Task `threads`: what a model finds in haystacks of keys and values, and what an attention method loses of it.

An item is one haystack with one question: a single value, several, all whose key has a character, or the ends of
threads in which each value is the next key. ``random`` answers with values of the haystack at chance and ``oracle``
looks them up: the floor and the ceiling. Any method of the kind "attention" can be measured on the model.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tokenmill import catalog, settings
from tokenmill.bench.task import Item, MethodSpec, Metric, NoSettings, Outcome, Scalar, held_weights
from tokenmill.errors import LimitError, UnsupportedError, unknown_name
from tokenmill.models._catalog import key_kind

if TYPE_CHECKING:
    from tokenmill.probe import Example

_WHERE = "bench threads"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the task `threads` can be asked for.

    Attributes:
        model: an embedded model, a folder, or a transformers id.
        data: your own file of examples, as to_jsonl writes them; none makes them.
        tasks: which of single, multiple, conditional, threading, multi-threading, branched; with commas.
        contexts: characters of the haystack at most, with commas.
        keys: what keys and values are: uuid as published (80 characters a pair), name (16), or auto: names for a model
            that reads nothing else.
        num_needles: keys that are asked, or have the character.
        thread_length: steps of a thread.
        direction: of a thread.
        num_threads: of multi-threading.
        template: write prompts with the tokenizer's chat template if it has one, or never.
        limit: haystacks of each task and length.
        repeats: timings of each question; their median counts.
        dtype: of the model.
        attn: attention of the model.
        packed: prepack the linear layers.
        seed: of the first haystack.
    """

    model: str = "recall"
    data: str = ""
    tasks: str = "single,threading"  # what the default model was taught
    contexts: str = "480"
    keys: Literal["auto", "uuid", "name"] = "auto"
    num_needles: int = 2
    thread_length: int = 2
    direction: Literal["forward", "backward", "random"] = "forward"
    num_threads: int = 2
    template: Literal["auto", "none"] = "auto"
    limit: int = 3
    repeats: int = 1
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    attn: Literal["sdpa", "eager"] = "sdpa"
    packed: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_needles", "thread_length", "num_threads", "limit", "repeats"):
            if getattr(self, name) < 1:
                raise LimitError(_WHERE, name, getattr(self, name), "at least 1")


def _numbers(contexts: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in contexts.split(",") if part.strip())
    except ValueError as error:
        raise LimitError(_WHERE, "contexts", contexts, "whole numbers with commas") from error


_BASELINES: dict[str, Any] = {"plain": NoSettings, "random": NoSettings, "oracle": NoSettings}


class Task:
    """Questions about haystacks of random keys and values. Model and examples are made when they are first needed."""

    name = "threads"
    BASELINES = tuple(_BASELINES)
    METRICS: Mapping[str, Metric] = {
        "accuracy": Metric("values that are right", "higher"),
        "whole": Metric("answers in which all values are right", "higher"),
        "same": Metric("the untouched model's answer", "higher"),
    }

    def __init__(self, options: Options) -> None:
        self.options = options

    def model_name(self) -> str:
        return self.options.model

    def weights(self) -> str:
        return held_weights(self.options.model, self.options.dtype, packed=self.options.packed)

    def settings(self) -> dict[str, Scalar]:
        """The options that tell two measurements of a method apart."""
        names = ("num_needles", "thread_length", "direction", "num_threads", "template", "dtype", "attn", "packed")
        return {name: getattr(self.options, name) for name in names}

    def kinds(self) -> list[str]:
        return list(self._examples)

    def data(self, kind: str, /) -> dict[str, str]:
        digest = hashlib.sha256()
        for example in self._examples[kind]:
            digest.update(f"{example.prompt}\n{example.values}\n".encode())
        name, split = (Path(self.options.data).name, "all") if self.options.data else ("needle-threading", "generated")
        return {"name": name, "kind": kind, "sha256": digest.hexdigest(), "split": split}

    def items(self, kind: str, /) -> list[Item]:
        return [Item(f"{kind} {example.id}", kind, example) for example in self._examples[kind]]

    def check(self, spec: MethodSpec, /) -> MethodSpec:
        """The spec with its settings as values, refused before anything is loaded when it cannot work.

        Raises:
            LimitError: unknown method or setting, or a value outside its limit.
            UnsupportedError: a method that is none of attention.
        """
        self.kinds()
        if spec.slug in _BASELINES:
            return MethodSpec(spec.slug, settings.from_text(spec.slug, _BASELINES[spec.slug], spec.params))
        known = catalog.entries()
        if spec.slug not in known:
            raise unknown_name(_WHERE, "method", spec.slug, [*known, *_BASELINES])
        card = catalog.card(spec.slug)
        if card.kind != "attention":
            what = f"{spec.slug} is a {card.kind}, and only attention methods are measured on a model here"
            raise UnsupportedError(_WHERE, what, f"Use bench {card.task}." if card.task != self.name else "")
        params = settings.from_text(spec.slug, catalog.method(spec.slug), spec.params)
        catalog.method(spec.slug)(**params)
        return MethodSpec(spec.slug, params)

    def subject(self, spec: MethodSpec, kind: str, /) -> Any:
        """The model behind a method, warm; or a baseline without a model."""
        if spec.slug in ("random", "oracle"):
            return Solver(spec.slug, self.options.seed)
        method = None if spec.slug == "plain" else catalog.method(spec.slug)(**spec.params)
        made = Asking(self._local, method)
        made.run(self.items(kind)[0], new_tokens=1)
        return made

    def quality(self, item: Item, plain: Outcome, ours: Outcome, /) -> dict[str, float]:
        from tokenmill.probe.needle_threading import score

        correct = score(item.content, ours.output).correct
        return {"accuracy": correct, "whole": float(correct == 1), "same": float(ours.output == plain.output)}

    def derive(self, totals: Mapping[str, float], /) -> dict[str, float]:
        """Characters of prompt for each token, over all items; nothing for baselines without a model."""
        return {"chars_per_token": totals["characters"] / totals["positions"]} if totals.get("positions") else {}

    @cached_property
    def _local(self) -> Any:
        from tokenmill import models
        from tokenmill.probe import Local

        o = self.options
        model, tokenizer = models.load(o.model, dtype=o.dtype, attn=o.attn, packed=o.packed)
        return Local(model, tokenizer, template=o.template, name=o.model)

    @cached_property
    def _examples(self) -> dict[str, list[Example]]:
        """Kind (task and length) -> its examples."""
        from tokenmill.probe import from_jsonl

        made = from_jsonl(self.options.data) if self.options.data else iter(self._made())
        found: dict[str, list[Example]] = {}
        for example in made:
            kind = f"{example.task} {len(example.haystack)}"
            if len(found.setdefault(kind, [])) < self.options.limit:
                found[kind].append(example)
        if not found:
            raise LimitError(_WHERE, "data", self.options.data, "a file with at least one example")
        return found

    def _made(self) -> list[Example]:
        """Single needles lie at depths that are spread over the haystack, one a haystack."""
        from tokenmill.probe.needle_threading import NeedleThreading, generate

        o = self.options
        tasks = tuple(name.strip() for name in o.tasks.split(",") if name.strip())
        contexts = _numbers(o.contexts)
        keys = o.keys if o.keys != "auto" else "name" if key_kind(o.model) == "name" else "uuid"
        NeedleThreading(tasks=tasks, contexts=contexts, keys=keys)  # refuses what is no task or no length
        threads = {"thread_length": o.thread_length, "direction": o.direction}
        needles = {"num_needles": o.num_needles}
        asked: dict[str, dict[str, Any]] = {"multiple": needles, "conditional": needles, "threading": threads}
        asked["multi-threading"] = {"num_threads": o.num_threads, **threads}
        asked["branched"] = {**threads, "thread_length": max(o.thread_length, 3)}
        found = []
        for task in tasks:
            for context in contexts:
                for number in range(o.limit):
                    params = asked.get(task, {"depth": 100 * number / max(o.limit - 1, 1)})
                    made = generate(task, n_chars=context, seed=o.seed + number, keys=keys, **params)
                    found.append(replace(made, id=number))
        return found


@dataclass(slots=True)
class Asking:
    """A model, perhaps inside an attention method, that is asked one question at a time."""

    local: Any
    method: Any

    def run(self, item: Item, new_tokens: int | None = None) -> Outcome:
        """Ask; the clock outside takes prefill and answer.

        Raises:
            UnsupportedError: a prompt that does not fit the model.
        """
        from tokenmill.probe._answers import room

        example = item.content
        with nullcontext() if self.method is None else self.method.attach(self.local.model) as trace:
            (reply,) = self.local.answer([example.prompt], new_tokens or room(example))
        if reply.error:
            raise UnsupportedError(_WHERE, f"{item.id}: {reply.error}", "Use shorter contexts.")
        counts = dict(trace.counts()) if trace is not None else {}
        counts |= {"positions": reply.prompt_tokens, "tokens": reply.tokens, "characters": len(example.prompt)}
        return Outcome(reply.text, counts)


@dataclass(frozen=True, slots=True)
class Solver:
    """A baseline that reads the haystack: values at chance, or looked up."""

    slug: str
    seed: int

    def run(self, item: Item, /) -> Outcome:
        from tokenmill.probe import oracle

        if self.slug == "oracle":
            return Outcome(oracle(item.content), {})
        values = list(json.loads(item.content.haystack).values())
        rng = random.Random(f"{self.seed} {item.id}")
        return Outcome(json.dumps([values[int(rng.random() * len(values))] for _ in item.content.values]), {})
