"""The decoder of the family: a rule that reveals, a policy that caches, and the loop between them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from tokenmill.decode._request import Run, check_seed
from tokenmill.diffuse._caches import NoCache
from tokenmill.diffuse._canvas import Canvas
from tokenmill.diffuse._denoiser import Denoiser
from tokenmill.diffuse._loop import Settings, unmask
from tokenmill.diffuse._policy import KVPolicy
from tokenmill.diffuse._request import Request, chance, mask_of, read_request, shift_of
from tokenmill.diffuse._rule import RevealRule
from tokenmill.diffuse._trace import DiffusionTrace, Snapshot
from tokenmill.errors import LimitError, TokenmillError, unknown_name

if TYPE_CHECKING:
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
    from transformers.generation.streamers import BaseStreamer

SCHEDULES = ("even", "linear")


@dataclass(frozen=True)
class Diffusion:
    """Generation by unmasking: ``model.generate(..., custom_generate=Diffusion(rule, cache), max_new_tokens=128)``.

    The answer is ``max_new_tokens`` long, or shorter where a rule cuts it; rows that were cut are padded. Prompts are
    padded on the left with an ``attention_mask``. For models without `generate` (masked language models, own modules)
    call `generate` of the decoder itself.

    Args:
        rule: which places a pass reveals.
        cache: which places a pass feeds; ``None`` feeds all.
        block_length: places of one block; blocks are filled from left to right. ``None``: one block.
        mask_token_id: the mask; ``None`` takes ``mask_token_id`` of the model's configuration.
        eot_id: ids that end a text; ``None`` takes ``eos_token_id`` of the generation config.
        logits_shift: the prediction for a place is read one place before it; ``None`` takes ``logits_shift`` of the
            model's configuration, or False.
        steps: passes that a quota spreads the answer over; ``None``: as many as the answer has tokens.
        schedule: ``"even"`` splits each block's tokens evenly over its share of the steps (LLaDA), ``"linear"``
            follows the time grid from 1 to 0.001 over the whole answer (Dream).
        temperature: of the draws; ``None`` is 0, or the generation config's when it says ``do_sample=True``.
        top_k, top_p: cut the law before a draw; ``None`` as with ``temperature``. Confidences ignore all three.
        suppress_tokens: ids that never come out, besides the mask.
        early_stop: end tokens in a row, all revealed, that end a text: what stands behind them is cut. 0 for never.
        infill: masks inside the prompt are filled as well; otherwise they are refused.
        causal: the model is autoregressive on purpose.
        seed: of the draws; row b of a batch draws as under ``seed + b`` alone. ``None`` uses torch's global generator.
        history: keep the answer as it was after each pass in ``trace.history``.
        watch: called with a `Snapshot` after each pass.

    Raises:
        LimitError: a setting outside its limit.
    """

    rule: RevealRule
    cache: KVPolicy | None = None
    _: KW_ONLY
    block_length: int | None = None
    mask_token_id: int | None = None
    eot_id: int | tuple[int, ...] | None = None
    logits_shift: bool | None = None
    steps: int | None = None
    schedule: Literal["even", "linear"] = "even"
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    suppress_tokens: tuple[int, ...] = ()
    early_stop: int = 0
    infill: bool = False
    causal: bool = False
    seed: int | None = None
    history: bool = False
    watch: Callable[[Snapshot], None] | None = field(default=None, compare=False)
    _run: Run[DiffusionTrace] = field(
        default_factory=lambda: Run(DiffusionTrace), init=False, compare=False, repr=False
    )

    def __post_init__(self) -> None:
        where = "Diffusion"
        for name, least in (("block_length", 1), ("steps", 1), ("top_k", 0), ("mask_token_id", 0)):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or value < least):
                raise LimitError(where, name, value, f"None or at least {least}")
        for name, kind in (("rule", RevealRule), ("cache", KVPolicy)):
            value = getattr(self, name)
            if not isinstance(value, kind) and (value is not None or name == "rule"):
                raise LimitError(where, name, value, f"a {kind.__name__}", "Make an instance, such as Threshold(0.9).")
        if self.schedule not in SCHEDULES:
            raise unknown_name(where, "schedule", str(self.schedule), SCHEDULES)
        if self.temperature is not None and not 0 <= self.temperature < math.inf:
            raise LimitError(where, "temperature", self.temperature, "at least 0")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise LimitError(where, "top_p", self.top_p, "in (0, 1]")
        if isinstance(self.early_stop, bool) or self.early_stop < 0:
            raise LimitError(where, "early_stop", self.early_stop, "at least 0")
        check_seed(where, self.seed)

    @property
    def trace(self) -> DiffusionTrace:
        """The counts of the last call, also while it runs and after it failed."""
        return self._run.trace

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        generation_config: GenerationConfig | None = None,
        token_streamer: BaseStreamer | None = None,
        generator: torch.Generator | None = None,
        **model_kwargs: Any,
    ) -> Any:
        """Decode ``input_ids`` (B, P); called by `generate`. A streamer is always ended.

        Raises:
            UnsupportedError: a causal model, beams, logits processors, a cache policy that the model cannot serve.
            LimitError: an empty prompt that the shift needs, masks in the prompt, ids that coincide, more positions
                than the model has.
            NonFiniteError: the logits are not finite.
            StoppedError: another call is under way, or the rule makes no headway.
                Errors that interrupt work have the answers so far, one list a row, in ``.partial``.
        """
        try:
            with self._run.started("Diffusion") as trace:
                request = read_request(
                    model, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs
                )
                request.token_streamer, request.generator = token_streamer, generator
                return self._decode(request, trace)
        finally:
            if token_streamer is not None:
                token_streamer.end()

    def generate(
        self,
        model: Any,
        input_ids: Tensor,
        *,
        max_new_tokens: int,
        attention_mask: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Decode without the model's own `generate`: ids (B, P) to (B, P + answer).

        Raises:
            LimitError: a negative length, and what `__call__` raises. A length of 0 gives the ids back.
        """
        if isinstance(max_new_tokens, bool) or max_new_tokens < 0:
            raise LimitError("Diffusion", "max_new_tokens", max_new_tokens, "at least 0")
        kwargs = {} if attention_mask is None else {"attention_mask": attention_mask}
        with self._run.started("Diffusion") as trace, torch.no_grad():
            request = read_request(model, input_ids, None, None, None, kwargs)
            request.room, request.generator = max_new_tokens, generator
            return self._decode(request, trace)

    def _decode(self, request: Request, trace: DiffusionTrace) -> Any:
        if request.input_ids.shape[0] == 0 or (request.room == 0 and not self.infill):
            return request.answer(request.input_ids)
        denoiser = Denoiser(
            request.model,
            mask_token_id=mask_of(self.mask_token_id, request),
            eos_token_ids=request.end_ids(self.eot_id),
            logits_shift=shift_of(self.logits_shift, request),
            suppress_tokens=self.suppress_tokens,
            causal=self.causal,
        )
        request.check(denoiser, infill=self.infill)
        policy = self.cache if self.cache is not None else NoCache()
        canvas = self._canvas(request, denoiser, trace)
        denoiser.check_bidirectional()
        if policy.caches:
            denoiser.check_cache()
        if len(set(canvas.real.sum(1).tolist())) > 1:
            denoiser.check_padding()
        settings = Settings(
            steps=self.steps,
            schedule=self.schedule,
            chance=chance(request, self.temperature, self.top_k, self.top_p),
            early_stop=self.early_stop,
            filler=request.filler,
            history=self.history,
            watch=self.watch,
            streamer=request.token_streamer,
        )
        try:
            out = unmask(canvas, denoiser, self.rule, policy, settings, trace)
        except TokenmillError as error:
            error.partial = trace.answers() if error.partial is None else error.partial
            raise
        return request.answer(out)

    def _canvas(self, request: Request, denoiser: Denoiser, trace: DiffusionTrace) -> Canvas:
        ids, room = request.input_ids, request.room
        rows, prompt = ids.shape
        x = torch.cat([ids, ids.new_full((rows, room), denoiser.mask_id)], dim=1)
        real = torch.cat([request.real, request.real.new_ones(rows, room)], dim=1)
        canvas = Canvas.of(
            x,
            real,
            Denoiser.default_positions(real),
            prompt=prompt,
            mask_id=denoiser.mask_id,
            eot_ids=torch.tensor(denoiser.eos_ids, dtype=torch.long, device=ids.device),
            block_length=self.block_length if self.block_length is not None else max(room, 1),
            shift=denoiser.shift,
            vocab_size=int(request.model.config.vocab_size),
        )
        canvas.trace = trace
        canvas.generators = request.row_generators(self.seed)
        return canvas
