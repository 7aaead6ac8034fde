"""Task `constrain`: one line of text that satisfies a constraint. What it costs, and whether it is the right line.

All methods sample at temperature 1 from the same prompts; a line break ends the text. ``plain`` goes without the
constraint, ``mask`` asks about every token of the vocabulary (for its first tokens only, since it is slow),
``llguidance`` masks by its engine, ``lcd`` takes the first proposed token that is allowed, without weights, and
``rerank`` draws several texts and keeps those that satisfy the constraint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from tokenmill import catalog
from tokenmill.bench.task import Item, MethodSpec, Metric, NoSettings, Outcome, Scalar, held_weights, read_spec
from tokenmill.bench.tasks import _tasks_under_constraints as asked
from tokenmill.errors import LimitError, unknown_name


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the task `constrain` can be asked for.

    Attributes:
        model: an embedded model, a folder, or a transformers id.
        dtype: dtype of the weights.
        packed: prepack the linear layers.
        data: names of embedded kinds of constraints, or your own file of JSON lines with "prompt", one of "regex",
            "json_schema", "grammar", "predicate" (module:function) or "python", and, if you like, "answer", "kind".
        limit: prompts of each kind.
        new_tokens: tokens of a line at most.
        mask_tokens: tokens that the method "mask" generates at most.
        repeats: timings of each prompt; their median counts.
        seed: of the choice of prompts and of sampling.
    """

    model: str = "gemma-3-270m"
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    packed: bool = True
    data: str = ",".join(asked.KINDS)
    limit: int = 3
    new_tokens: int = 32
    mask_tokens: int = 2
    repeats: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("limit", "new_tokens", "mask_tokens", "repeats"):
            if getattr(self, name) < 1:
                raise LimitError("bench constrain", name, getattr(self, name), "at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rerank:
    """Samples of which those that satisfy the constraint are kept."""

    samples: int = 5

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise LimitError("rerank", "samples", self.samples, "at least 1")


_BASELINES: dict[str, Any] = {
    "plain": NoSettings,
    "mask": NoSettings,
    "llguidance": NoSettings,
    "lcd": NoSettings,
    "rerank": Rerank,
}


class Task:
    """Constrained lines of text with one model."""

    name = "constrain"
    BASELINES = tuple(_BASELINES)
    METRICS: Mapping[str, Metric] = {
        "exact": Metric("weight on the right line", "higher"),
        "valid": Metric("weight on lines that satisfy the constraint", "higher"),
    }

    def __init__(self, options: Options) -> None:
        self.options = options

    def model_name(self) -> str:
        return self.options.model

    def weights(self) -> str:
        return held_weights(self.options.model, self.options.dtype, packed=self.options.packed)

    def settings(self) -> dict[str, Scalar]:
        """The options that tell two measurements of a method apart."""
        return {k: getattr(self.options, k) for k in ("dtype", "packed", "new_tokens", "mask_tokens", "repeats")}

    def kinds(self) -> list[str]:
        return list(self._items)

    def items(self, kind: str, /) -> list[Item]:
        """`limit` prompts of a kind, the same ones for every method and every run with this seed."""
        return self._items[kind]

    def data(self, kind: str, /) -> dict[str, str]:
        import hashlib

        text = repr([(item.id, item.content) for item in self._items[kind]])
        name = Path(self.options.data).name if self._file else "templates"
        return {"name": name, "kind": kind, "sha256": hashlib.sha256(text.encode()).hexdigest(), "split": "test"}

    def check(self, spec: MethodSpec, /) -> MethodSpec:
        """The spec with its settings as values, refused before anything is loaded when it cannot work.

        Raises:
            LimitError: unknown method or setting, or a value outside its limit.
            UnsupportedError: a method of another task.
        """
        params, card = read_spec(self.name, _BASELINES, spec)
        if card is not None:
            replace(catalog.load(spec.slug).small(), **params)
        return MethodSpec(spec.slug, params)

    def subject(self, spec: MethodSpec, kind: str, /) -> Any:
        """The method, ready and warm."""
        from . import _constraining as at_work

        o, (model, tokenizer) = self.options, self._loaded
        setting = at_work.Setting(model, tokenizer, _line_ends(tokenizer), o.new_tokens, o.seed)
        subject: Any
        if spec.slug == "plain":
            subject = at_work.Sampled(setting, 1, check=False)
        elif spec.slug == "rerank":
            subject = at_work.Sampled(setting, int(spec.params.get("samples") or Rerank().samples), check=True)
        elif spec.slug == "mask":
            subject = at_work.Masked(replace(setting, new_tokens=o.mask_tokens), "naive")
        elif spec.slug == "llguidance":
            subject = at_work.Masked(setting, "llguidance")
        elif spec.slug == "lcd":
            subject = at_work.Particles(setting, {"method": "lcd", "n_particles": 1})
        else:
            subject = at_work.Particles(setting, spec.params)
        if spec.slug != "mask":  # which does the same slow thing every time
            subject.run(self._items[kind][0])
        return subject

    def quality(self, item: Item, plain: Outcome, ours: Outcome, /) -> dict[str, float]:  # noqa: ARG002
        if ours.output["cut"]:
            return {}  # the beginning of a line says nothing
        found = {} if ours.counts["tokens"] < 1 else {"valid": float(ours.output["valid"])}
        if item.content.answer is not None:
            share = sum(p for text, p in ours.output["posterior"].items() if item.content.right(text))
            found["exact"] = float(share)
        return found

    def derive(self, totals: Mapping[str, float], /) -> dict[str, float]:
        """Checks for each token that was drawn; milliseconds of a step: model's, constraint's, all but the model's."""
        drawn, steps = max(totals["particle_tokens"], 1.0), max(totals["tokens"], 1.0)
        times = {f"{name}_per_step": totals[name] / steps for name in ("model_ms", "constraint_ms", "own_ms")}
        return {"checks_per_token": totals["asked"] / drawn, **times}

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        from tokenmill import models

        return models.load(self.options.model, dtype=self.options.dtype, packed=self.options.packed)

    @property
    def _file(self) -> bool:
        return Path(self.options.data).suffix in (".jsonl", ".json", ".ndjson")

    @cached_property
    def _items(self) -> dict[str, list[Item]]:
        o = self.options
        if self._file:
            found = asked.from_file(Path(o.data))
            return {kind: items[: o.limit] for kind, items in found.items()}
        names = [name.strip() for name in o.data.split(",")]
        for name in names:
            if name not in asked.KINDS:
                raise unknown_name("bench constrain", "data", name, asked.KINDS)
        return {name: asked.made(name, o.limit, o.seed) for name in names}


def _line_ends(tokenizer: Any) -> list[int]:
    """Ids that end a line: the end token, and the tokens that are line breaks and nothing else."""
    from tokenmill.text import TokenBytes

    breaks = [i for i, data in enumerate(TokenBytes.of(tokenizer).tokens) if data and not data.strip(b"\r\n")]
    end = tokenizer.eos_token_id
    return [*([] if end is None else [int(end)]), *breaks]
