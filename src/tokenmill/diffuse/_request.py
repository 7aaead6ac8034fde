"""What `generate` hands to the decoder, what it means for unmasking, and what is refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokenmill.diffuse._denoiser import Denoiser
from tokenmill.diffuse._draws import generators
from tokenmill.errors import LimitError, UnsupportedError

if TYPE_CHECKING:
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
    from transformers.generation.streamers import BaseStreamer

_WARPERS = ("TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper")
_STOPS = ("MaxLengthCriteria", "EosTokenCriteria")


@dataclass(slots=True)
class Request:
    """One call: ids (B, P), which of them are real (B, P), and ``room`` places for the answer."""

    model: Any
    input_ids: Tensor
    real: Tensor
    room: int
    config: GenerationConfig | None
    token_streamer: BaseStreamer | None = None
    generator: torch.Generator | None = None

    def end_ids(self, given: int | tuple[int, ...] | None) -> tuple[int, ...]:
        """The ids that end a text: the decoder's own, or the generation config's."""
        if given is None:
            source = self.config if self.config is not None else getattr(self.model, "generation_config", None)
            given = getattr(source if source is not None else self.model.config, "eos_token_id", None)
        if given is None:
            return ()
        return (given,) if isinstance(given, int) else tuple(int(i) for i in given)

    @property
    def pad_id(self) -> int | None:
        """The id of padding, if the model names one."""
        for source in (self.config, getattr(self.model, "generation_config", None), self.model.config):
            found = getattr(source, "pad_token_id", None)
            if found is not None:
                return int(found)
        return None

    @property
    def filler(self) -> int:
        """What stands behind a cut: the padding, else an end id, else 0."""
        if self.pad_id is not None:
            return self.pad_id
        return next(iter(self.end_ids(None)), 0)

    def row_generators(self, seed: int | None) -> list[torch.Generator]:
        """One generator a row, from the generator of the call, else from ``seed``, else from torch's own."""
        device = self.input_ids.device
        if self.generator is not None or seed is None:
            source = self.generator
            at = source.device if source is not None else torch.device("cpu")
            seed = int(torch.randint(2**62, (), generator=source, device=at))
        return generators(seed, self.input_ids.shape[0], device)

    def check(self, denoiser: Denoiser, *, infill: bool) -> None:
        """Refuse ids and lengths that cannot work, before any work is done."""
        where, (rows, prompt) = "Diffusion", self.input_ids.shape
        mask, size = denoiser.mask_id, prompt + self.room
        if self.pad_id == mask:
            mend = "Give padding an id of its own."
            raise LimitError(where, "mask_token_id", mask, f"another id than pad_token_id {self.pad_id}", mend)
        inside = (self.input_ids == mask) & self.real
        if bool(inside.any()) and not infill:
            row, place = inside.nonzero()[0].tolist()
            mend = "Take it out, or pass infill=True to fill it."
            raise LimitError(where, "input_ids", f"mask id {mask} (row {row}, place {place})", "free of masks", mend)
        lengths = self.real.sum(1)
        if denoiser.shift:
            shortest = int(lengths.min()) if rows else 1
            if shortest == 0:
                mend = "Start from the model's bos token: with logits_shift a token is predicted one place before it."
                raise LimitError(where, "prompt length", 0, "at least 1", mend)
            head = self.input_ids[torch.arange(rows), self.real.to(torch.int8).argmax(1)]
            if bool((head == mask).any()):
                raise LimitError(where, "input_ids", "a mask at a row's start", "another id there with logits_shift")
        limit = getattr(denoiser.model.config, "max_position_embeddings", None)
        if limit and size > limit:
            mend = "Ask for fewer tokens, or cut the prompt."
            raise LimitError(where, "prompt and answer", size, f"at most {limit}, the model's positions", mend)

    def answer(self, sequences: Tensor) -> Any:
        """What `generate` returns: (B, T) int64, or a GenerateDecoderOnlyOutput if the caller asked for one."""
        if self.config is None or not self.config.return_dict_in_generate:
            return sequences
        from transformers.generation.utils import GenerateDecoderOnlyOutput

        return GenerateDecoderOnlyOutput(sequences=sequences)  # pyright: ignore[reportArgumentType]


