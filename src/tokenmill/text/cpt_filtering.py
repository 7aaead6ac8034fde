"""CPT-Filtering: prompts hidden with ciphers and encodings, found by counting characters per token.

Zychlinski and Kainan, "Broken-Token: Filtering Obfuscated Prompts by Counting Characters-Per-Token"
(arXiv 2510.26847). A BPE vocabulary covers natural text with long tokens; a cipher, base64 or leetspeak falls apart
into short ones. The mean number of characters per token drops, and a threshold for each vocabulary tells them apart.

Use it in front of a language model or over training data where one tokenization is all you can spend. It detects
encodings, not intent: a harmful prompt in plain words passes, and languages, code and numbers need thresholds of their
own, which `CPTFilter.calibrate` fits by script on your clean texts.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from itertools import compress
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tokenmill.catalog import Card, Paper, Reported
from tokenmill.errors import LimitError, UnsupportedError, unknown_name
from tokenmill.text import _scripts as scripts
from tokenmill.text._char_lengths import CharCounter, check_text
from tokenmill.text._cpt_calibration import (
    Calibration,
    Form,
    Sample,
    auroc,
    best_threshold,
    finite_quantile,
    fit,
    with_languages,
)
from tokenmill.text._cpt_guard import FlaggedPromptError, Guard
from tokenmill.text._cpt_middleware import CPTMiddleware
from tokenmill.text._cpt_verdict import Decisions, Policy, Verdict, decide
from tokenmill.text._cpt_windows import TokenBatch, Window, collapse
from tokenmill.text._obfuscators import OBFUSCATORS, Obfuscator, caesar

__all__ = [
    "CARD",
    "OBFUSCATORS",
    "CPTFilter",
    "CPTMiddleware",
    "Calibration",
    "FlaggedPromptError",
    "Obfuscator",
    "Verdict",
    "Window",
    "auroc",
    "best_threshold",
    "caesar",
    "cpt",
    "finite_quantile",
    "window_cpt",
]

CARD = Card(
    name="CPT-Filtering",
    kind="pipeline",
    paper=Paper(
        title="Broken-Token: Filtering Obfuscated Prompts by Counting Characters-Per-Token",
        date="2025-10-30",
        arxiv="2510.26847",
    ),
    summary=(
        "Counts characters per token and flags texts that fall apart into short tokens, as ciphers and encodings do. "
        "Thresholds are fitted by script and length on clean texts, and windows show which part is encoded."
    ),
    claim=(
        "Tells encoded from clean prose of one language nearly without fault, at the cost of one tokenization. "
        "Of texts like the clean ones of the calibration, at most the asked share is flagged."
    ),
    api=(
        "CPTFilter",
        "cpt",
        "window_cpt",
        "Calibration",
        "Verdict",
        "FlaggedPromptError",
        "CPTMiddleware",
        "OBFUSCATORS",
    ),
    exact=False,
    trains=False,
    task="guard",
    needs=frozenset({"tokenizer"}),
    differs=(
        "thresholds by script, as one for all languages flags most Chinese, Japanese and Korean text",
        "windows of 10, 20 and 40 tokens with their own thresholds; a minimum over windows of 5 flags any acronym",
        "blanks are collapsed first, so that padding cannot raise the score",
        "clean-only thresholds with a correction for the number of texts, besides those from labelled texts",
    ),
    reported=Reported(
        table="abstract",
        setting="over 100,000 prompts, several encodings and tokenizers",
        metric="accuracy, said to be near perfect",
    ),
)

_WHERE = "CPTFilter"
_BATCH_CHARS = 1 << 20


def cpt(text: str, tokenizer: Any, *, ids: Sequence[int] | None = None) -> float | None:
    """Characters of a text per token, special tokens not counted; None for the empty text (paper, section 3).

    Args:
        text: as it is; characters are code points.
        tokenizer: a fast tokenizer, a tiktoken encoding, a TokenBytes, or an object with ``encode(text) -> ids``.
        ids: the tokens that were sent, where somebody else made them; the text is then not encoded again.

    Raises:
        LimitError: bytes, None, lone surrogates; ids that hold no token of the text.
        UnsupportedError: a tokenizer that drops blanks (WordPiece).
    """
    check_text("cpt", text)
    counter = CharCounter.of(tokenizer)
    if not text:
        return None
    given = ids if ids is not None else ()
    tokens = int(counter.counts([text])[0]) if ids is None else sum(i not in counter.specials for i in given)
    if not tokens:
        mend = "The tokenizer drops the whole text." if ids is None else "They are all special tokens."
        raise LimitError("cpt", "tokens", 0, "at least 1", mend)
    return len(text) / tokens


def window_cpt(text: str, tokenizer: Any, window: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Characters per token of every window of a text.

    Args:
        text: as it is.
        tokenizer: one whose tokens' lengths are known.
        window: W, tokens; a text with fewer has one window.

    Returns:
        scores (n,) float64 and spans (n, 2) int64: start and stop in characters of the text.

    Raises:
        LimitError: W below 1, or a text that is no text.
    """
    check_text("window_cpt", text)
    _check_window("window_cpt", window)
    batch = TokenBatch([text], CharCounter.of(tokenizer), max(len(text), 1))
    m = len(batch.lengths)
    if not m:
        return np.zeros(0), np.zeros((0, 2), dtype=np.int64)
    window = min(window, m)
    sums, _ = batch.sums(window)
    return sums / window, np.stack([batch.ends[: m - window + 1], batch.ends[window:]], axis=1)


