"""A text encoder on ordinary, merged or truncated tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenmill.bench.task import Item, Outcome
from tokenmill.text._embedders import mean_state
from tokenmill.text._token_embedders import Rows


@dataclass(slots=True)
class Encoding:
    """An encoder on batches of texts."""

    model: Any
    tokenizer: Any
    max_length: int
    bpe: Any = None
    inputs: Any = None
    cache: Any = None
    truncates: bool = False

    @torch.inference_mode()
    def run(self, item: Item, /) -> Outcome:
        """Embeddings of one batch, (B, D) float32, each of length 1."""
        before = (self.cache.hits, self.cache.misses) if self.cache is not None else (0, 0)
        given = self._given(item.content)
        mask = given["attention_mask"]
        made = F.normalize(mean_state(self.model(**given).last_hidden_state, mask), dim=-1)
        counts = {"tokens": float(mask.sum()), "positions": float(mask.numel()), "model_calls": 1.0}
        if self.cache is not None:
            counts |= {"hits": self.cache.hits - before[0], "misses": float(self.cache.misses - before[1])}
        return Outcome(made.numpy(), counts)

    def _given(self, texts: Sequence[str]) -> Mapping[str, Tensor]:
        cut: dict[str, Any] = {"truncation": True, "max_length": self.max_length}
        if self.bpe is None:
            return self.tokenizer(list(texts), padding=True, return_tensors="pt", **cut)
        batch = self.bpe.merge(texts, max_length=self.max_length)
        if not self.truncates:
            return self.inputs(batch)
        # The special token at the end stays.
        short = [[*ids[: len(row) - 1], ids[-1]] for ids, row in zip(batch.base_ids, batch.pieces, strict=True)]
        return self.tokenizer.pad({"input_ids": short}, return_tensors="pt")


class LastPiece:
    """The row of a token's last piece."""

    def __init__(self, model: Any) -> None:
        self.weight = model.get_input_embeddings().weight

    def embed(self, pieces: Sequence[tuple[int, ...]], /) -> Rows:
        """Rows of these tokens."""
        return Rows(self.weight[torch.tensor([token[-1] for token in pieces])], None)
