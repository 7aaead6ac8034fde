"""Thresholds on characters per token, for one vocabulary: fitted, used for many texts at once, saved and loaded."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import NormalDist
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from tokenmill.errors import LimitError, unknown_name
from tokenmill.text._scripts import SCRIPTS

EDGES = (40, 100, 300)
"""Characters up to which a length bucket reaches; the last has no end."""
Form = Literal["buckets", "normal"]
_SCHEMA = 1

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def finite_quantile(scores: Floats, alpha: float) -> float | None:
    """The largest threshold below which a new score falls with probability at most `alpha`, or None for too few.

    With n exchangeable scores a new one is below the k-th smallest with probability at most k / (n + 1).

    Raises:
        LimitError: `alpha` outside (0, 1).
    """
    check_share("finite_quantile", "alpha", alpha)
    k = math.floor(alpha * (len(scores) + 1) + 1e-9)
    return float(np.partition(scores, k - 1)[k - 1]) if k >= 1 else None


def best_threshold(clean: Floats, encoded: Floats) -> tuple[float, float]:
    """(threshold, balanced accuracy): the middle of the widest gap that separates best; below it is encoded.

    Raises:
        LimitError: one of the sides is empty.
    """
    for name, side in (("clean", clean), ("encoded", encoded)):
        if not len(side):
            raise LimitError("best_threshold", name, "no scores", "at least one score")
    points = np.unique(np.concatenate([clean, encoded]))
    # Between two neighbours nothing changes: score < threshold holds for all up to the lower one.
    hits = np.searchsorted(np.sort(encoded), points, side="right") / len(encoded)
    false = np.searchsorted(np.sort(clean), points, side="right") / len(clean)
    accuracy = (hits + 1 - false) / 2  # (P,) of a threshold just above each point
    gaps = np.append(np.diff(points), 0.0)
    best = np.flatnonzero(accuracy >= accuracy.max() - 1e-12)
    at = int(best[np.argmax(gaps[best])])
    found = (points[at] + points[at + 1]) / 2 if at + 1 < len(points) else np.nextafter(points[at], np.inf)
    return float(found), float(accuracy[at])


def auroc(clean: Floats, encoded: Floats) -> float:
    """Probability that an encoded text has a lower score than a clean one, ties half.

    Raises:
        LimitError: one of the sides is empty.
    """
    for name, side in (("clean", clean), ("encoded", encoded)):
        if not len(side):
            raise LimitError("auroc", name, "no scores", "at least one score")
    ordered = np.sort(encoded)
    lower = np.searchsorted(ordered, clean, side="left") + np.searchsorted(ordered, clean, side="right")
    return float(lower.sum() / (2 * len(clean) * len(encoded)))


@dataclass(frozen=True, slots=True)
class Group:
    """The thresholds of one script.

    Attributes:
        n: clean texts.
        mu: characters per token.
        sigma: deviation of the characters of one token.
        omega: deviation between texts that the length does not explain.
        z: how many deviations below mu the threshold is.
        buckets: a threshold for each length bucket; None where there were too few texts, and the normal form stands.
        windows: window -> threshold; windows without enough texts are missing.
        tau: the supervised threshold, which takes the place of `buckets` and the normal form.
        auroc: of clean against encoded, when there were encoded texts.
        balanced_accuracy: of `tau`.
    """

    n: int
    mu: float
    sigma: float
    omega: float
    z: float
    buckets: tuple[float | None, ...] = (None,) * (len(EDGES) + 1)
    windows: Mapping[int, float] = field(default_factory=dict)
    tau: float | None = None
    auroc: float | None = None
    balanced_accuracy: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Thresholds by script, tied to the vocabulary they were fitted for.

    Attributes:
        fingerprint: of the vocabulary.
        fpr: share of clean texts that may be flagged.
        form: thresholds by length bucket, or mu - z sqrt(sigma^2 / tokens + omega^2).
        groups: script -> thresholds, and "script/language" -> those of a language of its own. A text is held to the
            lowest of its script, whatever language it may be in.
        notes: what was not as it should be (too few texts, ...).
    """

    fingerprint: str
    fpr: float
    form: Form = "buckets"
    groups: Mapping[str, Group] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_share("Calibration", "fpr", self.fpr)
        if self.form not in get_args(Form):
            raise unknown_name("Calibration", "form", str(self.form), get_args(Form))
        for name, group in self.groups.items():
            if _script(name) not in SCRIPTS:
                raise unknown_name("Calibration", "script", _script(name), SCRIPTS)
            numbers = (group.mu, group.sigma, group.omega, group.z, group.tau, *group.buckets, *group.windows.values())
            for value in numbers:
                if value is not None and not math.isfinite(value):
                    raise LimitError("Calibration", f"threshold of {name}", value, "finite")

    @property
    def windows(self) -> tuple[int, ...]:
        """All windows that some script has a threshold for."""
        return tuple(sorted({w for group in self.groups.values() for w in group.windows}))

    def thresholds(self, script: NDArray[np.uint8], chars: Ints, tokens: Ints) -> Floats:
        """(B,) float64: the threshold of each text; -inf where its script has none."""
        found = np.full(len(script), np.inf)
        bucket = np.searchsorted(EDGES, chars, side="left")
        for name, group in self.groups.items():
            here = np.flatnonzero(script == SCRIPTS.index(_script(name)))
            if not here.size:
                continue
            if group.tau is not None:
                found[here] = np.minimum(found[here], group.tau)
                continue
            spread = np.sqrt(group.sigma**2 / np.maximum(tokens[here], 1) + group.omega**2)
            value = group.mu - group.z * spread
            if self.form == "buckets":
                own = np.array([np.nan if t is None else t for t in group.buckets])[bucket[here]]
                value = np.where(np.isnan(own), value, own)
            found[here] = np.minimum(found[here], value)
        return np.where(np.isposinf(found), -np.inf, found)

    def window_limits(self, window: int) -> Floats:
        """(S,) float64: the threshold of a window by script; -inf where there is none."""
        found = np.full(len(SCRIPTS), np.inf)
        for name, group in self.groups.items():
            if window in group.windows:
                script = SCRIPTS.index(_script(name))
                found[script] = min(found[script], group.windows[window])
        return np.where(np.isposinf(found), -np.inf, found)

    def check(self, fingerprint: str) -> None:
        """Refuse another vocabulary.

        Raises:
            LimitError: the fingerprints differ.
        """
        if fingerprint != self.fingerprint:
            raise LimitError(
                "CPTFilter",
                "calibration",
                self.fingerprint,
                "for the vocabulary of the tokenizer",
                f"threshold was calibrated for vocabulary {self.fingerprint}, tokenizer has {fingerprint}; "
                "calibrate for this tokenizer.",
            )

    def save(self, file: str | os.PathLike[str]) -> None:
        """Write JSON, whole or not at all."""
        path = Path(file)
        text = json.dumps({"schema": _SCHEMA, **asdict(self)}, indent=2)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as out:
                out.write(text + "\n")
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, file: str | os.PathLike[str]) -> Calibration:
        """Read what `save` wrote.

        Raises:
            LimitError: no such file, or one that is no calibration.
        """
        path = Path(file)
        if not path.is_file():
            raise LimitError("Calibration.load", "file", str(path), "a file that Calibration.save wrote")
        try:
            data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if data.pop("schema") != _SCHEMA:
                raise ValueError("schema")
            groups = {name: _group(value) for name, value in data.pop("groups").items()}
            return cls(groups=groups, notes=tuple(data.pop("notes")), **data)
        except LimitError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            limit = "a file that Calibration.save wrote"
            raise LimitError("Calibration.load", "file", str(path), limit, f"Reading it: {error!r}.") from error


