"""StochasTok: training texts in which random tokens are written as two smaller ones, so that a model learns spelling.

Sims et al., "StochasTok: Improving Fine-Grained Subword Understanding in LLMs" (arXiv 2506.01687). An attempt draws a
place of the sequence; a token there that can be written as two tokens of the vocabulary is replaced by one such pair.
There are floor(p n) attempts, and pieces may be split again. The text, the vocabulary and the model stay as they are;
at inference the ordinary tokenizer is used.

Use it on the training data of pretraining, continued pretraining or fine-tuning, when a model is to know what its
tokens are made of: spelling, counting letters, substrings, digits. Not for prompts at inference, and not for data on
which perplexity is measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tokenmill.catalog import Card, Paper, Reported
from tokenmill.errors import LimitError, unknown_name
from tokenmill.text._bpe_dropout import bpe_dropout
from tokenmill.text._expanding_collator import Anneal, StochasTokCollator
from tokenmill.text._expansion_rows import Expanded, Rows, as_given, expanded_columns, read_row, read_rows
from tokenmill.text._expansion_table import CLASSES, ExpansionTable
from tokenmill.text._splitting import Ints, Leaves, Words, example_keys, finest, mixed, split

__all__ = ["CARD", "Anneal", "Expanded", "ExpansionTable", "StochasTok", "StochasTokCollator", "bpe_dropout"]

CARD = Card(
    name="StochasTok",
    kind="pipeline",
    paper=Paper(
        title="StochasTok: Improving Fine-Grained Subword Understanding in LLMs",
        date="2025-06-02",
        arxiv="2506.01687",
        code="https://github.com/anyasims/stochastok",
    ),
    summary=(
        "Random tokens of the training text are written as two smaller tokens with the same bytes. "
        "The model learns what its tokens are made of, with the same vocabulary and the same inference."
    ),
    claim=(
        "A language model trained so answers questions about letters and substrings far better, "
        "and models the text about as well."
    ),
    api=("StochasTok", "ExpansionTable", "StochasTokCollator", "Expanded", "Anneal", "bpe_dropout"),
    exact=False,
    trains=False,
    task="lm",
    needs=frozenset({"tokenizer"}),
    differs=(
        "all attempts are made at once, with the law of the paper's loop",
        "draws belong to the seed, the epoch and the example, not to the order in which examples come",
        "where a byte token and a piece have the same bytes, the piece is used",
        "a schedule of p, p by class of token, the limit of single bytes and BPE-dropout are ours",
    ),
    reported=Reported(
        table="figure",
        setting="50M parameters, 3,000 steps of fine-tuning on LangGame, p = 0.1",
        metric="normalised accuracy, read off the plot",
        value=0.99,
    ),
)
_WHERE = "StochasTok"
_MOST_P = 10.0


@dataclass(frozen=True, slots=True)
class StochasTok:
    """Writes random tokens as pairs of tokens.

    The same seed, epoch and example number give the same output, whatever else is in the batch.

    Attributes:
        table: the pairs of every token.
        p: attempts for each token of the text, floor(p n) in all.
        seed: of all draws.
        max_num_to_expand: successful splits of a sequence at most.
        p_per_class: ours: p for tokens of a class ("digits", "letters", "other"); each class has attempts of its own,
            and a class that is not named has `p`.

    Raises:
        LimitError: p outside [0, 10], a seed or a number below 0, an unknown class.
    """

    table: ExpansionTable
    _: KW_ONLY
    p: float = 0.1
    seed: int = 0
    max_num_to_expand: int | None = None
    p_per_class: Mapping[str, float] | None = field(default=None)

    def __post_init__(self) -> None:
        _check_p("p", self.p)
        for name in self.p_per_class or {}:
            if name not in CLASSES:
                raise unknown_name(_WHERE, "p_per_class", name, CLASSES)
            _check_p(f"p_per_class[{name!r}]", (self.p_per_class or {})[name])
        for name in ("seed", "max_num_to_expand"):
            value = getattr(self, name)
            if value is None and name == "max_num_to_expand":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
                raise LimitError(_WHERE, name, value, "a whole number of at least 0")

    def expand(self, ids: Any, *, epoch: int = 0, index: int = 0, labels: Any = None, alignment: bool = False) -> Any:
        """One sequence.

        Args:
            ids: (n,) a list, an array or a tensor of token ids.
            epoch: another epoch, another segmentation.
            index: the example's number in its data set.
            labels: (n,) of the same kind; tokens with label -100 are not split.
            alignment: also return which token of `ids` each token of the output is a piece of.

        Returns:
            (n',) of the kind of `ids`, n <= n' <= n + floor(p n); with `alignment` a pair of these.

        Raises:
            LimitError: an id that the table does not have, or more than one dimension.
        """
        row = read_row(_WHERE, ids)
        mask = None if labels is None else [read_row(_WHERE, labels, name="labels")]
        rows = read_rows(_WHERE, [row], None, mask)
        leaves = self._leaves(rows, np.array([index]), epoch)
        out = as_given(ids, leaves.ids)
        return (out, as_given(ids, leaves.sources)) if alignment else out

    def expand_batch(
        self,
        rows: Sequence[Any] | Tensor | NDArray[Any],
        *,
        indices: Sequence[int] | None = None,
        epoch: int = 0,
        attention_mask: Any = None,
        labels: Any = None,
    ) -> Expanded:
        """Many sequences at once, which is what is fast.

        Args:
            rows: sequences of any lengths, or a padded (B, n) tensor or array with its `attention_mask`.
            indices: (B,) the examples' numbers in their data set; 0, 1, 2 and so on by default.
            epoch: another epoch, another segmentation.
            attention_mask: like `rows`; what is 0 is left out of the output.
            labels: like `rows`; tokens with label -100 are not split. They count in n, as special tokens do.

        Returns:
            the sequences without padding, and for each token its place in the row that was given.

        Raises:
            LimitError: a padded batch without a mask, ids that the table does not have, columns that do not match.
        """
        read = read_rows(_WHERE, rows, attention_mask, labels)
        numbers = np.arange(len(read.lengths)) if indices is None else np.asarray(indices, dtype=np.int64)
        if numbers.shape != read.lengths.shape:
            raise LimitError(_WHERE, "indices", len(numbers), f"{len(read.lengths)} numbers, one a row")
        leaves = self._leaves(read, numbers, epoch)
        return Expanded.of(leaves, read)

    def columns(
        self,
        batch: Mapping[str, Sequence[Any]],
        indices: Sequence[int] | None = None,
        *,
        epoch: int = 0,
        carried: Sequence[str] = ("labels", "word_ids", "token_type_ids", "special_tokens_mask", "offset_mapping"),
        max_length: int | None = None,
    ) -> dict[str, Any]:
        """A batch of columns with its `input_ids` expanded, for ``dataset.map(..., batched=True, with_indices=True)``.

        Args:
            batch: columns; "input_ids" is expanded, what "attention_mask" hides is left out.
            indices: the examples' numbers.
            epoch: another epoch, another segmentation.
            carried: columns with one value a token. A value follows its token to all of its pieces; labels that are the
                token's own id become the pieces' ids, and tokens with label -100 are not split.
            max_length: the context window: all columns of a row end there.

        Returns:
            the columns; "attention_mask" is all ones and "position_ids", where there were some, count from 0.

        Raises:
            LimitError: as `expand_batch`.
        """
        return expanded_columns(self.expand_batch, batch, indices, epoch=epoch, carried=carried, max_length=max_length)

    def to_bytes(self, ids: Any, *, alignment: bool = False) -> Any:
        """Ours: the limit of many attempts, one token a byte where the vocabulary has all bytes.

        A token that cannot be taken apart into other tokens stays whole.

        Args:
            ids: (n,) a list, an array or a tensor of token ids.
            alignment: also return which token of `ids` each token of the output is a piece of.
        """
        rows = read_rows(_WHERE, [read_row(_WHERE, ids)], None, None)
        self._check_ids(rows)
        leaves = finest(self.table, Leaves(rows.ids, np.arange(len(rows.ids)), rows.lengths))
        out = as_given(ids, leaves.ids)
        return (out, as_given(ids, leaves.sources)) if alignment else out

    def scaled(self, factor: float) -> StochasTok:
        """The same with every p times this."""
        per_class = None if self.p_per_class is None else {k: p * factor for k, p in self.p_per_class.items()}
        return replace(self, p=self.p * factor, p_per_class=per_class)

    def collator(self, base_collator: Any, **settings: Any) -> StochasTokCollator:
        """A `StochasTokCollator` of this."""
        return StochasTokCollator(self, base_collator, **settings)

    def _leaves(self, rows: Rows, indices: Ints, epoch: int) -> Leaves:
        self._check_ids(rows)
        if isinstance(epoch, bool) or not 0 <= epoch < 2**63:
            raise LimitError(_WHERE, "epoch", epoch, "a whole number of at least 0")
        keys = example_keys(self.seed, epoch, indices)
        allowed = None
        if self.max_num_to_expand is not None:
            allowed = np.full(len(rows.lengths), self.max_num_to_expand)
        if self.p_per_class is None:
            attempts = np.floor(self.p * rows.lengths).astype(np.int64)
            return split(self.table, rows.ids, rows.lengths, attempts, keys, protected=rows.protected, most=allowed)
        return self._by_class(rows, keys, allowed)

    def _by_class(self, rows: Rows, keys: Words, allowed: Ints | None) -> Leaves:
        """Each class of tokens as a sequence of its own, put together again."""
        row = np.repeat(np.arange(len(rows.lengths)), rows.lengths)
        found: list[Leaves] = []
        total = np.zeros_like(rows.lengths)
        for number, name in enumerate(CLASSES):
            at = np.flatnonzero(self.table.classes[rows.ids] == number)
            lengths = np.bincount(row[at], minlength=len(rows.lengths))
            p = (self.p_per_class or {}).get(name, self.p)
            attempts = np.floor(p * lengths).astype(np.int64)
            cover = None if rows.protected is None else rows.protected[at]
            own = mixed(keys ^ np.uint64(number + 1))
            leaves = split(self.table, rows.ids[at], lengths, attempts, own, protected=cover, most=allowed)
            if allowed is not None:
                allowed = allowed - (leaves.lengths - lengths)
            found.append(Leaves(leaves.ids, at[leaves.sources], leaves.lengths))
            total = total + leaves.lengths
        ids, sources = (np.concatenate([getattr(f, name) for f in found]) for name in ("ids", "sources"))
        order = np.argsort(sources, kind="stable")
        return Leaves(ids[order], sources[order], total)

    def _check_ids(self, rows: Rows) -> None:
        size = len(self.table)
        bad = np.flatnonzero((rows.ids < 0) | (rows.ids >= size))
        if len(bad):
            value = int(rows.ids[bad[0]])
            mend = f"token id {value} not in table of size {size}: is it the table of another tokenizer?"
            raise LimitError(_WHERE, "ids", value, f"in [0, {size})", mend)


def _check_p(name: str, p: float) -> None:
    number = isinstance(p, int | float) and not isinstance(p, bool)
    if not number or math.isnan(p) or not 0 <= p <= _MOST_P:
        raise LimitError(_WHERE, name, p, f"in [0, {_MOST_P:g}]", "The paper has 0.1.")


def recipe(tokenizer: Any, **settings: Any) -> Any:
    """What the bench's task `lm` trains on: a function from documents (with `ids`) and a pass to rows of tokens."""
    how = StochasTok(ExpansionTable.from_tokenizer(tokenizer), **settings)
    return lambda documents, epoch: how.expand_batch([d.ids for d in documents], epoch=epoch).input_ids


def small() -> StochasTok:
    """An instance for a toy vocabulary, used by the laws."""
    letters = [b"a", b"b", b"c", b"ab", b"bc", b"abc", b"aab"]
    tokens: list[bytes | None] = [*letters, *[None] * (64 - len(letters))]
    return StochasTok(ExpansionTable.from_list(tokens), p=0.5)
