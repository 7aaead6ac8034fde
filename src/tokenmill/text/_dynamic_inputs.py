"""Dynamic tokens as inputs of a transformers model: embeddings, a mask, and positions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from tokenmill.errors import LimitError, NonFiniteError
from tokenmill.text._batch_merging import Token
from tokenmill.text._token_embedders import TokenEmbedder, tables

if TYPE_CHECKING:
    from tokenmill.text.dynamic_tokenization import DynamicBatch


class DynamicInputs:
    """Makes what a model takes in the place of ``input_ids``; nothing in the model is changed.

    Args:
        model: a transformers model. A decoder (one that generates) gets its padding on the left and positions besides.
        embedder: makes the rows of merged tokens.
        keep_known: tokens of one piece keep their own rows (the paper predicts all but special tokens).
        positions: compact counts the dynamic tokens, as the paper does; keep gives a token the place that its first
            piece has under the ordinary tokenizer, which suits models with learned positions. None leaves them to the
            model where the padding is on the right.
        padding: the side; None for what the model needs.

    Raises:
        LimitError: a setting outside its limit.
        UnsupportedError: a model whose embedding call does more than look up and scale.
    """

    def __init__(
        self, model: Any, embedder: TokenEmbedder, *, keep_known: bool = True, positions: str | None = None,
        padding: str | None = None,
    ) -> None:  # fmt: skip
        if padding not in (None, "left", "right"):
            raise LimitError("DynamicInputs", "padding", padding, "left, right, or None")
        if positions not in (None, "compact", "keep"):
            raise LimitError("DynamicInputs", "positions", positions, "compact, keep, or None")
        self.model, self.embedder, self.keep_known = model, embedder, keep_known
        decodes = callable(getattr(model, "can_generate", None)) and model.can_generate()
        self.padding = padding or ("left" if decodes else "right")
        self.positions = positions or ("compact" if self.padding == "left" else None)
        self._tables = tables(model)

    @torch.no_grad()
    def __call__(self, batch: DynamicBatch) -> dict[str, torch.Tensor]:
        """``inputs_embeds`` (B, n, D), ``attention_mask`` (B, n), and ``position_ids`` (B, n) where they are set.

        Raises:
            LimitError: a text without tokens.
            NonFiniteError: the embedder gave NaN or infinity.
        """
        needed = self.needed(batch)
        rows = self.embedder.embed(needed).input if needed else self._tables.input.new_zeros(0, 1)
        if not torch.isfinite(rows).all():
            raise NonFiniteError("DynamicInputs: the embedder gave rows that are not finite")
        return self.assemble(batch, needed, rows)

    def needed(self, batch: DynamicBatch) -> list[Token]:
        """The different tokens of a batch whose rows are not the model's own."""
        return list(dict.fromkeys(token for token, made in self._flat(batch) if made))

    def assemble(self, batch: DynamicBatch, needed: list[Token], rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """As a call, from rows (U, D) of the tokens that `needed` gives; gradients flow into the rows."""
        lengths = [len(row) for row in batch.pieces]
        if not lengths or min(lengths) == 0:
            mend = "Leave empty texts out, or add special tokens."
            empty = lengths.index(0) if lengths else "of no texts"
            raise LimitError("DynamicInputs", f"tokens of text {empty}", 0, "at least one", mend)
        device = self._tables.input.device
        width = max(lengths)
        column = torch.arange(width, device=device)
        sizes = torch.tensor(lengths, device=device)[:, None]
        mask = column >= width - sizes if self.padding == "left" else column < sizes  # (B, n)
        flat = self._flat(batch)
        first = torch.tensor([token[0] for token, _ in flat], device=device)
        vectors = self.model.get_input_embeddings()(first)  # (N, D): the call that input_ids would make
        if needed:
            place = {token: i for i, token in enumerate(needed)}
            made = torch.tensor([i for i, (_, new) in enumerate(flat) if new], device=device)
            chosen = torch.tensor([place[token] for token, new in flat if new], device=device)
            own = (rows.to(device)[chosen] * self._tables.scale).to(vectors.dtype)
            vectors = vectors.index_copy(0, made, own)
        inputs = vectors.new_zeros(len(lengths), width, vectors.shape[-1]).masked_scatter(mask[..., None], vectors)
        found = {"inputs_embeds": inputs, "attention_mask": mask.long()}
        if self.positions == "compact":
            found["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        elif self.positions == "keep":
            sizes_ = [torch.tensor([len(token) for token in row]) for row in batch.pieces]
            starts = torch.cat([size.cumsum(0) - size for size in sizes_]).to(device)
            found["position_ids"] = torch.zeros_like(mask, dtype=torch.long).masked_scatter(mask, starts)
        return found

    def _flat(self, batch: DynamicBatch) -> list[tuple[Token, bool]]:
        """All tokens of the batch, each with whether its row is made."""
        return [
            (token, len(token) > 1 or not (self.keep_known or number is None))
            for row, numbers in zip(batch.pieces, batch.word_ids, strict=True)
            for token, number in zip(row, numbers, strict=True)
        ]
