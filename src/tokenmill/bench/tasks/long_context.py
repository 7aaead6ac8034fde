"""Task `long-context`: long prompts of which attention reads a part. Recall, text, what was read, and time.

Three kinds of items, each a prompt of ``length`` tokens: ``passkey`` (a number in the middle of text, asked for at the
end), ``pairs`` (one value out of many keys) and one kind for each kind of text (bits a token of what follows it, read
token by token, so that methods which act in decoding alone count; and the share of dense attention's probability that
lies on what each step read). A model that reads nothing but names (`recall`) has pairs alone. ``oracle`` reads the
tokens with the highest exact scores, ``streaming`` the first and the last ones, ``snapkv`` and ``quest`` are the usual
peers.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from tokenmill import catalog
from tokenmill.bench.task import Item, MethodSpec, Metric, NoSettings, Outcome, Scalar, held_weights, read_spec
from tokenmill.bench.texts import Source, sources
from tokenmill.errors import LimitError, unknown_name
from tokenmill.models._catalog import key_kind
from tokenmill.probe._haystack import NAMES
from tokenmill.probe._haystack import pairs as names

if TYPE_CHECKING:
    from torch import Tensor

_WHERE = "bench long-context"
RECALL = ("passkey", "pairs")
_DIGITS = 5
_RANKED = "fasa"  # needs the model before its settings are whole


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the task `long-context` can be asked for.

    Attributes:
        model: an embedded model, a folder, or a transformers id.
        data: names of corpora with commas, or your own file of JSON lines with "text": filler of the passkeys, and
            the texts whose continuation is read.
        length: tokens of a prompt.
        follow: tokens of a text that are read one by one behind the prompt.
        kinds: which of passkey, pairs and the kinds of text, with commas; none: all that the model can read.
        limit: items of each kind.
        repeats: timings of each item; their median counts.
        dtype: of the model.
        attn: attention of the untouched model.
        seed: of the choice of texts, numbers and places.
    """

    model: str = "gemma-3-270m"
    data: str = "python-reference,python-stdlib"
    length: int = 1024
    follow: int = 24
    kinds: str = ""
    limit: int = 4
    repeats: int = 1
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    attn: Literal["sdpa", "eager"] = "sdpa"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("length", 64), ("follow", 1), ("limit", 1), ("repeats", 1)):
            if getattr(self, name) < least:
                raise LimitError(_WHERE, name, getattr(self, name), f"at least {least}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """Settings of the baselines.

    Attributes:
        keep: share or count of the tokens that attention reads.
    """

    keep: int | float = 0.25


_BASELINES: dict[str, Any] = {
    "plain": NoSettings,
    "oracle": Share,
    "streaming": Share,
    "snapkv": Share,
    "quest": Share,
}


class Task:
    """Long prompts in front of a model. Model and data are read when they are first needed."""

    name = "long-context"
    BASELINES = tuple(_BASELINES)
    METRICS: Mapping[str, Metric] = {
        "recall": Metric("prompts whose answer is right", "higher"),
        "bits": Metric("bits a token of the text that follows", "lower"),
        "mass": Metric("dense attention's probability on what is read, while the text is read on", "higher"),
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
        return {k: getattr(self.options, k) for k in ("data", "length", "follow", "dtype", "attn")}

    def kinds(self) -> list[str]:
        """What is measured.

        Raises:
            LimitError: a kind that there is not, or one that the model cannot read.
        """
        known = ["pairs"] if self._names else [*RECALL, *self._sources]
        asked = [kind.strip() for kind in self.options.kinds.split(",") if kind.strip()]
        for kind in asked:
            if kind not in known:
                raise unknown_name(_WHERE, "kinds", kind, known)
        return asked or known

    def data(self, kind: str, /) -> dict[str, str]:
        if kind == "pairs":
            about = f"{[item.content for item in self.items(kind)]}"
            digest = hashlib.sha256(about.encode()).hexdigest()
            return {"name": "pairs", "kind": kind, "sha256": digest, "split": "generated"}
        source = self._sources[kind if kind in self._sources else next(iter(self._sources))]
        return {"name": source.name, "kind": kind, "sha256": source.sha256, "split": source.split}

    def items(self, kind: str, /) -> list[Item]:
        """``limit`` prompts, the same ones for every method and every run with this seed."""
        if kind == "pairs":
            return [self._pairs(number) for number in range(self.options.limit)]
        texts = self._texts(next(iter(self._sources)) if kind == "passkey" else kind)
        return [self._passkey(n, t) if kind == "passkey" else Item(f"{kind} {n}", kind, t) for n, t in enumerate(texts)]

    def check(self, spec: MethodSpec, /) -> MethodSpec:
        """The spec with its settings as values, refused before anything is loaded when it cannot work.

        Raises:
            LimitError: unknown method or setting, or a value outside its limit.
            UnsupportedError: a method of another task.
        """
        params, _ = read_spec(self.name, _BASELINES, spec)
        if spec.slug == _RANKED:
            from tokenmill.attend import fasa

            dataclasses.replace(fasa.small(), **params)
        else:
            self.method(MethodSpec(spec.slug, params))
        return MethodSpec(spec.slug, params)

    def method(self, spec: MethodSpec) -> Any:
        """The method of a spec; ``None`` for plain."""
        from tokenmill import attend

        params: dict[str, Any] = dict(spec.params)
        match spec.slug:
            case "plain":
                return None
            case "oracle":
                return attend.OracleTopK(**params)
            case "streaming":
                return attend.StreamingLLM(**params)
            case "snapkv":
                return attend.SnapKV(**params)
            case "quest":
                return attend.Quest(**params)
            case "fasa":
                return attend.FASA(self._ranking, **params)
            case _:
                return catalog.method(spec.slug)(**params)

    def subject(self, spec: MethodSpec, kind: str, /) -> Any:
        """The model behind a method, warm."""
        model, _ = self._loaded
        made = Reader(model, self.method(spec), self.options.follow)
        items = self.items(kind)
        made.run(items[0])
        if kind not in RECALL:
            made.masses = {item.id: made.mass(item) for item in items}
        return made

    def quality(self, item: Item, plain: Outcome, ours: Outcome, /) -> dict[str, float]:
        if item.kind not in RECALL:
            bits, mass = ours.output
            return {"bits": bits} | ({} if mass is None else {"mass": mass})
        _, tokenizer = self._loaded
        said, answer = tokenizer.decode(ours.output), item.content[1]
        return {"recall": float(said.strip().startswith(answer)), "same": float(ours.output == plain.output)}

    def derive(self, totals: Mapping[str, float], /) -> dict[str, float]:
        """Keys that attention read, as a share of those of dense attention, in the layers that a method is in."""
        return {"density": totals["keys_read"] / totals["keys_dense"]} if totals.get("keys_dense") else {}

    def _passkey(self, number: int, ids: list[int]) -> Item:
        """A number at one of `limit` depths of a text."""
        _, tokenizer = self._loaded
        rng = random.Random(f"{self.options.seed} passkey {number}")
        key = "".join(rng.choices("0123456789", k=_DIGITS))
        note = tokenizer(f"\nThe pass key is {key}. Remember it. {key} is the pass key.\n", add_special_tokens=False)
        asked = tokenizer("\nWhat is the pass key? The pass key is ", add_special_tokens=False)["input_ids"]
        room = self.options.length - len(note["input_ids"]) - len(asked)
        depth = round(room * (number + 0.5) / self.options.limit)
        made = [*ids[:depth], *note["input_ids"], *ids[depth:room], *asked]
        return Item(f"passkey {key} at {depth}", "passkey", (made, key))

    def _pairs(self, number: int) -> Item:
        """As many pairs of a key and a value as fit, one of which is asked for."""
        _, tokenizer = self._loaded
        rng = random.Random(f"{self.options.seed} pairs {number}")
        drawn = self._drawn(rng)
        lines: list[list[int]] = []
        pairs: list[tuple[str, str]] = []
        left = self.options.length - 32
        while True:
            key, value = next(drawn)
            line = tokenizer(f"{key} -> {value}\n", add_special_tokens=False)["input_ids"]
            if sum(map(len, lines)) + len(line) > left:
                break
            lines.append(line)
            pairs.append((key, value))
        at = min(round((number + 0.5) / self.options.limit * len(pairs)), len(pairs) - 1)
        asked = tokenizer(f"{pairs[at][0]} -> ", add_special_tokens=False)["input_ids"]
        return Item(f"pair {at} of {len(pairs)}", "pairs", ([i for line in lines for i in line] + asked, pairs[at][1]))

    def _drawn(self, rng: random.Random) -> Iterator[tuple[str, str]]:
        """Keys and values: numbers of five digits, or names for a model that reads nothing else."""
        if self._names:
            yield from names(NAMES // 2, rng.getrandbits(32), "name")
            limit = f"at most what {NAMES // 2} pairs of names take"
            raise LimitError(_WHERE, "length", self.options.length, limit)
        while True:
            yield str(rng.randrange(10_000, 100_000)), str(rng.randrange(10_000, 100_000))

    def _texts(self, kind: str) -> list[list[int]]:
        """The tokens of ``limit`` held-out texts that are long enough, with those that are read behind the prompt."""
        source, wanted = self._sources[kind], self.options.length + self.options.follow
        found = self._long(source.texts.get("test", {}), wanted, kind)
        if len(found) == self.options.limit:
            return found
        limit = f"at most {len(found)}, the texts of kind {kind} with {wanted} tokens"
        raise LimitError(_WHERE, "limit", self.options.limit, limit, "Lower limit or length, or give longer texts.")

    def _long(self, texts: Mapping[str, str], wanted: int, kind: str) -> list[list[int]]:
        """The first ``wanted`` tokens of at most ``limit`` texts that have so many, in an order drawn with the seed."""
        _, tokenizer = self._loaded
        names, found = sorted(texts), []
        random.Random(f"{self.options.seed} {kind}").shuffle(names)
        for name in names:
            # A token is a character at least, so shorter texts need not be encoded.
            if len(texts[name]) < wanted:
                continue
            ids = tokenizer(texts[name][: 12 * wanted], add_special_tokens=False)["input_ids"]
            if len(ids) >= wanted:
                found.append(ids[:wanted])
            if len(found) == self.options.limit:
                break
        return found

    @cached_property
    def _names(self) -> bool:
        """Whether the model reads nothing but the probe's names."""
        return key_kind(self.options.model) == "name"

    @cached_property
    def _ranking(self) -> Any:
        """Frequencies of the model for FASA, measured once on a text that is in no prompt."""
        import torch

        from tokenmill.attend.fasa import calibrate

        model, _ = self._loaded
        kind, source = next(iter(self._sources.items()))
        texts = [self._pairs(-1).content[0]] if self._names else []
        texts = texts or self._long(source.texts.get("train", {}), self.options.length, kind)
        if not texts:
            raise LimitError(_WHERE, "length", self.options.length, f"at most the tokens of a training text of {kind}")
        return calibrate(model, torch.tensor(texts[:1]), k=min(256, self.options.length // 4), max_new_tokens=16)

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        from tokenmill import models

        return models.load(self.options.model, dtype=self.options.dtype, attn=self.options.attn)

    @cached_property
    def _sources(self) -> dict[str, Source]:
        return sources(_WHERE, self.options.data, self.options.limit)


@dataclass(slots=True)
class Reader:
    """A model with a method attached (or none), and what one prompt costs.

    Attributes:
        model: the model.
        method: what is attached; None for nothing.
        follow: tokens that are read on in a text.
        masses: what `mass` found for each text, by its id.
    """

    model: Any
    method: Any
    follow: int
    masses: dict[str, float | None] = field(default_factory=dict)

    def run(self, item: Item) -> Outcome:
        """Answer a question, or read on in a text."""
        from contextlib import nullcontext

        import torch

        recall, ids = item.kind in RECALL, self._ids(item)
        with torch.inference_mode(), self.method.attach(self.model) if self.method is not None else nullcontext() as t:
            output = self._answer(ids) if recall else (self._bits(ids), self.masses.get(item.id))
        counts = {} if t is None else {k: float(v) for k, v in t.counts().items() if v}
        return Outcome(output, {"length": float(ids.shape[1]), **counts})

    def mass(self, item: Item) -> float | None:
        """Dense probability on what each step of reading on reads, in the mean over steps and layers; untimed.

        None for a method that is not one of attention's sets.
        """
        import torch

        from tokenmill.attend import SparseAttention
        from tokenmill.attend._mass import MassMeter

        if self.method is None:
            return 1.0
        if not isinstance(self.method, SparseAttention):
            return None
        meter = MassMeter(self.method)
        with torch.inference_mode(), meter.attach(self.model):
            self._bits(self._ids(item))
        return sum(meter.masses) / len(meter.masses) if meter.masses else None

    def _ids(self, item: Item) -> Tensor:
        """(1, T), the begin token first if the model has one."""
        import torch

        bos = getattr(self.model.config.get_text_config(), "bos_token_id", None)
        first = [] if bos is None else [bos]
        content = item.content[0] if item.kind in RECALL else item.content
        return torch.tensor([[*first, *content]], device=self.model.device)

    def _answer(self, ids: Tensor) -> list[int]:
        import torch

        out = self.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=_DIGITS + 2, do_sample=False
        )
        return out[0, ids.shape[1] :].tolist()

    def _bits(self, ids: Tensor) -> float:
        """Mean bits of the last ``follow`` tokens, each read with the cache of all before it."""
        start = ids.shape[1] - self.follow
        out = self.model(input_ids=ids[:, :start], use_cache=True, logits_to_keep=1)
        total = 0.0
        for at in range(start, ids.shape[1]):
            total -= float(out.logits[0, -1].float().log_softmax(-1)[ids[0, at]])
            if at + 1 < ids.shape[1]:
                out = self.model(input_ids=ids[:, at : at + 1], past_key_values=out.past_key_values, use_cache=True)
        return total / self.follow / math.log(2)