def read_request(
    model: Any,
    input_ids: Tensor,
    processors: LogitsProcessorList | None,
    criteria: StoppingCriteriaList | None,
    config: GenerationConfig | None,
    kwargs: dict[str, Any],
) -> Request:
    """The request of a call.

    Raises:
        UnsupportedError: beams, an encoder-decoder, logits processors or stopping criteria that read from left to
            right, scores or hidden states, padding on the right.
        LimitError: ids of another rank, or a mask of another shape.
    """
    where = "Diffusion"
    if input_ids.dim() != 2:
        raise LimitError(where, "input_ids.dim()", input_ids.dim(), "2 (B, P)")
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedError(where, "needs one bidirectional model, got an encoder-decoder")
    if config is not None and (config.num_beams or 1) > 1:
        raise UnsupportedError(where, f"num_beams = {config.num_beams}, but it must be 1")
    odd = [type(p).__name__ for p in processors or () if type(p).__name__ not in _WARPERS]
    if odd:
        mend = "Take them out; suppress_tokens= forbids ids."
        raise UnsupportedError(where, f"logits processors read from left to right ({', '.join(odd)})", mend)
    odd = [type(c).__name__ for c in criteria or () if type(c).__name__ not in _STOPS]
    if odd:
        raise UnsupportedError(where, f"stopping criteria read from left to right ({', '.join(odd)})")
    if config is not None and config.return_dict_in_generate and _wants_more(config):
        raise UnsupportedError(where, "returns sequences; scores, logits and hidden states have no order here")
    mask = kwargs.get("attention_mask")
    if mask is not None and mask.shape != input_ids.shape:
        raise LimitError(
            where, "attention_mask.shape", tuple(mask.shape), f"that of input_ids {tuple(input_ids.shape)}"
        )
    real = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask.bool()
    if bool((real[:, :-1] & ~real[:, 1:]).any()):
        raise UnsupportedError(where, "padding stands on the left", "Use padding_side='left'.")
    prompt = input_ids.shape[1]
    room = max(int(config.max_length or 0) - prompt, 0) if config is not None else 0
    return Request(model, input_ids, real, room, config)


def _wants_more(config: GenerationConfig) -> bool:
    names = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
    return any(getattr(config, name, False) for name in names)


@dataclass(frozen=True, slots=True)
class Chance:
    """How tokens are drawn; a temperature of 0 draws nothing."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0


def chance(request: Request, temperature: float | None, top_k: int | None, top_p: float | None) -> Chance:
    """The decoder's own settings; for those that are None the generation config's, if it samples."""
    config = request.config
    if config is not None and config.do_sample:
        temperature = config.temperature if temperature is None else temperature
        temperature = 1.0 if temperature is None else temperature
        top_k = config.top_k if top_k is None else top_k
        top_p = config.top_p if top_p is None else top_p
    return Chance(temperature or 0.0, top_k or 0, 1.0 if top_p is None else top_p)


def mask_of(given: int | None, request: Request) -> int:
    """The mask's id, as given or from the model's configuration.

    Raises:
        LimitError: neither has it.
    """
    found = given if given is not None else getattr(request.model.config, "mask_token_id", None)
    if found is None:
        limit = "given, since the model's configuration has no mask_token_id"
        raise LimitError("Diffusion", "mask_token_id", None, limit, "See the tokenizer's mask_token_id.")
    return int(found)


def shift_of(given: bool | None, request: Request) -> bool:
    """Whether predictions stand one place before their token."""
    return bool(getattr(request.model.config, "logits_shift", False)) if given is None else given
