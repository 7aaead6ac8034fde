"""What a filter says about texts: as arrays for bulk work, and as one object for each text that is looked at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tokenmill.text import _scripts as scripts
from tokenmill.text._char_lengths import CharCounter
from tokenmill.text._cpt_calibration import Calibration
from tokenmill.text._cpt_windows import TokenBatch, Window, collapse, counted, merged, to_raw


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a filter says about one text.

    Attributes:
        flagged: whether it looks encoded.
        cpt: characters per token with blanks collapsed; None for a text without characters or tokens.
        threshold: that of the whole text; None where its script has none.
        worst_span: the part with the fewest characters per token, in the raw text; None where nothing was measured.
        reason: in words.
        script: of the whole text, or "structured".
        spans: flagged windows in the raw text, those that touch as one.
    """

    flagged: bool
    cpt: float | None
    threshold: float | None
    worst_span: Window | None
    reason: str
    script: str
    spans: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """The settings of a filter that verdicts depend on; see `CPTFilter`."""

    calibration: Calibration | None
    threshold: float | None
    windows: tuple[int, ...]
    min_chars: int
    min_tokens: int
    min_span: int
    structured: Literal["allow", "flag", "threshold"]
    chunk: int


@dataclass(slots=True)
class Decisions:
    """Verdicts on B texts.

    Attributes:
        texts: as they came.
        chars: (B,) int64, characters with blanks collapsed.
        tokens: (B,) int64.
        cpt: (B,) float64; inf for empty texts, 0 where no tokens came out.
        script: (B,) uint8, indices into `SCRIPTS`.
        threshold: (B,) float64, -inf for none.
        flagged: (B,) bool.
        hits: text -> flagged windows as (start, stop) in the collapsed text.
    """

    texts: Sequence[str]
    chars: NDArray[np.int64]
    tokens: NDArray[np.int64]
    cpt: NDArray[np.float64]
    script: NDArray[np.uint8]
    threshold: NDArray[np.float64]
    flagged: NDArray[np.bool_]
    hits: dict[int, list[tuple[int, int]]]
    policy: Policy
    batch: TokenBatch | None

    def verdict(self, i: int) -> Verdict:
        """Everything about one text."""
        text, n, m = self.texts[i], int(self.chars[i]), int(self.tokens[i])
        limit = float(self.threshold[i])
        spans = merged(self.hits.get(i, []))
        worst = self.batch.lowest(i, self.policy.windows) if self.batch is not None else None
        if worst is None and m:
            worst = (0, n, m)
        found: list[Window] = []
        same = len(text) == n
        if worst is not None:
            start, stop, size = worst
            score = (stop - start) / size
            ((start, stop),) = [(start, stop)] if same else to_raw(text, [(start, stop)])
            found = [Window(start, stop, score, size)]
        return Verdict(
            flagged=bool(self.flagged[i]),
            cpt=float(self.cpt[i]) if n and m else None,
            threshold=limit if np.isfinite(limit) else None,
            worst_span=found[0] if found else None,
            reason=self._reason(i, n, m),
            script=scripts.SCRIPTS[self.script[i]],
            spans=tuple(spans if same else to_raw(text, spans)),
        )

    def _reason(self, i: int, n: int, m: int) -> str:
        policy, script = self.policy, scripts.SCRIPTS[self.script[i]]
        if not n:
            return "empty"
        if not m:
            return "no tokens produced"
        if n < policy.min_chars or m < policy.min_tokens:
            return "too short"
        if i in self.hits and self.flagged[i]:
            return "windows with too few characters per token"
        if script == "structured" and policy.structured != "threshold":
            return "structured: mostly digits and signs, where characters per token decide nothing"
        if self.flagged[i]:
            return "too few characters per token"
        if not np.isfinite(self.threshold[i]):
            return f"no threshold for the script {script}"
        return "ok"


def decide(texts: Sequence[str], counter: CharCounter, policy: Policy, *, judge: bool = True) -> Decisions:
    """Verdicts on a batch of checked texts. Windows cost the lengths of tokens; without them tokens are counted only.

    Args:
        texts: B texts.
        counter: of the tokenizer.
        policy: of the filter.
        judge: False scores and flags nothing.
    """
    cut = [collapse(text) for text in texts]
    limits = _window_limits(policy) if judge else {}
    batch = TokenBatch(cut, counter, policy.chunk) if limits else None
    chars = np.fromiter(map(len, cut), dtype=np.int64, count=len(cut))
    tokens = batch.tokens if batch is not None else counted(cut, counter, policy.chunk)
    # Nothing is below any threshold where there is no text, and everything is where a text has no tokens.
    cpt = np.where(chars == 0, np.inf, chars / np.maximum(tokens, 1))
    cpt[(chars > 0) & (tokens == 0)] = 0.0
    script = batch.script if batch is not None else scripts.text_classes(cut)
    threshold, flagged = np.full(len(cut), -np.inf), np.zeros(len(cut), dtype=bool)
    hits: dict[int, list[tuple[int, int]]] = {}
    if judge:
        threshold = _thresholds(policy, script, chars, tokens)
        flagged = cpt < threshold
        if policy.structured == "flag":
            flagged |= script == scripts.STRUCTURED
        judged = (chars >= policy.min_chars) & (tokens >= policy.min_tokens)
        if batch is not None:
            hits = _hits(batch, limits, judged, policy.min_span)
            flagged[list(hits)] = True
        flagged &= judged
        flagged |= (tokens == 0) & (chars > 0)
    return Decisions(texts, chars, tokens, cpt, script, threshold, flagged, hits, policy, batch)


def _window_limits(policy: Policy) -> dict[int, NDArray[np.float64]]:
    if policy.calibration is None:
        return {}
    found = {}
    for window in policy.windows:
        limits = policy.calibration.window_limits(window)
        if policy.structured != "threshold":
            limits[scripts.STRUCTURED] = -np.inf
        if np.isfinite(limits).any():
            found[window] = limits
    return found


def _thresholds(
    policy: Policy, script: NDArray[np.uint8], chars: NDArray[np.int64], tokens: NDArray[np.int64]
) -> NDArray[np.float64]:
    if policy.calibration is not None:
        found = policy.calibration.thresholds(script, chars, tokens)
    else:
        found = np.full(len(script), -np.inf if policy.threshold is None else policy.threshold)
    if policy.structured != "threshold":
        found[script == scripts.STRUCTURED] = -np.inf
    return found


def _hits(
    batch: TokenBatch, limits: dict[int, NDArray[np.float64]], judged: NDArray[np.bool_], min_span: int
) -> dict[int, list[tuple[int, int]]]:
    """Text -> its flagged windows, for texts whose longest run of them is long enough."""
    found: dict[int, list[tuple[int, int]]] = {}
    for window, limit in limits.items():
        starts = batch.below(window, limit)
        for text, start in zip(batch.owners(starts).tolist(), starts.tolist(), strict=True):
            if judged[text]:
                found.setdefault(text, []).append(batch.span(text, start, start + window))
    if min_span:
        found = {i: spans for i, spans in found.items() if max(b - a for a, b in merged(spans)) >= min_span}
    return found
