"""How tokenizers cut texts: tokens per character, terms, lengths of tokens, and what errors in a text change."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenmill.errors import LimitError, TokenmillError, unknown_name
from tokenmill.text._token_bytes import TokenBytes

WHERE = "TokenizerReport"
LOOK_ALIKES: Mapping[str, str] = {
    "o": "0", "0": "O", "O": "0", "l": "1", "1": "l", "I": "l", "i": "j", "e": "c", "c": "e", "a": "o", "s": "5",
    "5": "S", "S": "5", "B": "8", "8": "B", "g": "q", "q": "g", "h": "b", "b": "h", "n": "u", "u": "n", "m": "n",
    "t": "f", "f": "t", "v": "y", "y": "v", "r": "n", "d": "a", "Z": "2", "2": "Z",
}  # fmt: skip
"""The noise model "look-alikes": ASCII for ASCII, so that clean and noisy text have the same bytes' places."""


def with_noise(text: str, rate: float, rng: np.random.Generator) -> tuple[str, int]:
    """`text` with a share of its characters taken for one that looks alike, and how many were."""
    if not 0 < rate <= 1:
        raise LimitError(WHERE, "noise_rate", rate, "in (0, 1]")
    hit = rng.random(len(text)) < rate  # (characters,)
    letters, errors = list(text), 0
    for place in np.flatnonzero(hit).tolist():
        if (other := LOOK_ALIKES.get(letters[place])) is not None:
            letters[place] = other
            errors += 1
    return "".join(letters), errors


def edit_distance(a: Sequence[int], b: Sequence[int]) -> int:
    """Insertions, deletions and substitutions between two sequences, row by row in numpy: (|b| + 1,) a row."""
    one, other = np.asarray(a, dtype=np.int64), np.asarray(b, dtype=np.int64)
    places = np.arange(len(other) + 1)
    row = places.copy()
    for token in one:
        step = np.minimum(row[1:] + 1, row[:-1] + (other != token))
        step = np.concatenate([[row[0] + 1], step])
        # Insertions along the row: the least of all that lies to the left, plus the way from there.
        row = np.minimum.accumulate(step - places) + places
    return int(row[-1])


def boundary_stability(tokenizer: Any, texts: Iterable[str], rate: float = 0.03, seed: int = 0) -> dict[str, float]:
    """What look-alike errors do to the tokens; our definitions, as the paper gives an example and no measure.

    Returns:
        jaccard: of the sets of places (bytes) where tokens end, mean over texts with an error.
        edits_per_error: token edits for each wrong character, over all texts.
        equal_count: share of texts with the same number of tokens.
        length_ratio: noisy over clean tokens, over all texts.
        errors: wrong characters.

    Raises:
        LimitError: a rate outside (0, 1], or no text in which an error fell.
    """
    view = TokenBytes.of(tokenizer)
    rng = np.random.default_rng(seed)
    overlaps: list[float] = []
    edits = errors = equal = clean_tokens = noisy_tokens = 0
    for text in texts:
        noisy, wrong = with_noise(text, rate, rng)
        if not wrong:
            continue
        before, after = view.encode(text), view.encode(noisy)
        ends = [np.cumsum(view.lengths[ids]) for ids in (before, after)]
        both = len(np.intersect1d(ends[0], ends[1]))
        overlaps.append(both / (len(ends[0]) + len(ends[1]) - both))
        edits += edit_distance(before, after)
        errors += wrong
        equal += len(before) == len(after)
        clean_tokens += len(before)
        noisy_tokens += len(after)
    if not overlaps:
        raise LimitError(WHERE, "texts", 0, "at least one in which an error falls", "Give longer texts.")
    return {
        "jaccard": float(np.mean(overlaps)),
        "edits_per_error": edits / errors,
        "equal_count": equal / len(overlaps),
        "length_ratio": noisy_tokens / clean_tokens,
        "errors": float(errors),
    }


