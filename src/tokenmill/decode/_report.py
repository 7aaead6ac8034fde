"""What a run of particles tells while it goes on, and where the caller wants it to stop."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import LongTensor, Tensor

from tokenmill.decode._population import Population, SMCTrace, common_prefix
from tokenmill.decode._request import Request
from tokenmill.trace import Trace


class Report:
    """What a run tells while it goes on: the heaviest text, tokens that are certain, and where it must stop."""

    def __init__(self, request: Request, trace: SMCTrace, ends: list[int]) -> None:
        self.request, self.trace = request, trace
        self.proposal: Trace | None = None
        self.criteria = [c for c in request.stopping_criteria if not _known(c, request, ends)]
        self._streamed = 0

    def stops(self, ids: list[int], law: Tensor) -> bool:
        """Does a criterion of the caller's end this text? ``law`` (V,) gave its last token."""
        prompt = self.request.input_ids
        new = torch.tensor([ids], dtype=prompt.dtype, device=prompt.device)
        text = cast("LongTensor", torch.cat([prompt, new], dim=1))
        return any(bool(criterion(text, cast("Any", law[None])).all()) for criterion in self.criteria)

    def step(self, population: Population) -> None:
        """Called behind each token."""
        if self.proposal is not None:
            self.trace.proposal_calls = self.proposal.model_calls
        alive = population.alive
        if not alive:
            return
        self._note(max(alive, key=lambda particle: particle.logw).ids)
        if self.request.token_streamer is not None:
            # The result descends from one of these, so what they all begin with is certain.
            self._stream(common_prefix([particle.ids for particle in alive]))

    def choose(self, ids: list[int]) -> None:
        """The result."""
        self._note(ids)
        self._stream(ids)

    def _note(self, ids: list[int]) -> None:
        self.trace.tokens_so_far, self.trace.tokens = list(ids), len(ids)

    def _stream(self, ids: list[int]) -> None:
        if self.request.token_streamer is not None:
            for token in ids[self._streamed :]:
                self.request.token_streamer.put(torch.tensor([token]))
            self._streamed = max(self._streamed, len(ids))


def _known(criterion: Any, request: Request, ends: list[int]) -> bool:
    """Is this a criterion that the particles obey anyway: the length limit, or end tokens?"""
    from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

    if isinstance(criterion, MaxLengthCriteria):
        return criterion.max_length >= int(request.generation_config.max_length or 0)
    return isinstance(criterion, EosTokenCriteria) and set(criterion.eos_token_id.tolist()) <= set(ends)


def end_tokens(request: Request, tokenizer: Any) -> list[int]:
    """The end tokens of a request; those of the tokenizer when the generation config names none."""
    found = request.generation_config.eos_token_id
    if found is None:
        found = getattr(tokenizer, "eos_token_id", None)
    if found is None:
        return []
    return torch.as_tensor(found).flatten().tolist()