@dataclass(frozen=True)
class CPTFilter:
    """Flags texts whose tokens are too short.

    Without a calibration or a threshold it scores; `calibrate` gives a filter that flags.

    Args:
        tokenizer: see `cpt`.
        calibration: thresholds by script for this vocabulary.
        threshold: one threshold for whole texts of every script (paper: one a tokenizer); windows are then not judged.
        windows: W, tokens of the windows that are judged as well; () looks at whole texts alone.
        min_chars: shorter texts are not judged.
        min_tokens: texts of fewer tokens are not judged.
        min_span: characters that the longest run of flagged windows must cover to flag a text.
        structured: what to do with texts that are mostly digits and signs (JSON, numbers, hex, binary), where the score
            decides nothing: allow them, flag them, or hold them to their threshold.
        chunk_chars: longer texts are cut at blanks before they are encoded; their score is then approximate.

    Raises:
        LimitError: a value outside its limit, or a calibration of another vocabulary.
        UnsupportedError: a tokenizer that drops blanks, or windows for one whose tokens' lengths are not known.
    """

    tokenizer: Any
    _: KW_ONLY
    calibration: Calibration | None = None
    threshold: float | None = None
    windows: tuple[int, ...] = (10, 20, 40)
    min_chars: int = 10
    min_tokens: int = 1
    min_span: int = 0
    structured: Literal["allow", "flag", "threshold"] = "allow"
    chunk_chars: int = 1_000_000
    _counter: CharCounter = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, least in (("min_chars", 0), ("min_tokens", 0), ("min_span", 0), ("chunk_chars", 100)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise LimitError(_WHERE, name, value, f"an integer of at least {least}")
        if self.structured not in ("allow", "flag", "threshold"):
            raise unknown_name(_WHERE, "structured", str(self.structured), ("allow", "flag", "threshold"))
        if self.threshold is not None and not (_is_number(self.threshold) and math.isfinite(self.threshold)):
            raise LimitError(_WHERE, "threshold", self.threshold, "a finite number")
        if self.threshold is not None and self.calibration is not None:
            raise LimitError(_WHERE, "threshold", self.threshold, "None beside a calibration", "Give one of the two.")
        object.__setattr__(self, "windows", tuple(self.windows))
        for window in self.windows:
            _check_window(_WHERE, window, "windows")
        object.__setattr__(self, "_counter", CharCounter.of(self.tokenizer))
        if self.calibration is not None:
            self.calibration.check(self._counter.fingerprint)

    @property
    def fingerprint(self) -> str:
        """16 hex digits that tell the tokenizer's vocabulary from others."""
        return self._counter.fingerprint

    def score(self, text: str) -> float | None:
        """Characters per token with blanks collapsed; None for a text without any."""
        found = self.score_batch([text])[0]
        return None if math.isinf(found) else float(found)

    def score_batch(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """(B,) float64: characters per token; inf for texts that are empty, 0 where no tokens came out."""
        parts = [self._decided(part, judge=False).cpt for part in self._batches(texts)]
        return np.concatenate([np.zeros(0), *parts])

    def flag(self, text: str) -> Verdict:
        """The verdict on one text."""
        return self.decide([text]).verdict(0)

    def flag_batch(self, texts: Sequence[str]) -> list[Verdict]:
        """The verdicts on many texts; each is what `flag` says of it alone."""
        found = []
        for part in self._batches(texts):
            decisions = self._decided(part)
            found += [decisions.verdict(i) for i in range(len(part))]
        return found

    def decide(self, texts: Sequence[str]) -> Decisions:
        """Verdicts as arrays, for bulk work; ``verdict(i)`` gives the whole of one."""
        return self._decided([check_text(_WHERE, text) for text in texts])

    def predicate(self, texts: Any) -> Any:
        """True for what is kept: a text, or a list of texts.

        ``dataset.filter(cpt_filter.predicate, input_columns="text", batched=True)``.
        """
        if isinstance(texts, str):
            return not self.flag(texts).flagged
        return [not flagged for part in self._batches(texts) for flagged in self._decided(part).flagged.tolist()]

    def guard(self, call: Callable[..., Any], *, refusal: Any = None, roles: tuple[str, ...] = ("user",)) -> Guard:
        """`call` behind this filter: its first argument, a prompt or chat messages, is checked before.

        Args:
            call: a pipeline, or a function that renders the chat template and runs ``model.generate``.
            refusal: what is returned for a flagged prompt; None raises.
            roles: whose messages are checked.

        Raises:
            FlaggedPromptError: (when called) a flagged message, with its verdict and index.
        """
        return Guard(call, self, refusal, roles)

    def calibrate(
        self,
        clean: Iterable[str] | Mapping[str, Iterable[str]],
        encoded: Iterable[str] | None = None,
        *,
        fpr: float = 0.01,
        form: Form = "buckets",
    ) -> CPTFilter:
        """This filter with thresholds from clean texts; with encoded ones the whole-text threshold separates both.

        Args:
            clean: texts as they come in daily use, in all their scripts; or language -> its texts: then the share holds
                for each language that has texts enough, and not only for all that are written in one script.
            encoded: texts that are to be flagged; they need not be clean ones' encodings.
            fpr: share of clean texts that may be flagged, shared out among the whole text and the windows.
            form: thresholds by length, or mu - z sqrt(sigma^2 / tokens + omega^2); the second also stands in for
                lengths with too few texts.

        Raises:
            LimitError: fpr outside (0, 1), or no clean text that is long enough.
        """
        named = {name: self._sample(texts) for name, texts in clean.items()} if isinstance(clean, Mapping) else {}
        languages = {name: own for name, own in named.items() if own is not None}
        if isinstance(clean, Mapping):
            sample = Sample.joined(languages.values()) if languages else None
        else:
            sample = self._sample(clean)
        if sample is None:
            raise LimitError("CPTFilter.calibrate", "clean", "no texts", f"at least one of {self.min_chars} characters")
        theirs = None if encoded is None else self._sample(encoded)
        made = fit(sample, theirs, fingerprint=self.fingerprint, fpr=fpr, form=form)
        made = with_languages(made, languages)
        for note in made.notes:
            warnings.warn(f"CPTFilter.calibrate: {note}", stacklevel=2)
        return replace(self, calibration=made, threshold=None)

    def _sample(self, texts: Iterable[str]) -> Sample | None:
        parts = []
        for part in self._batches(texts):
            cut = [collapse(text) for text in part]
            cut = [text for text in cut if len(text) >= max(self.min_chars, 1)]
            batch = TokenBatch(cut, self._counter, self.chunk_chars) if cut else None
            if batch is not None and (keep := batch.tokens >= max(self.min_tokens, 1)).any():
                parts.append(_measured(batch if keep.all() else self._again(cut, keep), self.windows))
        return Sample.joined(parts) if parts else None

    def _again(self, texts: list[str], keep: NDArray[np.bool_]) -> TokenBatch:
        return TokenBatch(list(compress(texts, keep.tolist())), self._counter, self.chunk_chars)

    def _batches(self, texts: Iterable[str]) -> Iterator[list[str]]:
        if isinstance(texts, str | bytes):
            raise LimitError(_WHERE, "texts", type(texts).__name__, "a list of texts", "Use flag for one text.")
        part, size = [], 0
        for text in texts:
            part.append(check_text(_WHERE, text))
            size += len(text)
            if size >= _BATCH_CHARS:
                yield part
                part, size = [], 0
        if part:
            yield part

    def _decided(self, texts: Sequence[str], *, judge: bool = True) -> Decisions:
        if judge and self.calibration is None and self.threshold is None:
            mend = "Use CPTFilter(...).calibrate(clean_texts), or pass calibration= or threshold=."
            raise UnsupportedError(_WHERE, "there is no threshold", mend)
        policy = Policy(
            calibration=self.calibration,
            threshold=self.threshold,
            windows=self.windows,
            min_chars=self.min_chars,
            min_tokens=self.min_tokens,
            min_span=self.min_span,
            structured=self.structured,
            chunk=self.chunk_chars,
        )
        return decide(texts, self._counter, policy, judge=judge)


def _measured(batch: TokenBatch, windows: Sequence[int]) -> Sample:
    """What calibration needs to know of a batch."""
    squares = np.add.reduceat(batch.lengths.astype(np.float64) ** 2, batch.offsets[:-1])
    minima = {}
    for window in windows:
        sums, whole = batch.sums(window)
        starts = np.flatnonzero(whole)
        low = np.full((len(batch.texts), len(scripts.SCRIPTS)), np.inf)
        if starts.size:
            np.minimum.at(low, (batch.owners(starts), batch.classes(starts, window)), sums[starts] / window)
        minima[window] = low
    return Sample(batch.script, batch.chars, batch.tokens, squares, minima)


def _check_window(where: str, window: Any, name: str = "window") -> None:
    if not isinstance(window, int) or isinstance(window, bool) or window < 1:
        raise LimitError(where, name, window, "an integer of at least 1")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def small() -> CPTFilter:
    """A filter over a toy vocabulary of bytes and a few words, used by the laws."""
    from tokenmill.text._token_bytes import TokenBytes

    ranks: Mapping[bytes, int] = {bytes([i]): i for i in range(256)} | {b"th": 256, b"the": 257, b" the": 258}
    return CPTFilter(TokenBytes.from_ranks(ranks), threshold=1.05, windows=(2, 4))