class TokenizerReport:
    """Tokenizers side by side on data sets; texts are counted as they are, before any normalisation.

    Args:
        tokenizers: name -> whatever `TokenBytes.of` reads, or an object with ``encode(text)``.
        datasets: name -> texts.
        baseline: the tokenizer that reductions refer to; the first one by default.
        terms: strings counted one by one, without special tokens.
        noise_rate: share of characters that the noise tries to change; 0 leaves boundary stability out.
        noise_chars: characters of a text that are compared under noise, from its beginning.
        seed: of noise and bootstrap.
    """

    def __init__(
        self,
        tokenizers: Mapping[str, Any],
        datasets: Mapping[str, Iterable[str]],
        *,
        baseline: str | None = None,
        terms: Sequence[str] = (),
        noise_rate: float = 0.03,
        noise_chars: int = 2000,
        seed: int = 0,
    ) -> None:
        if not tokenizers or not datasets:
            raise LimitError(WHERE, "tokenizers", list(tokenizers), "at least one, and at least one data set")
        self.baseline = next(iter(tokenizers)) if baseline is None else baseline
        if self.baseline not in tokenizers:
            raise unknown_name(WHERE, "baseline", self.baseline, tokenizers)
        if not 0 <= noise_rate <= 1:
            raise LimitError(WHERE, "noise_rate", noise_rate, "in [0, 1]")
        self.tokenizers = dict(tokenizers)
        self.datasets = {name: list(texts) for name, texts in datasets.items()}
        for name, texts in self.datasets.items():
            if not any(texts):
                raise LimitError(WHERE, f"texts of {name!r}", len(texts), "at least one that is not empty")
        self.terms, self.noise_rate, self.noise_chars, self.seed = tuple(terms), noise_rate, noise_chars, seed
        self._made: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data: rows, terms, lengths, stability, and what the noise was. Computed once."""
        if self._made is None:
            self._made = {
                "baseline": self.baseline,
                "rows": self._rows(),
                "terms": self._terms(),
                "lengths": {name: shares for name, t in self.tokenizers.items() if (shares := token_lengths(t))},
                "noise": {"model": "look-alikes", "rate": self.noise_rate, "seed": self.seed},
                "stability": self._stability(),
            }
        return self._made

    def to_markdown(self) -> str:
        """The report as tables."""
        made = self.to_dict()
        head = (
            "data", "tokenizer", "documents", "characters", "bytes", "tokens", "tokens/char", "bytes/token",
            f"reduction against {self.baseline}", "MB/s",
        )  # fmt: skip
        rows = []
        for r in made["rows"]:
            low, high = r["reduction_interval"]
            reduction = f"{r['reduction']:.1%} [{low:.1%}, {high:.1%}]"
            ratios = (f"{r['tokens_per_char']:.4f}", f"{r['bytes_per_token']:.2f}", reduction, f"{r['mb_per_s']:.1f}")
            rows.append((r["data"], r["tokenizer"], r["documents"], r["characters"], r["bytes"], r["tokens"], *ratios))
        parts = [_table(head, rows)]
        if self.terms:
            names = list(self.tokenizers)
            parts.append(_table(("term", *names), [(t, *(made["terms"][n][t] for n in names)) for t in self.terms]))
        if made["stability"]:
            noise = made["noise"]
            parts.append(f"Noise: {noise['model']}, rate {noise['rate']}, seed {noise['seed']}.")
            keys = ("jaccard", "edits_per_error", "equal_count", "length_ratio")
            lines = [(s["data"], s["tokenizer"], *(f"{s[k]:.3f}" for k in keys)) for s in made["stability"]]
            parts.append(_table(("data", "tokenizer", *(k.replace("_", " ") for k in keys)), lines))
        return "\n\n".join(parts)

    def plots(self) -> dict[str, str]:
        """Name -> SVG text; needs the extra ``bench``."""
        from tokenmill.text._tokenizer_plots import draw

        return draw(self.to_dict())

    def _rows(self) -> list[dict[str, Any]]:
        rows = []
        for data, texts in self.datasets.items():
            characters, size = sum(map(len, texts)), sum(len(t.encode()) for t in texts)
            counts: dict[str, NDArray[np.int64]] = {}
            speeds = {}
            for name, tokenizer in self.tokenizers.items():
                encode = encoder(tokenizer)
                encode(texts[0])
                start = time.perf_counter()
                counts[name] = np.array([len(encode(text)) for text in texts], dtype=np.int64)  # (documents,)
                speeds[name] = size / 1e6 / max(time.perf_counter() - start, 1e-9)
            for name, count in counts.items():
                tokens = int(count.sum())
                reduction, interval = reduced(counts[self.baseline], count, self.seed)
                rows.append(
                    {
                        "data": data,
                        "tokenizer": name,
                        "documents": len(texts),
                        "characters": characters,
                        "bytes": size,
                        "tokens": tokens,
                        "tokens_per_char": tokens / characters,
                        "bytes_per_token": size / max(tokens, 1),
                        "reduction": reduction,
                        "reduction_interval": interval,
                        "mb_per_s": speeds[name],
                    }
                )
        return rows

    def _terms(self) -> dict[str, dict[str, int]]:
        found = {}
        for name, tokenizer in self.tokenizers.items():
            encode = encoder(tokenizer)
            found[name] = {term: len(encode(term)) for term in self.terms}
        return found

    def _stability(self) -> list[dict[str, Any]]:
        rows = []
        for data, texts in self.datasets.items() if self.noise_rate else ():
            begun = [text[: self.noise_chars] for text in texts]
            for name, tokenizer in self.tokenizers.items():
                try:
                    found = boundary_stability(tokenizer, begun, self.noise_rate, self.seed)
                except TokenmillError:  # no bytes of its tokens are known, or no error fell: the row is left out
                    continue
                rows.append({"data": data, "tokenizer": name, **found})
        return rows


def encoder(tokenizer: Any) -> Any:
    """Text -> tokens without special tokens, as the tokenizer itself would cut it."""
    import inspect

    encode = tokenizer.encode
    try:
        known = inspect.signature(encode).parameters
    except (TypeError, ValueError):
        known = {}
    backend = getattr(tokenizer, "backend_tokenizer", None) or getattr(tokenizer, "_tokenizer", None)
    if backend is not None and hasattr(backend, "encode_batch_fast"):
        return lambda text: backend.encode(text, add_special_tokens=False).ids
    if hasattr(tokenizer, "encode_batch_fast"):
        return lambda text: tokenizer.encode(text, add_special_tokens=False).ids
    if "add_special_tokens" in known:
        return lambda text: encode(text, add_special_tokens=False)
    if "disallowed_special" in known:
        return lambda text: encode(text, disallowed_special=())
    return encode


def reduced(base: NDArray[Any], new: NDArray[Any], seed: int, draws: int = 1000) -> tuple[float, tuple[float, float]]:
    """(base - new) / base over documents, with a 95 % bootstrap interval over them."""
    rng = np.random.default_rng(seed)
    times = rng.multinomial(len(base), np.full(len(base), 1 / len(base)), size=draws)  # (draws, documents)
    totals = times @ base
    shares = 1 - (times @ new) / np.maximum(totals, 1)
    low, high = np.quantile(shares[totals > 0], (0.025, 0.975)) if (totals > 0).any() else (0.0, 0.0)
    return 1 - int(new.sum()) / max(int(base.sum()), 1), (float(low), float(high))


def token_lengths(tokenizer: Any, longest: int = 10) -> dict[int, float]:
    """Share of the vocabulary by characters, 1 to `longest`; tokens that are no UTF-8 count their bytes."""
    try:
        tokens = [token for token in TokenBytes.of(tokenizer).tokens if token]
    except (TokenmillError, TypeError, AttributeError):
        return {}
    sizes = np.array([_characters(token) for token in tokens])
    return {n: float((sizes == n).mean()) for n in range(1, longest + 1)}


def _characters(token: bytes) -> int:
    try:
        return len(token.decode())
    except UnicodeDecodeError:
        return len(token)


def _table(head: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
