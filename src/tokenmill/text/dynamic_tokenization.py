"""Dynamic tokenization: fewer positions for a trained model, by merging the frequent pairs of each batch.

Feher, Vulić and Minixhofer, "Retrofitting (Large) Language Models with Dynamic Tokenization" (arXiv 2411.18553). The
model and its tokenizer stay as they are. In every batch the most frequent pair of neighbours becomes one token, again
and again, and the embedding of a merged token is predicted from the embeddings of its pieces.

Use it for encoders, and for the prompts of decoders, on text that the vocabulary cuts into many pieces: other
languages, technical words. Do not use it for short English texts, where little can be saved, or where results may not
depend on the other texts of a batch (``per_example=True`` takes that dependence away).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Literal

import numpy as np

from tokenmill.catalog import Card, Paper, Reported
from tokenmill.errors import LimitError, UnsupportedError, unknown_name
from tokenmill.text._batch_merging import Merging, Ties, Token
from tokenmill.text._char_lengths import check_text
from tokenmill.text._dynamic_inputs import DynamicInputs
from tokenmill.text._hypernetwork import HyperNetwork
from tokenmill.text._large_vocabulary import LargeVocabHead, LargeVocabulary
from tokenmill.text._token_bytes import TokenBytes
from tokenmill.text._token_embedders import CachedEmbedder, MeanEmbedder, vocabulary_fingerprint

__all__ = [
    "CARD",
    "CachedEmbedder",
    "DynamicBPE",
    "DynamicBatch",
    "DynamicInputs",
    "HyperNetwork",
    "LargeVocabHead",
    "LargeVocabulary",
    "MeanEmbedder",
]

CARD = Card(
    name="Dynamic tokenization",
    kind="model",
    paper=Paper(
        title="Retrofitting (Large) Language Models with Dynamic Tokenization",
        date="2024-11-27",
        arxiv="2411.18553",
        code="https://github.com/DariusFeher/dynamic-tokenization",
    ),
    summary=(
        "Merges the frequent pairs of tokens of each batch and predicts an embedding for every merged token. "
        "The model sees fewer positions; its weights and its tokenizer stay."
    ),
    claim=(
        "Sequences of an encoder become more than a fifth shorter over 14 languages at less than 2 % loss; decoders "
        "read merged prompts, and write with a vocabulary of a million tokens behind a nearest-neighbour index."
    ),
    api=(
        "DynamicBPE",
        "DynamicBatch",
        "DynamicInputs",
        "MeanEmbedder",
        "HyperNetwork",
        "CachedEmbedder",
        "LargeVocabulary",
        "LargeVocabHead",
    ),
    exact=False,
    trains=True,
    task="shorten",
    differs=(
        "a merge may not cross a pre-token of the text; the paper asks the pre-tokenizer about the joined string alone",
        "a token is the tuple of its pieces, so that two that spell the same string by other pieces stay apart",
        "equally frequent pairs are taken in the order of their bytes, so that the order of a batch does not matter",
        "tokens of one piece keep their own rows; the paper predicts these as well",
        "the index finds the largest inner products, where the paper's finds the largest cosines",
    ),
    reported=Reported(
        table="repository's curves",
        setting="XNLI, English, XLM-R with adapter, 99 merges a batch of 32",
        metric="accuracy",
        value=0.826,
    ),
)

Boundary = Literal["pretoken", "word", "word_hyphen", "sentence"]
Spans = Callable[[str], Iterable[tuple[int, int]]]
_WHERE = "DynamicBPE"
_BOUNDARIES = ("pretoken", "word", "word_hyphen", "sentence")
_CUTS = {
    "word": re.compile(r"\s*\S+|\s+"),
    "word_hyphen": re.compile(r"\s*(?:[\w-]+|[^\w\s]+)|\s+"),
    "sentence": re.compile(r"(?s).+"),
}


@dataclass(frozen=True, slots=True)
class DynamicBatch:
    """Texts as sequences of dynamic tokens.

    Attributes:
        pieces: for each text its tokens, each the tuple of its base tokens' ids; special tokens are tuples of one.
        tokens: the same as bytes; a special token as its content.
        word_ids: for each token the number of its unit (pre-token, word, ...) in the text, None for special tokens.
        base_ids: for each text the ids of the ordinary tokenizer, special tokens included.
        merges: the joined pairs as bytes, in order; with `per_example` those of one text behind the other's.
        limit: tokens of the batch when every unit is one token.
    """

    pieces: list[list[Token]]
    tokens: list[list[bytes]]
    word_ids: list[list[int | None]]
    base_ids: list[list[int]]
    merges: list[tuple[bytes, bytes]]
    limit: int

    @property
    def length(self) -> int:
        """Tokens of the batch."""
        return sum(map(len, self.pieces))

    @property
    def base_length(self) -> int:
        """Tokens of the batch under the ordinary tokenizer."""
        return sum(map(len, self.base_ids))

    @property
    def cut(self) -> float:
        """Share of the ordinary tokens that was saved; special tokens count."""
        return 1 - self.length / self.base_length if self.base_length else 0.0

    @property
    def reduction(self) -> float:
        """Share of what could be saved (each unit one token) that was saved: the paper's measure."""
        most = self.base_length - self.limit
        return (self.base_length - self.length) / most if most else 0.0

    def labels(self, labels: Sequence[Sequence[int]], ignore: int = -100) -> list[list[int]]:
        """Labels of units as labels of tokens: the first token of a unit has its label, the others `ignore`.

        Raises:
            LimitError: fewer labels than units.
        """
        found = []
        for row, (units, own) in enumerate(zip(self.word_ids, labels, strict=True)):
            most = max((u for u in units if u is not None), default=-1)
            if most >= len(own):
                raise LimitError("DynamicBatch.labels", f"labels of text {row}", len(own), f"at least {most + 1}")
            first = [u is not None and (i == 0 or units[i - 1] != u) for i, u in enumerate(units)]
            found.append([own[u] if new and u is not None else ignore for u, new in zip(units, first, strict=True)])
        return found


