"""Task `diffuse`: answers by unmasking. Exact accuracy, passes of the model, places fed, operations.

The exercises of an embedded model (or your own prompts with answers) are decoded in batches, each method on the same
ones. `plain` reveals the most confident token of each pass and caches nothing. A spec takes two settings besides its
method's own: ``cache`` (one of `CACHES`) and ``block``, so that every rule can be measured with every cache:
``threshold:tau=0.9:cache=dual``. Filters and policies that were trained for a model are found among the assets.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tokenmill import catalog
from tokenmill.bench.task import Item, MethodSpec, Metric, Outcome, Scalar, held_weights, read_spec
from tokenmill.bench.tasks._unmasking import SETTINGS, WHERE, Filling, GapExercise, cache_of, read_prompts, rule
from tokenmill.errors import LimitError, unknown_name

if TYPE_CHECKING:
    from tokenmill.corpora import Exercise

CACHES = ("none", "prefix", "dual", "delayed", "free", "sliding", "window")
_MODEL = "diffusion-"  # names of the embedded models start so


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the task `diffuse` can be asked for.

    Attributes:
        model: an embedded model, a folder, or a transformers id of a bidirectional model.
        data: ``mixed``, ``long``, ``hard`` or ``gaps`` (Python source), or your own file of JSON lines with "prompt",
            "answer" and, if wanted, "kind"; nothing takes what the model was trained for.
        kinds: names of kinds with commas; nothing takes all.
        split: of the embedded exercises.
        limit: prompts of each kind.
        rows: prompts that are decoded together.
        block: length of a block; nothing takes the exercises' own, 0 the whole answer.
        new_tokens: length of the answers; nothing takes the exercises' own, or 64.
        filter: folder of a trained filter for Learn2PD; nothing takes the asset of the model.
        policy: folder of a trained unmasking policy; nothing takes the asset of the model.
        guide: a causal model; nothing takes the asset of the model.
        repeats: timings of each batch; their median counts.
        dtype: of the model.
        attn: attention of the model.
        seed: of the choice of prompts, and of the draws.
    """

    model: str = "diffusion-mixed"
    data: str | None = None
    kinds: str | None = None
    split: Literal["test", "validation"] = "test"
    limit: int = 100
    rows: int = 50
    block: int | None = None
    new_tokens: int | None = None
    filter: str | None = None
    policy: str | None = None
    guide: str | None = None
    repeats: int = 1
    dtype: Literal["float32", "bfloat16"] = "float32"
    attn: Literal["sdpa", "eager"] = "sdpa"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("limit", 1), ("rows", 1), ("repeats", 1)):
            if getattr(self, name) < least:
                raise LimitError(WHERE, name, getattr(self, name), f"at least {least}")
        for name, least in (("block", 0), ("new_tokens", 1)):
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise LimitError(WHERE, name, getattr(self, name), f"at least {least}")