def _script(group: str) -> str:
    """The script in a group's name."""
    return group.partition("/")[0]


def _group(value: Mapping[str, Any]) -> Group:
    windows = {int(w): float(t) for w, t in value["windows"].items()}
    return Group(**{**value, "buckets": tuple(value["buckets"]), "windows": windows})


@dataclass(slots=True)
class Sample:
    """What calibration knows of some texts: arrays (B,), and for each window the lowest score by script (B, S)."""

    script: NDArray[np.uint8]
    chars: Ints
    tokens: Ints
    squares: Floats
    minima: dict[int, Floats]

    @property
    def cpt(self) -> Floats:
        """(B,) float64."""
        return self.chars / self.tokens

    def rows(self, keep: NDArray[np.bool_]) -> Sample:
        """Some of the texts."""
        arrays = (self.script[keep], self.chars[keep], self.tokens[keep], self.squares[keep])
        return Sample(*arrays, {w: low[keep] for w, low in self.minima.items()})

    @classmethod
    def joined(cls, parts: Iterable[Sample]) -> Sample:
        """Samples one behind the other."""
        found = list(parts)
        names = ("script", "chars", "tokens", "squares")
        arrays = {name: np.concatenate([getattr(part, name) for part in found]) for name in names}
        minima = {w: np.concatenate([part.minima[w] for part in found]) for w in found[0].minima}
        return cls(**arrays, minima=minima)


