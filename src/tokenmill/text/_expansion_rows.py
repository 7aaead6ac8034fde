"""Sequences in the kinds that callers have (lists, arrays, tensors, padded batches, columns), and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tokenmill.errors import LimitError
from tokenmill.text._splitting import Ints, Leaves

IGNORED = -100  # transformers' label of tokens without a loss


@dataclass(frozen=True, slots=True)
class Rows:
    """Sequences behind one another, without padding.

    Attributes:
        ids: (T,) int64.
        lengths: (B,) int64.
        places: (T,) int64, where each token stood in its row.
        protected: (T,) bool, or None when there were no labels.
    """

    ids: Ints
    lengths: Ints
    places: Ints
    protected: NDArray[np.bool_] | None


@dataclass(frozen=True, slots=True)
class Expanded:
    """Expanded sequences.

    Attributes:
        input_ids: for each row its tokens, (n',) int64.
        sources: for each row (n',) int64: the place in the given row of the token that this is a piece of.
    """

    input_ids: list[Ints]
    sources: list[Ints]

    @classmethod
    def of(cls, leaves: Leaves, rows: Rows) -> Expanded:
        cuts = np.cumsum(leaves.lengths)[:-1]
        ids, sources = np.split(leaves.ids, cuts), np.split(rows.places[leaves.sources], cuts)
        return cls(ids[: len(leaves.lengths)], sources[: len(leaves.lengths)])

    def __len__(self) -> int:
        return len(self.input_ids)

    def carry(self, column: Sequence[Any]) -> list[list[Any]]:
        """A column with one value a token of the given rows: each value for all pieces of its token."""
        lists = (c.tolist() if hasattr(c, "tolist") else c for c in column)
        return [[values[i] for i in at.tolist()] for values, at in zip(lists, self.sources, strict=True)]


def read_row(where: str, ids: Any, name: str = "ids") -> Ints:
    """One sequence as an array.

    Raises:
        LimitError: more than one dimension, or values that are not whole numbers.
    """
    found = ids.detach().cpu().numpy() if isinstance(ids, torch.Tensor) else np.asarray(ids)
    if found.ndim > 1:
        mend = "padded batch needs attention_mask so that padding is not split: use expand_batch."
        raise LimitError(where, f"{name}.shape", tuple(found.shape), "one sequence", mend)
    if found.size == 0:
        return np.zeros(0, dtype=np.int64)
    if found.ndim == 0 or found.dtype.kind not in "iu":
        raise LimitError(where, name, str(found.dtype), "a sequence of whole numbers")
    return found.astype(np.int64)


def read_rows(where: str, rows: Any, attention_mask: Any, labels: Any) -> Rows:
    """Many sequences, padding left out.

    Raises:
        LimitError: a padded batch without a mask, or columns of other lengths than the rows.
    """
    if isinstance(rows, torch.Tensor | np.ndarray) and attention_mask is None and rows.ndim > 1:
        mend = "padded batch needs attention_mask so that padding is not split."
        raise LimitError(where, "attention_mask", None, "given with a batch of one shape", mend)
    parts = [read_row(where, row) for row in rows]
    lengths = np.array([len(part) for part in parts], dtype=np.int64)
    ids = np.concatenate([np.zeros(0, dtype=np.int64), *parts])
    starts = np.cumsum(lengths) - lengths
    places = np.arange(len(ids)) - np.repeat(starts, lengths)
    marks = _column(where, "labels", labels, lengths)
    seen = _column(where, "attention_mask", attention_mask, lengths)
    if seen is not None:
        row = np.repeat(np.arange(len(lengths)), lengths)
        keep = seen != 0
        lengths = np.bincount(row[keep], minlength=len(lengths))
        ids, places = ids[keep], places[keep]
        marks = None if marks is None else marks[keep]
    return Rows(ids, lengths, places, None if marks is None else marks == IGNORED)


def _column(where: str, name: str, column: Any, lengths: Ints) -> Ints | None:
    if column is None:
        return None
    if len(column) != len(lengths):
        raise LimitError(where, name, len(column), f"{len(lengths)} rows, as many as there are sequences")
    parts = [read_row(where, values, name) for values in column]
    for number, (part, n) in enumerate(zip(parts, lengths.tolist(), strict=True)):
        if len(part) != n:
            raise LimitError(where, f"len({name}[{number}])", len(part), f"{n}, the tokens of that row")
    return np.concatenate([np.zeros(0, dtype=np.int64), *parts])


def as_given(like: Any, values: Ints) -> Any:
    """An array in the kind of `like`: list, array or tensor."""
    if isinstance(like, torch.Tensor):
        return torch.from_numpy(values).to(device=like.device)
    return values if isinstance(like, np.ndarray) else values.tolist()


def expanded_columns(
    expand: Callable[..., Expanded],
    batch: Mapping[str, Sequence[Any]],
    indices: Sequence[int] | None,
    *,
    epoch: int,
    carried: Sequence[str],
    max_length: int | None,
) -> dict[str, Any]:
    """See `StochasTok.columns`."""
    if max_length is not None and max_length < 1:
        raise LimitError("StochasTok.columns", "max_length", max_length, "at least 1")
    if "input_ids" not in batch:
        raise LimitError("StochasTok.columns", "columns", ", ".join(batch), "columns with input_ids")
    labels = batch["labels"] if "labels" in carried and "labels" in batch else None
    rows, mask = batch["input_ids"], batch.get("attention_mask")
    made = expand(rows, indices=indices, epoch=epoch, attention_mask=mask, labels=labels)
    out = {name: values for name, values in batch.items() if name not in carried}
    out["input_ids"] = [ids.tolist() for ids in made.input_ids]
    for name in carried:
        if name in batch:
            out[name] = made.carry(batch[name])
    if labels is not None:
        out["labels"] = [_labels(*row) for row in zip(rows, out["labels"], out["input_ids"], made.sources, strict=True)]
    out["attention_mask"] = [[1] * len(ids) for ids in made.input_ids]
    if "position_ids" in batch:
        out["position_ids"] = [list(range(len(ids))) for ids in made.input_ids]
    changed = {"input_ids", "attention_mask", "position_ids", *carried}
    return {k: [v[:max_length] for v in vs] if k in changed else vs for k, vs in out.items()}


def _labels(row: Any, labels: list[int], ids: list[int], sources: Ints) -> list[int]:
    """Labels that were the tokens themselves become the pieces; any others are carried as they are."""
    old = read_row("StochasTok.columns", row)[sources].tolist()
    if all(label in (IGNORED, token) for label, token in zip(labels, old, strict=True)):
        return [IGNORED if label == IGNORED else new for label, new in zip(labels, ids, strict=True)]
    return labels