class Task:
    """Exercises in front of a masked diffusion model. Model and data are read when they are first needed."""

    name = "diffuse"
    BASELINES = tuple(SETTINGS)
    METRICS: Mapping[str, Metric] = {
        "accuracy": Metric("right answers", "higher"),
        "same": Metric("the answer of one-token decoding", "higher"),
        "shorter": Metric("answers shorter than that of one-token decoding", "lower"),
    }

    def __init__(self, options: Options) -> None:
        self.options = options
        known = self._known
        if known is None and not Path(self._data).suffix:
            raise unknown_name(WHERE, "data", self._data, [*self._exercise_tasks, "gaps"])

    def model_name(self) -> str:
        return self.options.model

    def weights(self) -> str:
        return held_weights(self.options.model, self.options.dtype, packed=False)

    def settings(self) -> dict[str, Scalar]:
        """The options that tell two measurements of a method apart."""
        names = ("split", "rows", "block", "new_tokens", "filter", "policy", "guide", "dtype", "attn")
        return {name: getattr(self.options, name) for name in names}

    def kinds(self) -> list[str]:
        wanted = self.options.kinds.split(",") if self.options.kinds else None
        for name in wanted or ():
            if name not in self._kinds:
                raise unknown_name(WHERE, "kinds", name, self._kinds)
        return wanted or self._kinds

    def data(self, kind: str, /) -> dict[str, str]:
        digest = hashlib.sha256()
        for one in self._exercises(kind):
            digest.update(f"{one.prompt}\n{one.answer}\n".encode())
        return {"name": self._data, "kind": kind, "sha256": digest.hexdigest(), "split": self.options.split}

    def items(self, kind: str, /) -> list[Item]:
        """Batches of prompts."""
        found, rows = self._exercises(kind), self.options.rows
        return [
            Item(f"{kind} {at} to {min(at + rows, len(found)) - 1}", kind, tuple(found[at : at + rows]))
            for at in range(0, len(found), rows)
        ]

    def check(self, spec: MethodSpec, /) -> MethodSpec:
        """The spec with its settings as values, refused before anything is loaded when it cannot work.

        Raises:
            LimitError: unknown method or setting, or a value outside its limit.
            UnsupportedError: a method of another task.
        """
        own, shared = _parted(spec)
        params, card = read_spec(self.name, SETTINGS, own)
        cache_of(shared["cache"])
        if card is None:
            rule(MethodSpec(spec.slug, params))
        else:
            self._needed(spec.slug)
        given = {name: shared[name] for name in ("cache", "block") if name in spec.params}
        return MethodSpec(spec.slug, {**params, **given})

    def subject(self, spec: MethodSpec, kind: str, /) -> Any:
        """The model behind a method, warm."""
        model, tokenizer = self._loaded
        made = Filling(model, tokenizer, self.decoder(spec), self._room, self._data == "gaps", self.options.seed)
        first = self.items(kind)[0]
        made.run(Item(first.id, first.kind, first.content[:1]))
        return made

    def decoder(self, spec: MethodSpec) -> Any:
        """What makes a decoder of a spec from a seed."""
        own, shared = _parted(spec)
        params: dict[str, Any] = dict(own.params)
        cache, block = cache_of(shared["cache"]), self._block if shared["block"] is None else shared["block"]
        settings: dict[str, Any] = {"block_length": block or None, "infill": self._data == "gaps"}
        from tokenmill import diffuse

        match spec.slug:
            case "window-diffusion":
                whole = settings | {"block_length": None}
                return lambda seed: diffuse.WindowDiffusion(**params).decoder(**whole, seed=seed)
            case "learn2pd":
                made = diffuse.Learn2PD(params.pop("filter", None) or self._needed("learn2pd"), **params)
            case "unmasking-policies":
                made = diffuse.UnmaskingPolicy(params.pop("network", None) or self._needed(spec.slug), **params)
            case "freecache-guided-diffusion":
                made = diffuse.GuidedRule(self._guide, **params)
            case slug if slug in SETTINGS:
                made = rule(own)
            case slug:
                made = catalog.method(slug)(**params)
        return lambda seed: diffuse.Diffusion(made, cache, seed=seed, **settings)

    def quality(self, item: Item, plain: Outcome, ours: Outcome, /) -> dict[str, float]:
        rows = list(zip(item.content, ours.output, plain.output, strict=True))
        return {
            "accuracy": sum(one.check(text) for one, text, _ in rows) / len(rows),
            "same": sum(text == wanted for _, text, wanted in rows) / len(rows),
            "shorter": sum(len(text) < len(wanted) for _, text, wanted in rows) / len(rows),
        }

    def derive(self, totals: Mapping[str, float], /) -> dict[str, float]:
        """Tokens that a pass reveals, in the mean."""
        return {"tokens_per_pass": totals["tokens"] / totals["passes"]} if totals.get("passes") else {}

    @property
    def _data(self) -> str:
        given = self.options.data
        if given is not None:
            return given
        name = Path(self.options.model).name.removeprefix(_MODEL)
        return "gaps" if name == "python" else name

    @cached_property
    def _exercise_tasks(self) -> dict[str, Any]:
        from tokenmill import corpora

        return corpora.EXERCISE_TASKS

    @property
    def _known(self) -> Any:
        return "gaps" if self._data == "gaps" else self._exercise_tasks.get(self._data)

    @cached_property
    def _kinds(self) -> list[str]:
        if self._data == "gaps":
            return ["gaps"]
        if self._known is not None:
            return list(self._known.kinds)
        return list(dict.fromkeys(one.kind for one in self._file))

    def _exercises(self, kind: str) -> list[Any]:
        from tokenmill import corpora

        o = self.options
        if self._data == "gaps":
            found = corpora.python_gaps("test", o.limit, seed=1000 + o.seed)
            return [GapExercise(gap.id, "gaps", f"{gap.before}\0{gap.after}", gap.gap, gap) for gap in found]
        if self._known is not None:
            return corpora.exercises(self._data, o.split, o.limit, seed=1000 + o.seed, kinds=[kind])
        return [one for one in self._file if one.kind == kind][: o.limit]

    @cached_property
    def _file(self) -> list[Exercise]:
        return read_prompts(Path(self._data))

    @property
    def _room(self) -> int:
        if self._data == "gaps":
            return 0
        if self.options.new_tokens is not None:
            return self.options.new_tokens
        return self._known.answer if self._known is not None else 64

    @property
    def _block(self) -> int | None:
        if self.options.block is not None or self._data == "gaps" or self._known is None:
            return self.options.block
        return self._known.block

    def _needed(self, slug: str) -> str | None:
        """The folder of what was trained for the model, for the methods that need it."""
        from tokenmill.models._catalog import ASSETS

        name = {"learn2pd": "filter", "unmasking-policies": "policy", "freecache-guided-diffusion": "guide"}.get(slug)
        if name is None:
            return None
        given = getattr(self.options, name)
        if given is not None:
            return given
        model = Path(self.options.model).name
        folder = ASSETS / (f"{model}-guide-medium" if name == "guide" else f"{model}-{name}")
        if not folder.is_dir():
            mend = f"Give --{name}; recipes/ has the script that trains one."
            raise LimitError(WHERE, name, None, f"given, since no {name} of {model} ships", mend)
        return str(folder)

    @cached_property
    def _guide(self) -> Any:
        from tokenmill import models

        return models.load(str(self._needed("freecache-guided-diffusion")), dtype=self.options.dtype)[0]

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        from tokenmill import models

        return models.load(self.options.model, dtype=self.options.dtype, attn=self.options.attn)


def _parted(spec: MethodSpec) -> tuple[MethodSpec, dict[str, Any]]:
    """A spec without the settings that every method takes, and those."""
    own = {name: value for name, value in spec.params.items() if name not in ("cache", "block")}
    cache, block = spec.params.get("cache", "none"), spec.params.get("block")
    if cache not in CACHES:
        raise unknown_name(spec.slug, "cache", str(cache), CACHES)
    if isinstance(block, str):
        if not block.isdigit():
            raise LimitError(spec.slug, "block", block, "a length, or 0 for the whole answer")
        block = int(block)
    return MethodSpec(spec.slug, own), {"cache": cache, "block": block}
