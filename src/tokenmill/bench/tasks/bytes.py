"""Task `bytes`: prompts that end anywhere. What the token model says about the next byte, and how it ends the line.

The texts are cut inside a token of the whole text, or at a token's end. A token's end is known only to whoever has seen
what follows: the text so far may still be the beginning of a longer token. The cuts called "closed" are ends after
which nearly no mass is on longer tokens. ``plain`` conditions on the tokenizer's encoding of the prompt as
it is, ``healing`` takes the last token back and constrains the next one, ``transformers-healing`` is transformers' own
(for completions), and with another model ``ensemble`` averages the byte laws of both.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cached_property
from typing import Any, Literal

from tokenmill.bench.task import Item, MethodSpec, Metric, NoSettings, Outcome, Scalar, held_weights, read_spec
from tokenmill.bench.texts import Source, sources
from tokenmill.errors import LimitError, UnsupportedError

_CUTS = ("mid-token", "boundary", "closed")
_CLOSED = 1e-3  # share of mass on tokens that reach past the end, at most
_SLUG = "byte-level-probabilities"
_TRIES = 50  # cuts of one text that are tried before the next text


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the task `bytes` can be asked for.

    Attributes:
        model: an embedded model, a folder, or a transformers id.
        other: a second model, for the baselines "other" and "ensemble".
        dtype: dtype of the weights.
        packed: prepack the linear layers.
        data: names of corpora, or your own file of JSON lines with "text" and, if you like, "kind" and "id".
        measure: the law of the next byte at the cut, or the greedy rest of the line.
        cut: where texts are cut; all: inside tokens and at their ends (completions: inside tokens only).
        limit: cuts of each kind.
        prompt_bytes: bytes before the cut at most.
        new_bytes: bytes of a completion at most.
        repeats: timings of each cut; their median counts.
        seed: of the choice of cuts.
    """

    model: str = "gemma-3-270m"
    other: str = ""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    packed: bool = True
    data: str = "python-stdlib"
    measure: Literal["next-byte", "complete"] = "next-byte"
    cut: Literal["all", "mid-token", "boundary", "closed"] = "all"
    limit: int = 40
    prompt_bytes: int = 600
    new_bytes: int = 40
    repeats: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("limit", "prompt_bytes", "new_bytes", "repeats"):
            if getattr(self, name) < 1:
                raise LimitError("bench bytes", name, getattr(self, name), "at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ensemble:
    """Both models, averaged."""

    rule: Literal["mean", "product"] = "mean"


_BASELINES: dict[str, Any] = {
    "plain": NoSettings,
    "healing": NoSettings,
    "transformers-healing": NoSettings,
    "other": NoSettings,
    "ensemble": Ensemble,
}


class Task:
    """Texts cut at any byte, under one model of tokens, or two. Models are loaded when they are first needed."""

    name = "bytes"
    BASELINES = tuple(_BASELINES)
    METRICS: Mapping[str, Metric] = {
        "bits": Metric("bits of the true next byte", "lower"),
        "top1": Metric("true byte is the likeliest one", "higher"),
        "exact": Metric("rest of the line is right", "higher"),
        "similarity": Metric("edit similarity to the true rest of the line", "higher"),
    }

    def __init__(self, options: Options) -> None:
        self.options = options
        self._items: dict[str, list[Item]] = {}

    def model_name(self) -> str:
        return self.options.model

    def weights(self) -> str:
        return held_weights(self.options.model, self.options.dtype, packed=self.options.packed)

    def settings(self) -> dict[str, Scalar]:
        """The options that tell two measurements of a method apart."""
        o = self.options
        return {k: getattr(o, k) for k in ("other", "dtype", "packed", "measure", "prompt_bytes", "new_bytes")}

    def kinds(self) -> list[str]:
        o = self.options
        cuts = _CUTS[:2] if o.cut == "all" else (o.cut,)
        if o.measure == "complete" and o.cut == "all":
            cuts = ("mid-token",)
        return [f"{kind}, {cut}" for kind in self._sources for cut in cuts]

    def data(self, kind: str, /) -> dict[str, str]:
        source = self._sources[kind.partition(", ")[0]]
        return {"name": source.name, "kind": kind, "sha256": source.sha256, "split": source.split}

    def items(self, kind: str, /) -> list[Item]:
        """`limit` cuts, the same ones for every method and every run with this seed."""
        if kind not in self._items:
            self._items[kind] = self._cuts(kind)
        return self._items[kind]

    def check(self, spec: MethodSpec, /) -> MethodSpec:
        """The spec with its settings as values, refused before anything is loaded when it cannot work.

        Raises:
            LimitError: unknown method or setting, or a value outside its limit.
            UnsupportedError: a method of another task, or one that needs what was not given.
        """
        where, o = "bench bytes", self.options
        params, card = read_spec(self.name, _BASELINES, spec)
        if card is None:
            if spec.slug in ("other", "ensemble") and not o.other:
                raise UnsupportedError(where, f"{spec.slug} needs a second model", "Give one with --other.")
            if spec.slug == "transformers-healing" and o.measure != "complete":
                raise UnsupportedError(where, "transformers' healing has no law", "Use --measure complete.")
            return MethodSpec(spec.slug, params)
        from tokenmill.decode._byte_lm import check_mode

        check_mode(spec.slug, params.get("mode", "valid"), params.get("beam"), params.get("lookback"))
        return MethodSpec(spec.slug, params)

    def subject(self, spec: MethodSpec, kind: str, /) -> Any:
        """The method, ready and warm."""
        from tokenmill.decode import ByteEnsemble

        from . import _byte_probes as probes

        o = self.options
        names = ("mode", "beam", "lookback")
        own = {k: spec.params[k] for k in names if k in spec.params} if spec.slug == _SLUG else {}
        lm = self.byte_model(o.model, **own)
        if spec.slug == "other":
            lm = self.byte_model(o.other)
        model: Any = lm
        traces = [lm.trace]
        if spec.slug == "ensemble":
            members = [lm, self.byte_model(o.other)]
            model, traces = ByteEnsemble(members, rule=spec.params.get("rule", "mean")), [m.trace for m in members]  # type: ignore[arg-type]
        subject: Any
        if o.measure == "next-byte":
            law = model.next_byte_logprobs
            if spec.slug == "plain":
                law = probes.tokens_as_they_are(lm).next_byte_logprobs
            elif spec.slug == "healing":
                law = lambda x: probes.healed(lm, x).logprobs()  # noqa: E731
            subject = probes.NextByte(law, traces)
        elif spec.slug in ("plain", "healing", "transformers-healing"):
            healing = {"plain": "", "healing": "ours"}.get(spec.slug, "transformers")
            subject = probes.TokenCompletion(lm, o.new_bytes, healing, self._loaded(o.model)[1])
        else:
            subject = probes.ByteCompletion(model, traces, o.new_bytes)
        subject.run(Item("warm-up", kind, probes.Cut(b"def main(argv):\n    ret", b"urn")))
        return subject

    def quality(self, item: Item, plain: Outcome, ours: Outcome, /) -> dict[str, float]:  # noqa: ARG002
        if self.options.measure == "next-byte":
            return dict(ours.output)
        true = item.content.rest.split(b"\n")[0][: self.options.new_bytes]
        return {
            "exact": float(ours.output.rstrip() == true.rstrip()),
            "similarity": SequenceMatcher(None, ours.output, true, autojunk=False).ratio(),
        }

    def derive(self, totals: Mapping[str, float], /) -> dict[str, float]:
        """Mean leak of a context; of completions byte by byte, rows of the model for each byte behind the prompt."""
        found = {"leak": totals["leaked"] / totals["laws"]} if totals.get("laws") else {}
        return found | ({"rows_per_byte": totals["rows"] / totals["bytes"]} if totals.get("rows") else {})

    def byte_model(self, name: str, **own: Any) -> Any:
        """A model as a model of bytes; the reading of its tokenizer is kept."""
        from tokenmill.decode import ByteLM

        model, tokenizer = self._loaded(name)
        return ByteLM(model, tokenizer, **own)

    def _loaded(self, name: str) -> tuple[Any, Any]:
        from tokenmill import models

        if name not in self._models:
            self._models[name] = models.load(name, dtype=self.options.dtype, packed=self.options.packed)
        return self._models[name]

    @cached_property
    def _models(self) -> dict[str, tuple[Any, Any]]:
        return {}

    @cached_property
    def _sources(self) -> dict[str, Source]:
        return sources("bench bytes", self.options.data, 10**9)

    def _cuts(self, kind: str) -> list[Item]:
        """Texts in turn, each time cut elsewhere, until there are enough."""
        from ._byte_probes import Cut

        name, _, cut = kind.partition(", ")
        texts = self._sources[name].texts.get("test", {})
        lm = self.byte_model(self.options.model)
        rng = random.Random(f"{self.options.seed} {kind}")
        names = sorted(texts)
        rng.shuffle(names)
        found: dict[str, Item] = {}
        for _ in range(_TRIES):
            for text in names:
                if len(found) == self.options.limit:
                    return list(found.values())
                data = texts[text].encode()
                place = _place(lm.view, data, cut, self.options.prompt_bytes, rng)
                if place is not None:
                    start, at = place
                    if cut == "closed" and lm.start(data[start:at]).straddling > _CLOSED:
                        continue
                    rest = data[at : at + self.options.new_bytes + 200]
                    item = Item(f"{text}:{start}-{at}", kind, Cut(data[start:at], rest))
                    found[item.id] = item
        if len(found) < self.options.limit:
            wanted = f"at most {len(found)}, the cuts that were found in {len(names)} texts of kind {name}"
            raise LimitError("bench bytes", "limit", self.options.limit, wanted)
        return list(found.values())


def _place(view: Any, data: bytes, cut: str, longest: int, rng: random.Random) -> tuple[int, int] | None:
    """Where the prompt starts (at a line) and where it is cut; None when the draw does not fit."""
    if len(data) < 80:
        return None
    aim = rng.randrange(40, len(data) - 20)
    start = data.rfind(b"\n", 0, max(aim - longest, 0) + 1) + 1 if aim > longest else 0
    if aim - start > 2 * longest:
        return None  # a very long line
    stop = min(len(data), aim + 200)
    while stop < len(data) and data[stop] & 0xC0 == 0x80:
        stop += 1
    part = data[start:stop]
    ends, at = set(), 0
    for token in view.encode(part):
        at += len(view.token_bytes[token] or b"")
        ends.add(at)
    wanted = [
        p for p in range(max(8, aim - start - 30), min(aim - start + 30, len(part) - 2))
        if (p in ends) == (cut != "mid-token") and part[p : p + 1] != b"\n"
    ]  # fmt: skip
    if not wanted:
        return None
    return start, start + rng.choice(wanted)