def fit(clean: Sample, encoded: Sample | None, *, fingerprint: str, fpr: float, form: Form) -> Calibration:
    """Thresholds of every script that clean texts are in.

    The error is shared out evenly (Bonferroni): the whole text and each window get fpr / (1 + windows). A window that
    has too few texts for its share is left out.
    """
    check_share("CPTFilter.calibrate", "fpr", fpr)
    notes: list[str] = []
    groups: dict[str, Group] = {}
    for index, name in enumerate(SCRIPTS):
        here = clean.script == index
        least = {w: low[:, index][np.isfinite(low[:, index])] for w, low in clean.minima.items()}
        share = fpr / (1 + len(least))
        windows = {w: t for w, scores in least.items() if (t := finite_quantile(scores, share)) is not None}
        short = [w for w, scores in least.items() if len(scores) and w not in windows]
        if short:
            needed = math.ceil(1 / share) - 1
            notes.append(f"{name}: no threshold for windows of {short}, which need {needed} clean texts")
        if here.any():
            group, said = _fit_group(clean, here, fpr if not windows else share, windows)
            notes += [f"{name}: {said}"] if said else []
            groups[name] = group if encoded is None else _supervised(group, clean, here, encoded, index)
        elif windows:
            normal = Group(0, 0.0, 0.0, 0.0, 0.0, windows=windows, tau=0.0)  # nothing has fewer than 0
            groups[name] = normal
    return Calibration(fingerprint=fingerprint, fpr=fpr, form=form, groups=groups, notes=tuple(notes))


def with_languages(made: Calibration, clean: Mapping[str, Sample]) -> Calibration:
    """The calibration with thresholds for each language besides, where it has texts enough for its share.

    Args:
        made: of all texts together.
        clean: language -> its texts.
    """
    groups = dict(made.groups)
    notes = list(made.notes)
    for language, sample in clean.items():
        needed = math.ceil((1 + len(sample.minima)) / made.fpr) - 1
        for index, name in enumerate(SCRIPTS):
            here = sample.script == index
            if here.sum() >= needed:
                own = fit(sample.rows(here), None, fingerprint=made.fingerprint, fpr=made.fpr, form=made.form)
                groups[f"{name}/{language}"] = own.groups[name]
        if not any(key.endswith(f"/{language}") for key in groups):
            most = int(np.bincount(sample.script).max())
            notes.append(
                f"{language}: no thresholds of its own, which need {needed} clean texts of a script, not {most}"
            )
    return replace(made, groups=groups, notes=tuple(notes))


def _fit_group(clean: Sample, here: NDArray[np.bool_], share: float, windows: Mapping[int, float]) -> tuple[Group, str]:
    cpt, chars, tokens = clean.cpt[here], clean.chars[here], clean.tokens[here]
    mu = float(chars.sum() / tokens.sum())
    variance = max(float(clean.squares[here].sum() / tokens.sum()) - mu**2, 0.0)
    between = max(float(np.mean((cpt - mu) ** 2 - variance / tokens)), 0.0)
    spread = np.sqrt(variance / tokens + between)
    normal = finite_quantile((cpt - mu) / np.maximum(spread, 1e-12), share)
    said = ""
    if normal is None:
        normal = NormalDist().inv_cdf(share)
        said = f"{len(cpt)} clean texts, {math.ceil(1 / share) - 1} are needed; the threshold is that of a normal law"
    bucket = np.searchsorted(EDGES, chars, side="left")
    buckets = tuple(finite_quantile(cpt[bucket == b], share) for b in range(len(EDGES) + 1))
    return Group(len(cpt), mu, math.sqrt(variance), math.sqrt(between), -normal, buckets, windows), said


def _supervised(group: Group, clean: Sample, here: NDArray[np.bool_], encoded: Sample, index: int) -> Group:
    theirs = encoded.cpt[encoded.script == index]
    if not len(theirs):
        return group
    ours = clean.cpt[here]
    tau, accuracy = best_threshold(ours, theirs)
    return replace(group, tau=tau, auroc=auroc(ours, theirs), balanced_accuracy=accuracy)


def check_share(where: str, parameter: str, value: Any) -> None:
    """Refuse what is no number between 0 and 1."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        raise LimitError(where, parameter, value, "in (0, 1)", "A usual value is 0.01.")
