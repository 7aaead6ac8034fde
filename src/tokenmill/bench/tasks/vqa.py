"""Task `vqa`: questions about pictures with fewer visual tokens. Accuracy against tokens, operations, time and cache.

An item is one picture with one question. A run encodes the picture, chooses, and generates the answer; it is right when
its first word is. ``random``, ``norm``, ``norm-diverse`` (the norm in place of ZOO-Prune's sensitivity) and
``attention`` (FastV's rule) are what a method has to beat. The share `keep` counts the visual tokens that the decoder
gets or, for methods inside it, that are left behind their layer; `tokens` is the mean over layers.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tokenmill import catalog
from tokenmill.bench.task import Item, MethodSpec, Metric, NoSettings, Outcome, Scalar, held_weights, read_spec
from tokenmill.errors import LimitError

if TYPE_CHECKING:
    from tokenmill.corpora import Picture

_WHERE = "bench vqa"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the task `vqa` can be asked for.

    Attributes:
        model: digits-llava, digits-qwen2.5-vl, pages-llava, a folder, or a transformers id of a vision-language model.
        data: digits, pages, or your own file of JSON lines with "image" (a path), "question", "answer" and, if you
            like, "kind".
        new_tokens: longest answer.
        limit: questions of each kind.
        repeats: timings of each question; their median counts.
        dtype: of the model.
        attn: attention of the decoder.
        seed: of the choice of pictures, and of every method that draws.
        scorer: folder of IDPruner's scorer; none is the one that ships for the model.
        search: file of VFlowOpt's search; none is the one that ships for the model and the budget, else its defaults.
    """

    model: str = "digits-llava"
    data: str = ""
    new_tokens: int = 2
    limit: int = 25
    repeats: int = 1
    dtype: Literal["float32", "bfloat16"] = "float32"
    attn: Literal["sdpa", "eager"] = "sdpa"
    seed: int = 0
    scorer: str = ""
    search: str = ""

    def __post_init__(self) -> None:
        for name in ("new_tokens", "limit", "repeats"):
            if getattr(self, name) < 1:
                raise LimitError(_WHERE, name, getattr(self, name), "at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """Settings of the baselines `norm` and `norm-diverse`.

    Attributes:
        keep: share of the visual tokens.
    """

    keep: float = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomShare:
    """Settings of the baseline `random`.

    Attributes:
        keep: share of the visual tokens.
        seed: of the draws; every question draws anew.
    """

    keep: float = 0.25
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShare:
    """Settings of the baseline `attention`.

    Attributes:
        keep: share of the visual tokens behind the layer.
        layer: the first layer with fewer.
    """

    keep: float = 0.25
    layer: int = 2


_BASELINES: dict[str, Any] = {
    "plain": NoSettings,
    "random": RandomShare,
    "norm": Share,
    "norm-diverse": Share,
    "attention": LayerShare,
}


class Task:
    """Questions about held-out pictures. Model and data are read when they are first needed."""

    name = "vqa"
    BASELINES = tuple(_BASELINES)
    METRICS: Mapping[str, Metric] = {
        "accuracy": Metric("right answers", "higher"),
        "same": Metric("the untouched model's answer", "higher"),
    }

    def __init__(self, options: Options) -> None:
        self.options = options

    def model_name(self) -> str:
        return self.options.model

    def weights(self) -> str:
        return held_weights(self.options.model, self.options.dtype, packed=False)

    def settings(self) -> dict[str, Scalar]:
        """The options that tell two measurements of a method apart."""
        return {k: getattr(self.options, k) for k in ("new_tokens", "dtype", "attn", "seed", "scorer", "search")}

    def kinds(self) -> list[str]:
        return list(dict.fromkeys(q.kind for p in self._pictures for q in p.questions))

    def data(self, kind: str, /) -> dict[str, str]:
        import hashlib

        digest = hashlib.sha256()
        for item in self.items(kind):
            picture, question = item.content
            digest.update(picture.pixels.tobytes() + f"{question.text}\n{question.answer}\n".encode())
        return {"name": self._data, "kind": kind, "sha256": digest.hexdigest(), "split": "test"}

    def items(self, kind: str, /) -> list[Item]:
        """`limit` questions of a kind, one a picture where there are enough pictures."""
        asked = [(p, q) for p in self._pictures for q in p.questions if q.kind == kind]
        first = {p.id: (p, q) for p, q in reversed(asked)}
        ordered = [*reversed(first.values()), *((p, q) for p, q in asked if first[p.id][1] is not q)]
        if len(ordered) < self.options.limit and Path(self._data).suffix == ".jsonl":
            raise LimitError(_WHERE, "limit", self.options.limit, f"at most {len(ordered)} questions of kind {kind}")
        found = ordered[: self.options.limit]
        return [Item(f"{p.id}: {q.text}", kind, (p, q)) for p, q in found]

    def check(self, spec: MethodSpec, /) -> MethodSpec:
        """The spec with its settings as values, refused before anything is loaded when it cannot work.

        Raises:
            LimitError: unknown method or setting, or a value outside its limit.
            UnsupportedError: a method of another task.
        """
        params, card = read_spec(self.name, _BASELINES, spec)
        if card is not None:
            catalog.method(spec.slug)(**params)
        else:
            self.pruner(MethodSpec(spec.slug, params))
        return MethodSpec(spec.slug, params)

    def subject(self, spec: MethodSpec, kind: str, /) -> Any:
        """The model behind a method, warm."""
        model, processor = self.load()
        made = Answering(model, processor, self.pruner(spec), self.options.new_tokens)
        made.run(self.items(kind)[0])
        return made

    def quality(self, item: Item, plain: Outcome, ours: Outcome, /) -> dict[str, float]:
        answer = item.content[1].answer.split()[0]
        said = ours.output.split()
        return {
            "accuracy": float(bool(said) and said[0] == answer),
            "same": float(ours.output.split()[:1] == plain.output.split()[:1]),
        }

    def derive(self, totals: Mapping[str, float], /) -> dict[str, float]:
        """Share of visual tokens that stayed, in the mean over layers."""
        return {"kept": totals["visual_kept"] / totals["visual"]} if totals.get("visual") else {}

    def pruner(self, spec: MethodSpec) -> Any:
        """The method of a spec, with what was trained for the model; ``None`` for plain."""
        from tokenmill import prune

        params: dict[str, Any] = dict(spec.params)
        match spec.slug:
            case "plain":
                return None
            case "random":
                return prune.RandomTokens(**params)
            case "norm":
                return prune.NormTokens(**params)
            case "norm-diverse":
                return prune.NormTokens(diverse=True, **params)
            case "attention":
                return prune.AttentionTopK(**params)
            case "idpruner" if params.get("importance", "scorer") == "scorer":
                return prune.IDPruner(self._scorer(), **params)
            case "vflowopt":
                return self._searched(prune.VFlowOpt(**params))
            case _:
                return catalog.method(spec.slug)(**params)

    def _scorer(self) -> Path:
        from tokenmill.models._catalog import ASSETS

        return Path(self.options.scorer) if self.options.scorer else ASSETS / f"{self.options.model}-scorer"

    def _searched(self, method: Any) -> Any:
        from tokenmill.models._catalog import ASSETS
        from tokenmill.prune.vflowopt import SearchResult

        shipped = ASSETS / f"{self.options.model}-vflowopt" / f"keep-{method.keep:g}.json"
        file = Path(self.options.search) if self.options.search else shipped
        return method.with_params(SearchResult.load(file).params) if file.is_file() else method

    @property
    def _data(self) -> str:
        o = self.options
        return o.data or ("pages" if o.model.startswith("pages") else "digits")

    def load(self) -> tuple[Any, Any]:
        """The model and its processor."""
        return self._loaded

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        from tokenmill import models

        return models.load(self.options.model, dtype=self.options.dtype, attn=self.options.attn)

    @cached_property
    def _pictures(self) -> list[Picture]:
        from tokenmill import corpora

        o = self.options
        if self._data == "digits":
            return corpora.digit_scenes("test", 2 * o.limit, seed=1000 + o.seed)
        if self._data == "pages":
            return corpora.page_scenes("test", 2 * o.limit, seed=1000 + o.seed)
        return _read(Path(self._data))


@dataclass(slots=True)
class Answering:
    """A model with a pruner (or none), and what one question costs."""

    model: Any
    processor: Any
    pruner: Any
    new_tokens: int
    asked: int = 0

    def run(self, item: Item) -> Outcome:
        """Answer one question; the clock outside takes all of it, the counts say what its parts took."""
        import torch

        from tokenmill.hf.layout import decoder
        from tokenmill.hf.vision import visual_mask
        from tokenmill.prune import VisualPruner, prefill_flops

        picture, question = item.content
        inputs = self.processor(self.processor.prompt(question.text), [picture.pixels])
        pruner = self.pruner if self.pruner is not None else VisualPruner()
        if hasattr(pruner, "seed"):
            # Every question draws anew, and the same for every method.
            pruner = dataclasses.replace(pruner, seed=pruner.seed * 1_000_003 + _number(item.id))
        length = inputs["input_ids"].shape[1]
        visual = int(visual_mask(self.model, inputs["input_ids"]).sum())
        depth = len(decoder(self.model).layers)
        with torch.inference_mode():
            began = time.perf_counter()
            pruned = pruner.prepare(self.model, inputs) if self.pruner is not None else inputs
            prepared = time.perf_counter()
            with pruner.attach(self.model, pruned if self.pruner is not None else None) as trace:
                out = self.model.generate(
                    **pruned,
                    max_new_tokens=self.new_tokens,
                    do_sample=False,
                    return_dict_in_generate=True,
                    pad_token_id=self.processor.tokenizer.pad_token_id,
                )
            ended = time.perf_counter()
        start = pruned["input_ids"].shape[1]
        lengths = trace.shortening.lengths or [start] * depth
        layers = out.past_key_values.layers
        self.asked += 1
        return Outcome(
            self.processor.decode(out.sequences[0, start:]),
            {
                "visual": visual,
                "visual_kept": sum(n - (length - visual) for n in lengths) / depth,
                "positions": start,
                "flops": prefill_flops(self.model, lengths),
                "kv_bytes": sum(x.keys.nbytes + x.values.nbytes for x in layers),
                "prepare_ms": 1000 * (prepared - began),
                "generate_ms": 1000 * (ended - prepared),
            },
        )


def _number(text: str) -> int:
    import hashlib

    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")


def _read(file: Path) -> list[Picture]:
    """Pictures and questions of a file of JSON lines; paths are relative to it."""
    import numpy as np
    from PIL import Image

    from tokenmill.corpora import Picture, Question

    if not file.is_file():
        raise LimitError(_WHERE, "data", str(file), "digits, pages, or a file of JSON lines")
    found: dict[str, Picture] = {}
    for number, line in enumerate(file.read_text().splitlines(), 1):
        row = json.loads(line)
        lacking = [name for name in ("image", "question", "answer") if not row.get(name)]
        if lacking:
            raise LimitError(_WHERE, f"line {number} of {file.name}", ", ".join(lacking), "given and not empty")
        question = Question(row["question"], str(row["answer"]), row.get("kind", "question"))
        known = found.get(row["image"])
        if known is None:
            with Image.open(file.parent / row["image"]) as opened:
                pixels = np.asarray(opened.convert("RGB"))
            known = Picture(row["image"], pixels, ())
        found[row["image"]] = Picture(known.id, known.pixels, (*known.questions, question))
    return list(found.values())