@dataclass(frozen=True, slots=True)
class DynamicBPE:
    """Byte-pair merging of each batch (paper, section 3).

    Args:
        tokenizer: a fast transformers tokenizer.
        boundary: what a merge may not cross: the tokenizer's own pre-tokens (for a tokenizer that does not cut a text
            into words, such as Gemma's, words at blanks stand in); words at blanks, the blank before them included;
            runs of letters, digits and hyphens, or of other signs; nothing but special tokens; or a function from a
            text to the (start, end) of its units.
        max_merges: merges of a batch at most; None for no such limit.
        target_reduction: stop when this share of what can be saved is saved; 1 merges all that may be merged. None is
            0.5, or with `max_merges` no such limit.
        ties: among equally frequent pairs take the first by bytes, or the one that a reader meets first (the paper).
        per_example: merge each text by itself, so that it does not depend on the batch.

    Raises:
        LimitError: a value outside its limit.
        UnsupportedError: a tokenizer without a fast backend, which knows no offsets.
    """

    tokenizer: Any
    _: KW_ONLY
    boundary: Boundary | Spans = "pretoken"
    max_merges: int | None = None
    target_reduction: float | None = None
    ties: Ties = "bytes"
    per_example: bool = False
    _view: TokenBytes = field(init=False, repr=False, compare=False)
    _cuts_words: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.boundary, str) and self.boundary not in _BOUNDARIES:
            raise unknown_name(_WHERE, "boundary", self.boundary, _BOUNDARIES)
        if self.max_merges is not None and self.max_merges < 0:
            raise LimitError(_WHERE, "max_merges", self.max_merges, "at least 0, or None")
        if self.target_reduction is not None and not 0 <= self.target_reduction <= 1:
            raise LimitError(_WHERE, "target_reduction", self.target_reduction, "in [0, 1]")
        if self.ties not in ("bytes", "first"):
            raise unknown_name(_WHERE, "ties", str(self.ties), ("bytes", "first"))
        if not getattr(self.tokenizer, "is_fast", False):
            what = f"{type(self.tokenizer).__name__} gives no offsets of its tokens"
            raise UnsupportedError(_WHERE, what, "Use a fast transformers tokenizer.")
        object.__setattr__(self, "_view", TokenBytes.of(self.tokenizer))
        before = self.tokenizer.backend_tokenizer.pre_tokenizer
        object.__setattr__(self, "_cuts_words", before is not None and len(before.pre_tokenize_str("a b")) > 1)

    @property
    def fingerprint(self) -> str:
        """Of the vocabulary: what a `HyperNetwork` is tied to."""
        return vocabulary_fingerprint(self._view)

    def merge(
        self, texts: Sequence[str], *, add_special_tokens: bool = True, max_length: int | None = None,
        protect_tail: int = 0,
    ) -> DynamicBatch:  # fmt: skip
        """Tokenise a batch and merge.

        Args:
            texts: the batch.
            add_special_tokens: as the tokenizer would.
            max_length: base tokens of a text at most, special tokens included.
            protect_tail: so many last tokens of each text stay as they are; 1 for prompts that a decoder continues.

        Raises:
            LimitError: no list of texts, half of a surrogate pair in one of them, a negative number.
        """
        for name, value, least in (("max_length", max_length, 1), ("protect_tail", protect_tail, 0)):
            if value is not None and value < least:
                raise LimitError(f"{_WHERE}.merge", name, value, f"at least {least}")
        encoded = self._encode(texts, add_special_tokens, max_length)
        rows = [self._units(text, one, protect_tail) for text, one in zip(texts, encoded, strict=True)]
        groups = [[row] for row in rows] if self.per_example else [rows]
        pieces: list[list[Token]] = []
        numbers: list[list[int | None]] = []
        merges: list[tuple[bytes, bytes]] = []
        for group in groups:
            found, done = self._merged(group)
            merges += [(self._bytes(a), self._bytes(b)) for a, b in done]
            for units in found:
                pieces.append([token for _, tokens in units for token in tokens])
                numbers.append([number for number, tokens in units for _ in tokens])
        limit = sum(map(len, rows))
        return DynamicBatch(
            pieces, [[self._bytes(token) for token in row] for row in pieces], numbers,
            [list(one.ids) for one in encoded], merges, limit,
        )  # fmt: skip

    def units(self, texts: Iterable[str]) -> Iterable[list[Token]]:
        """The units of each text as base tokens, without special tokens: what a merge may not cross."""
        for text in texts:
            (one,) = self._encode([text], False, None)
            yield [ids for _, ids, _ in self._units(text, one, 0)]

    def _encode(self, texts: Sequence[str], specials: bool, max_length: int | None) -> list[Any]:
        if isinstance(texts, str | bytes):
            raise LimitError(f"{_WHERE}.merge", "texts", type(texts).__name__, "a list of texts")
        for text in texts:
            check_text(f"{_WHERE}.merge", text)
        if not texts:
            return []
        made = self.tokenizer(
            list(texts), add_special_tokens=specials, padding=False, truncation=max_length is not None,
            max_length=max_length,
        )  # fmt: skip
        return list(made.encodings)

    def _units(self, text: str, one: Any, protect: int) -> list[tuple[int | None, tuple[int, ...], bool]]:
        """(number, ids, may be merged) of each unit of a text; special tokens have no number."""
        ids, special = one.ids, one.special_tokens_mask
        numbers = one.word_ids if self.boundary == "pretoken" and self._cuts_words else self._by_spans(text, one)
        last = len(ids) - protect
        units: list[tuple[int | None, tuple[int, ...], bool]] = []
        previous: tuple[int | None, bool] = (None, False)
        for at, (token, number) in enumerate(zip(ids, numbers, strict=True)):
            number = None if special[at] else number
            here = (number, number is not None and at < last)
            if units and here == previous and here[1]:
                units[-1] = (number, (*units[-1][1], token), True)
            else:
                units.append((number, (token,), here[1]))
            previous = here
        return units

    def _by_spans(self, text: str, one: Any) -> list[int | None]:
        """The number of each token's unit by its place in the text; a token across a border is a unit of its own."""
        if callable(self.boundary):
            spans = list(self.boundary(text))
        else:
            cut = _CUTS["word" if self.boundary == "pretoken" else self.boundary]
            spans = [found.span() for found in cut.finditer(text)]
        starts = np.array([start for start, _ in spans], dtype=np.int64)
        offsets = np.array(one.offsets, dtype=np.int64).reshape(-1, 2)  # (n, 2) characters
        unit = np.searchsorted(starts, offsets[:, 0], side="right") - 1
        ends = np.array([end for _, end in spans], dtype=np.int64)
        numbers: list[int | None] = []
        shift, previous = 0, -1
        for number, (_, end) in zip(unit.tolist(), offsets.tolist(), strict=True):
            across = number < 0 or end > ends[number]
            # Numbers stay in order: what crosses a border gets one between its neighbours'.
            shift += across and previous >= 0
            numbers.append(number + shift)
            shift += across
            previous = number
        return numbers

    def _merged(self, rows: list[Any]) -> tuple[list[list[tuple[int | None, list[Token]]]], list[Any]]:
        known: dict[tuple[int, ...], int] = {}
        units: list[list[Token]] = []
        counts: list[int] = []
        most = 0
        for row in rows:
            for _, ids, able in row:
                if able:
                    at = known.setdefault(ids, len(units))
                    if at == len(units):
                        units.append([(i,) for i in ids])
                        counts.append(0)
                    counts[at] += 1
                    most += len(ids) - 1
        merging = Merging(units, counts, self.ties, self._bytes)
        share = self.target_reduction
        if share is None:
            share = 0.5 if self.max_merges is None else 1.0
        target = None if share == 1 else math.ceil(share * most - 1e-9)
        merging.run(self.max_merges, target)
        found = [
            [(number, list(merging.units[known[ids]]) if able else [(i,) for i in ids]) for number, ids, able in row]
            for row in rows
        ]
        return found, merging.merges

    def _bytes(self, token: Token) -> bytes:
        table = self._view.tokens
        parts = []
        for i in token:
            data = table[i] if i < len(table) else None
            parts.append(data if data is not None else self.tokenizer.convert_ids_to_tokens(i).encode())
        return b"".join(parts)


def small() -> DynamicBPE:
    """Merging over a toy vocabulary of bytes, used by the laws."""
    from tokenmill.text.kl3m_tokenizers import small as toy

    return DynamicBPE(toy())
