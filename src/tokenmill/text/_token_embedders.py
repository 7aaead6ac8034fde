"""Embeddings of tokens that no vocabulary has, from the rows of the base tokens that they are made of.

Rows are those of the weight matrices, before a model scales them (Gemma's do so inside the embedding call).
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from tokenmill.errors import LimitError, UnsupportedError
from tokenmill.text._batch_merging import Token
from tokenmill.text._token_bytes import TokenBytes


class Rows(NamedTuple):
    """Input rows (U, D), and output rows (U, D) of an untied model, else None."""

    input: Tensor
    output: Tensor | None


class TokenEmbedder(Protocol):
    """What makes rows: `embed(pieces)` of U tokens gives `Rows`."""

    def embed(self, pieces: Sequence[Token], /) -> Rows:
        """Rows of these tokens; a token is the tuple of its base tokens' ids."""
        ...


class Tables(NamedTuple):
    """A model's weight matrices of tokens: input (V, D), output (V, D) or None, and the factor of the input rows."""

    input: Tensor
    output: Tensor | None
    scale: float


def tables(model: Any) -> Tables:
    """The matrices of a model, and by what it multiplies an input row.

    Raises:
        UnsupportedError: its embedding call does more than look up and scale.
    """
    module = model.get_input_embeddings()
    weight = module.weight
    some = torch.arange(min(8, weight.shape[0]), device=weight.device)
    with torch.no_grad():
        made, plain = module(some).double(), weight[some].double()
        scale = float((made * plain).sum() / (plain * plain).sum().clamp(min=1e-30))
        # In half precision the product is rounded once more.
        if not torch.allclose(made, plain * scale, rtol=1e-2, atol=1e-6):
            what = f"the embedding of {type(model).__name__} does more than look up and scale rows"
            raise UnsupportedError("DynamicInputs", what)
    made_by = model.get_output_embeddings()
    out = None if made_by is None else made_by.weight
    tied = out is None or out.data_ptr() == weight.data_ptr()
    return Tables(weight, None if tied else out, 1.0 if abs(scale - 1) < 1e-6 else scale)


def padded(pieces: Sequence[Token], longest: int | None = None) -> tuple[Tensor, Tensor]:
    """(U, L) int64 ids, with 0 behind the end, and (U, L) bool of what is a piece; longer tokens are cut."""
    lengths = torch.tensor([len(p) if longest is None else min(len(p), longest) for p in pieces])
    width = int(lengths.max()) if len(pieces) else 0
    mask = torch.arange(width)[None] < lengths[:, None]
    ids = torch.zeros(len(pieces), width, dtype=torch.int64)
    ids[mask] = torch.tensor([i for p in pieces for i in p[:longest]], dtype=torch.int64)
    return ids, mask


class MeanEmbedder:
    """The mean of the pieces' rows (fast vocabulary transfer; the paper's baseline), in float32.

    Args:
        model: whose rows are used; nothing in it is changed.
    """

    def __init__(self, model: Any) -> None:
        self.tables = tables(model)

    @torch.no_grad()
    def embed(self, pieces: Sequence[Token], /) -> Rows:
        """Rows of U tokens; that of a token of one piece is its own."""
        ids, mask = (t.to(self.tables.input.device) for t in padded(pieces))
        weights = mask / mask.sum(1, keepdim=True).clamp(min=1)  # (U, L)

        def mean(table: Tensor) -> Tensor:
            return torch.einsum("ul,uld->ud", weights, table[ids].float())

        return Rows(mean(self.tables.input), None if self.tables.output is None else mean(self.tables.output))


class CachedEmbedder:
    """Keeps the rows of the tokens that were used last (paper: 5,000).

    Args:
        embedder: what makes the rows that are missing.
        capacity: rows that are kept.

    Attributes:
        hits, misses: tokens that were found, and that were made.
    """

    def __init__(self, embedder: TokenEmbedder, capacity: int = 5000) -> None:
        if capacity < 1:
            raise LimitError("CachedEmbedder", "capacity", capacity, "at least 1")
        self.embedder, self.capacity = embedder, capacity
        self.hits = self.misses = 0
        self._place: OrderedDict[Token, int] = OrderedDict()
        self._rows: Rows | None = None

    def __len__(self) -> int:
        return len(self._place)

    @torch.no_grad()
    def embed(self, pieces: Sequence[Token], /) -> Rows:
        """Rows of U different tokens, or of fewer with repeats.

        Raises:
            LimitError: more different tokens than rows are kept.
        """
        needed = dict.fromkeys(pieces)
        if len(needed) > self.capacity:
            mend = f"needs {len(needed)} rows, capacity {self.capacity}"
            raise LimitError("CachedEmbedder", "capacity", self.capacity, f"at least {len(needed)}", mend)
        missing = [token for token in needed if token not in self._place]
        self.hits, self.misses = self.hits + len(needed) - len(missing), self.misses + len(missing)
        for token in needed:
            if token in self._place:
                self._place.move_to_end(token)
        if missing:
            self._keep(missing)
        if self._rows is None:
            return self.embedder.embed([])
        at = torch.tensor([self._place[token] for token in pieces], device=self._rows.input.device)
        output = self._rows.output
        return Rows(self._rows.input[at], None if output is None else output[at])

    def _keep(self, missing: list[Token]) -> None:
        made = self.embedder.embed(missing)
        if self._rows is None:
            empty = [None if t is None else t.new_empty(self.capacity, t.shape[1]) for t in made]
            self._rows = Rows(*empty)  # type: ignore[arg-type]
        free = list(range(len(self._place), min(len(self._place) + len(missing), self.capacity)))
        # What this batch needs was moved to the end, so the oldest rows are never among them.
        while len(free) < len(missing):
            free.append(self._place.popitem(last=False)[1])
        for token, at in zip(missing, free, strict=True):
            self._place[token] = at
        places = torch.tensor(free, device=self._rows.input.device)
        self._rows.input[places] = made.input
        if made.output is not None and self._rows.output is not None:
            self._rows.output[places] = made.output


def vocabulary_fingerprint(view: TokenBytes) -> str:
    """A short checksum of a vocabulary's tokens in order."""
    digest = hashlib.sha256()
    for data in view.tokens:
        part = b"\xff" if data is None else data
        digest.update(len(part).to_bytes(4, "little") + part)
    return digest.hexdigest()[:16]
