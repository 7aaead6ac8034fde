"""A small model that draws K independent continuations, one after another block."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import FloatTensor, LongTensor, Tensor
from transformers.cache_utils import DynamicCache

from tokenmill import hf
from tokenmill.decode._request import DecodeTrace, Request
from tokenmill.errors import NonFiniteError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Drafter:
    """Draws drafts behind a growing text and keeps its cache in step with it.

    Args:
        where: the method, for messages.
        model: any causal language model with the target's vocabulary.
        request: gives the processors and the way of choosing, which are the target's too.
        width: V of the target.
        known: tokens that both models have; the drafter gives no mass to others.
        trace: counts its calls.
    """

    def __init__(
        self, where: str, model: PreTrainedModel, request: Request, *, width: int, known: int, trace: DecodeTrace
    ) -> None:
        self.where, self.model, self.request, self.trace = where, model, request, trace
        self.width, self.known = width, known
        self.cache = DynamicCache(config=hf.text_config(model))
        self.cached = 0
        mask = request.model_kwargs.get("attention_mask")
        # The drafter never sees padding: it reads the real tokens at positions of its own.
        self.padding = 0 if mask is None or mask.dim() != 2 else int((mask == 0).sum())
        limit = getattr(hf.text_config(model), "max_position_embeddings", None)
        self.position_limit = int(limit) if limit else None
        self._grown = 0

    def length_limit(self, text: int) -> int:
        """How long drafts may be behind a text of ``text`` tokens before the drafter's positions end."""
        return max(self.position_limit - (text - self.padding) + 1, 0) if self.position_limit else 2**31

    @torch.no_grad()
    def propose(self, text: Tensor, drafts: int, length: int) -> tuple[Tensor, list[Tensor]]:
        """Draw ``drafts`` continuations of ``length`` tokens.

        Args:
            text: (1, T) int64, all committed tokens.

        Returns:
            draft_ids (K, L) int64, and for each depth the laws they were drawn from: (1, V) at the first, (K, V) later.
        """
        real = text[:, self.padding :]
        logits = self._forward(real[:, self.cached :])
        self.cached = real.shape[1]
        if length > 1:
            # Before it, a long prompt would be kept whole in sliding layers.
            hf.record_past(self.cache)
            self.cache.batch_repeat_interleave(drafts)
        laws = [self._law(text, logits)]
        columns = [self._draw(laws[0].expand(drafts, -1))]
        for _ in range(length - 1):
            logits = self._forward(columns[-1][:, None])
            laws.append(self._law(torch.cat([text.expand(drafts, -1), torch.stack(columns, 1)], dim=1), logits))
            columns.append(self._draw(laws[-1]))
        self._grown = length - 1
        return torch.stack(columns, dim=1), laws

    def keep(self, row: int, accepted: int) -> None:
        """Keep the cache of draft ``row`` up to its first ``accepted`` tokens."""
        if self._grown:
            self.cache.batch_select_indices(torch.tensor([row], device=self.model.device))
        kept = min(accepted, self._grown)
        self.cache.crop(kept - self._grown)
        self.cached += kept

    def _forward(self, ids: Tensor) -> Tensor:
        # A token that only the target has is read as another one: what follows is less likely right, and still exact.
        ids = ids.clamp(max=self.known - 1)
        out: Any = self.model(
            input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1, return_dict=True
        )
        self.trace.draft_calls += 1
        logits = out.logits[:, -1].float()
        if not bool(torch.isfinite(logits.amax(1)).all()):
            raise NonFiniteError(
                f"{self.where}: the draft model's logits hold {logits.amax(1).min().item()}, but every row must have a "
                f"finite maximum. {self.trace.tokens} new tokens are in .partial.",
                partial=list(self.trace.tokens_so_far),
            )
        if logits.shape[1] != self.width or self.known != self.width:
            fitted = logits.new_full((logits.shape[0], self.width), -torch.inf)
            fitted[:, : self.known] = logits[:, : self.known]
            logits = fitted
        return logits

    def _law(self, text: Tensor, logits: Tensor) -> Tensor:
        scores = self.request.logits_processor(cast("LongTensor", text), cast("FloatTensor", logits))
        if self.request.generation_config.do_sample:
            return scores.double().softmax(1)
        return torch.nn.functional.one_hot(scores.argmax(1), scores.shape[1]).double()

    def _draw(self, law: Tensor) -> Tensor:
        return torch.multinomial(law, 1, generator=self.request.generator).squeeze(1)
