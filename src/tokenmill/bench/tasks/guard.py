"""Task `guard`: is a text encoded? Clean texts by kind (prose, a language), and the same prose in fifteen encodings.

Of manuals' paragraphs those count that are running prose: a capital at the start, a full stop or colon at the end.
Thresholds are fitted on clean texts of the other split alone, for the asked share of false alarms, the method's in each
kind. ``plain`` flags nothing, ``entropy`` flags texts whose characters are unusually varied (bits per character),
``tokens-per-word`` those that take many tokens for a word.
"""

from __future__ import annotations

import math
import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tokenmill.bench.task import Item, MethodSpec, Metric, NoSettings, Outcome, Scalar, read_spec
from tokenmill.bench.texts import Source, sources
from tokenmill.errors import LimitError, unknown_name

_WHERE = "bench guard"
_SLUG = "cpt-filtering"
_MANUALS = ("python-reference", "manual-pages")
_SHORTEST = 20  # characters of a text, or less where `chars` is less
_REFERENCE = 400  # clean texts that an encoded one is compared with


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the task `guard` can be asked for.

    Attributes:
        tokenizer: an embedded model, a folder, a tokenizer.json, or a transformers id.
        data: names of corpora, or your own file of JSON lines with "text" and, if you like, "kind" and "id".
        encodings: names with commas; all: the fifteen. The texts of the first kind are encoded.
        limit: texts of each kind.
        train: clean texts of each kind that thresholds are fitted on, at most.
        chars: characters of a text at most.
        tokens: tokens of a clean text at least.
        windows: tokens of the windows, with commas; none looks at whole texts alone.
        fpr: share of clean texts that may be flagged.
        repeats: timings of each text; their median counts.
        seed: of the choice of texts.
    """

    tokenizer: str = "gemma-3-270m"
    data: str = "python-reference,multilingual-lines"
    encodings: str = "all"
    limit: int = 100
    train: int = 2000
    chars: int = 100
    tokens: int = 1
    windows: str = "10,20,40"
    fpr: float = 0.01
    repeats: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("limit", "train", "chars", "tokens", "repeats"):
            if getattr(self, name) < 1:
                raise LimitError(_WHERE, name, getattr(self, name), "at least 1")
        if not 0 < self.fpr < 1:
            raise LimitError(_WHERE, "fpr", self.fpr, "in (0, 1)")
        _windows(self.windows)


_BASELINES: dict[str, Any] = {"plain": NoSettings, "entropy": NoSettings, "tokens-per-word": NoSettings}


class Task:
    """Clean and encoded texts in front of a tokenizer. The tokenizer is read when it is first needed."""

    name = "guard"
    BASELINES = tuple(_BASELINES)
    METRICS: Mapping[str, Metric] = {
        "hit_rate": Metric("encoded texts that are flagged", "higher"),
        "auroc": Metric("encoded text scores below a clean one", "higher"),
        "false_positives": Metric("clean texts that are flagged", "lower"),
    }

    def __init__(self, options: Options) -> None:
        self.options = options
        self._subjects: dict[str, _Subject] = {}

    def model_name(self) -> str:
        return self.options.tokenizer

    def weights(self) -> str:
        return "the tokenizer alone"

    def settings(self) -> dict[str, Scalar]:
        """The options that tell two measurements of a method apart."""
        return {name: getattr(self.options, name) for name in ("data", "train", "chars", "tokens", "windows", "fpr")}

    def kinds(self) -> list[str]:
        clean = list(self._sources)
        return [*clean, *(f"{clean[0]}, {name}" for name in self._encodings)]

    def data(self, kind: str, /) -> dict[str, str]:
        source = self._sources[kind.partition(", ")[0]]
        return {"name": source.name, "kind": kind, "sha256": source.sha256, "split": source.split}

    def items(self, kind: str, /) -> list[Item]:
        """At most `limit` texts, the same ones for every method and every run with this seed."""
        from tokenmill.text import OBFUSCATORS

        clean, _, encoding = kind.partition(", ")
        texts = self._texts(clean, "test", self.options.limit)
        if not texts:
            raise LimitError(_WHERE, "chars", self.options.chars, f"long enough for some text of kind {clean}")
        found = [Item(name, kind, text) for name, text in texts]
        return [Item(i.id, kind, OBFUSCATORS[encoding].encode(i.content)) for i in found] if encoding else found

    def check(self, spec: MethodSpec, /) -> MethodSpec:
        """The spec with its settings as values, refused before anything is loaded when it cannot work.

        Raises:
            LimitError: unknown method or setting, or a value outside its limit.
            UnsupportedError: a method of another task.
        """
        params, card = read_spec(self.name, _BASELINES, spec)
        if card is not None and spec.slug == _SLUG:
            from tokenmill.text import cpt_filtering

            small = cpt_filtering.small()
            cpt_filtering.CPTFilter(small.tokenizer, **params)
        return MethodSpec(spec.slug, params)

    def subject(self, spec: MethodSpec, kind: str, /) -> _Subject:  # noqa: ARG002
        """The method with its thresholds, ready and warm."""
        if spec.text not in self._subjects:
            self._subjects[spec.text] = self._made(spec)
        return self._subjects[spec.text]

    def quality(self, item: Item, plain: Outcome, ours: Outcome, /) -> dict[str, float]:  # noqa: ARG002
        flagged, auroc = ours.output
        if ", " in item.kind:
            return {"hit_rate": float(flagged), "auroc": auroc}
        return {"false_positives": float(flagged)}

    def derive(self, totals: Mapping[str, float], /) -> dict[str, float]:
        """Nothing beyond the time of a text."""
        return {"chars": totals["chars"]} if totals.get("chars") else {}

    def _made(self, spec: MethodSpec) -> _Subject:
        train = {kind: self._texts(kind, "train", self.options.train) for kind in self._sources}
        clean = [text for texts in train.values() for _, text in texts]
        reference = [text for _, text in train[next(iter(train))][:_REFERENCE]]
        if not reference:
            raise LimitError(_WHERE, "data", self.options.data, "texts of which some are left to fit thresholds on")
        if spec.slug == _SLUG:
            by_kind = {kind: [text for _, text in texts] for kind, texts in train.items()}
            return self._filter(spec, by_kind, reference)
        if spec.slug == "plain":
            return _Subject(lambda _: (False, 0.0), [0.0])
        score = _entropy if spec.slug == "entropy" else self._tokens_per_word
        return _Subject(_flagger(score, clean, self.options.fpr), [score(text) for text in reference])

    def _filter(self, spec: MethodSpec, clean: dict[str, list[str]], reference: list[str]) -> _Subject:
        from tokenmill.text import CPTFilter

        params: dict[str, Any] = dict(spec.params)
        made = CPTFilter(self._tokenizer, windows=_windows(self.options.windows), **params)
        if made.threshold is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # small kinds get the normal law
                made = made.calibrate(clean, fpr=self.options.fpr)

        def judge(text: str) -> tuple[bool, float]:
            found = made.decide([text])
            return bool(found.flagged[0]), float(found.cpt[0])

        judge(reference[0])
        return _Subject(judge, made.score_batch(reference).tolist())

    def _tokens_per_word(self, text: str) -> float:
        count = int(self._counter.counts([text])[0])
        return -count / max(len(text.split()), 1)

    @cached_property
    def _counter(self) -> Any:
        from tokenmill.text._char_lengths import CharCounter

        return CharCounter.of(self._tokenizer)

    @cached_property
    def _tokenizer(self) -> Any:
        from tokenmill import models

        return models.tokenizer(self.options.tokenizer, where=_WHERE)

    @cached_property
    def _sources(self) -> dict[str, Source]:
        return sources(_WHERE, self.options.data, self.options.limit)

    @cached_property
    def _encodings(self) -> list[str]:
        from tokenmill.text import OBFUSCATORS

        written = self.options.encodings
        names = list(OBFUSCATORS) if written == "all" else [name.strip() for name in written.split(",") if name.strip()]
        for name in names:
            if name not in OBFUSCATORS:
                raise unknown_name(_WHERE, "encoding", name, OBFUSCATORS)
        return names

    def _texts(self, kind: str, split: str, limit: int) -> list[tuple[str, str]]:
        """(id, text) of short pieces of a kind, drawn with the seed."""
        source = self._sources[kind].texts.get(split, {})
        prose = self._sources[kind].name in _MANUALS
        names = sorted(source)
        random.Random(f"{self.options.seed} {kind}").shuffle(names)
        found: list[tuple[str, str]] = []
        for name in names:
            for number, text in enumerate(_pieces(source[name], self.options.chars, prose=prose)):
                if int(self._counter.counts([text])[0]) < self.options.tokens:
                    continue
                found.append((f"{name}:{number}", text))
                if len(found) == limit:
                    return found
        return found


@dataclass(slots=True)
class _Subject:
    """`judge` says of a text whether it is flagged, and its score; `reference` holds scores of clean texts."""

    judge: Callable[[str], tuple[bool, float]]
    reference: list[float]

    def run(self, item: Item, /) -> Outcome:
        flagged, score = self.judge(item.content)
        above = sum(1.0 if other > score else 0.5 if other == score else 0.0 for other in self.reference)
        return Outcome((flagged, above / len(self.reference)), {"chars": float(len(item.content))})


def _flagger(score: Callable[[str], float], clean: list[str], fpr: float) -> Callable[[str], tuple[bool, float]]:
    """Flags what scores below all but a share of the clean texts."""
    import numpy as np

    from tokenmill.text.cpt_filtering import finite_quantile

    found = finite_quantile(np.array([score(text) for text in clean]), fpr)
    limit = -math.inf if found is None else found

    def judge(text: str) -> tuple[bool, float]:
        value = score(text)
        return value < limit, value

    return judge


def _entropy(text: str) -> float:
    """Minus the bits of a character, by the text's own counts: varied texts score low."""
    n = len(text)
    return sum(c / n * math.log2(c / n) for c in Counter(text).values())


def _pieces(text: str, longest: int, *, prose: bool) -> Iterator[str]:
    """The paragraphs of a text, or those of running prose alone, blanks collapsed, each cut behind a word."""
    for paragraph in text.split("\n\n"):
        flat = " ".join(paragraph.split())
        if prose and not (flat[:1].isalpha() and not flat[0].islower() and flat.endswith((".", ":", "。", "："))):
            continue  # grammar, code, options, tables and headings
        if len(flat) > longest:
            flat = flat[: flat.rfind(" ", 0, longest + 1)] if " " in flat[: longest + 1] else flat[:longest]
        if len(flat) >= min(_SHORTEST, longest):
            yield flat


def _windows(written: str) -> tuple[int, ...]:
    if written == "none":
        return ()
    try:
        found = tuple(int(part) for part in written.split(","))
    except ValueError:
        found = (0,)
    if min(found) < 1:
        raise LimitError(_WHERE, "windows", written, "numbers of at least 1 with commas, or none")
    return found
