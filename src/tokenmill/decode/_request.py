"""One call of a decoder: what `generate` hands over, what is counted, and what is refused."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor

from tokenmill import hf
from tokenmill.errors import LimitError, StoppedError, UnsupportedError
from tokenmill.trace import Trace

if TYPE_CHECKING:
    from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
    from transformers.generation.streamers import BaseStreamer


@dataclass(slots=True)
class DecodeTrace(Trace):
    """Counts of one decoded sequence.

    Attributes:
        drafted: tokens that were drafted and checked by the target.
        draft_calls: forward passes of a draft model.
        steps: tokens that each verification call emitted.
    """

    drafted: int = 0
    draft_calls: int = 0
    steps: list[int] = field(default_factory=list)

    @property
    def mean_accepted(self) -> float:
        """Mean accepted tokens per verification call (the papers' MAT or block efficiency); plain decoding has 1."""
        return sum(self.steps) / len(self.steps) if self.steps else 0.0


TraceT = TypeVar("TraceT", bound=Trace)


class Run(Generic[TraceT]):
    """The one thing that changes on a decoder: the trace of its last call, and whether a call is under way."""

    def __init__(self, make: Callable[[], TraceT] = DecodeTrace) -> None:
        self._make = make
        self.trace = make()
        self._busy = threading.Lock()

    @contextmanager
    def started(self, where: str) -> Generator[TraceT, None, None]:
        if not self._busy.acquire(blocking=False):
            raise StoppedError(
                f"{where}: a call of this object is under way. Make one object for each concurrent call."
            )
        try:
            self.trace = self._make()
            yield self.trace
        finally:
            self._busy.release()


@dataclass(slots=True)
class Request:
    """What `generate` hands to a custom_generate callable, and what the decoder adds."""

    model: PreTrainedModel
    input_ids: Tensor
    logits_processor: LogitsProcessorList
    stopping_criteria: StoppingCriteriaList
    generation_config: GenerationConfig
    model_kwargs: dict[str, Any]
    token_streamer: BaseStreamer | None = None
    generator: torch.Generator | None = None


class Decoder(Generic[TraceT]):
    """What every decoder is to `generate`: a ``custom_generate`` callable that owns the trace of its last call.

    A decoder is a frozen dataclass with a ``seed`` and a field ``_run``, and has `_decode`.
    """

    seed: int | None
    _run: Run[TraceT]

    @property
    def trace(self) -> TraceT:
        """The counts of the last call, also while it runs and after it failed."""
        return self._run.trace

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        token_streamer: BaseStreamer | None = None,
        generator: torch.Generator | None = None,
        **model_kwargs: Any,
    ) -> Any:
        """Decode ``input_ids`` (1, T); called by `generate`. A streamer is always ended.

        Raises:
            UnsupportedError: batch above 1, beams, or what the decoder's own text says.
            LimitError: an empty prompt, one beyond the model's positions, or settings that do not fit the model.
            NonFiniteError: the logits are not finite.
            StoppedError: another call is under way.
                Errors that interrupt work have what was produced in ``.partial``.
        """
        request = Request(
            model,
            input_ids,
            logits_processor,
            stopping_criteria,
            generation_config,
            model_kwargs,
            token_streamer,
            generator_for(input_ids.device, self.seed, generator),
        )
        try:
            return self._decode(request)
        finally:
            if token_streamer is not None:
                token_streamer.end()

    def _decode(self, request: Request) -> Any:
        raise NotImplementedError


def check_seed(where: str, seed: int | None) -> None:
    """Refuse a seed that is not ``None`` or an integer from 0 on."""
    if seed is not None and (isinstance(seed, bool) or seed < 0):
        raise LimitError(where, "seed", seed, "None or an integer >= 0", "None uses torch's global generator.")


def generator_for(device: torch.device, seed: int | None, given: torch.Generator | None) -> torch.Generator | None:
    """The generator of one call: the one that was given, or a fresh one from the seed."""
    if given is not None or seed is None:
        return given
    return torch.Generator(device).manual_seed(seed)


def check_request(where: str, request: Request) -> None:
    """Refuse what no decoder of this family can serve, before any work is done.

    Raises:
        UnsupportedError: more than one row, beams, an encoder-decoder model, outputs that a draft cannot return.
        LimitError: an empty prompt, or one longer than the model's positions.
    """
    rows, length = request.input_ids.shape
    config = request.generation_config
    if request.model.config.is_encoder_decoder:
        raise UnsupportedError(where, "decodes decoder-only models, got an encoder-decoder", "Use plain generate.")
    # Beams arrive as rows, so they are looked for first.
    if (config.num_beams or 1) > 1:
        raise UnsupportedError(where, f"num_beams = {config.num_beams}, but it must be 1", "Use greedy or sampling.")
    if rows != 1:
        raise UnsupportedError(
            where, f"decodes one sequence at a time; got batch {rows}", "Call generate once for each row."
        )
    embeds = request.model_kwargs.get("inputs_embeds")
    if length == 0 and (embeds is None or embeds.shape[1] == 0):
        raise LimitError(where, "prompt length", 0, "at least 1", "Start from the model's bos token.")
    limit = getattr(hf.text_config(request.model), "max_position_embeddings", None)
    if limit and length > limit:
        raise LimitError(where, "prompt length", length, f"at most {limit}, the model's positions", "Cut the prompt.")
    if config.return_dict_in_generate and (config.output_attentions or config.output_hidden_states):
        raise UnsupportedError(
            where, "cannot return attentions or hidden states of a draft", "Ask for scores or logits."
        )
