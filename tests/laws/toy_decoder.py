"""Toy decoder: drafts the last token again and checks it, one sequence at a time; `flaw` breaks one thing."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tokenmill.catalog import Card, Paper
from tokenmill.errors import LimitError, StoppedError, UnsupportedError
from tokenmill.trace import Trace

CARD = Card(
    name="Toy decoder",
    kind="decoder",
    paper=Paper(title="A toy", date="2026-01"),
    summary="It drafts the last token again. It exists for the tests.",
    claim="Greedy output equals plain greedy output.",
    api=("ToyDecoder",),
    exact=True,
    trains=False,
    task="generate",
    works_with=("llama", "gemma3_text"),
)


class Run:
    def __init__(self) -> None:
        self.trace = Trace()
        self.lock = threading.Lock()


@dataclass(frozen=True, slots=True, kw_only=True)
class ToyDecoder:
    """Decodes without a cache: every step reads the whole sequence and one drafted token."""

    repeat: int = 1
    flaw: str = ""
    _run: Run = field(default_factory=Run, init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.repeat < 1 and self.flaw != "accepts anything":
            parameter = "it" if self.flaw == "nameless error" else "repeat"
            raise LimitError("ToyDecoder", parameter, self.repeat, "at least 1")

    @property
    def trace(self) -> Trace:
        return self._run.trace

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        *,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        generator: torch.Generator | None = None,
        token_streamer: Any = None,
        **model_kwargs: Any,
    ) -> Tensor:
        if input_ids.shape[0] != 1 and self.flaw != "batch":
            raise UnsupportedError("ToyDecoder", f"it decodes one sequence at a time; got {input_ids.shape[0]}")
        if input_ids.shape[1] == 0:
            raise LimitError("ToyDecoder", "input_ids", 0, "at least one token long")
        if self.flaw != "shared" and not self._run.lock.acquire(blocking=False):
            raise StoppedError("ToyDecoder: a call is under way")
        try:
            if self.flaw != "old trace":
                self._run.trace = Trace()
            handle = model.register_forward_hook(lambda *_: None) if self.flaw == "hook" else None
            out = self._decode(model, input_ids, generation_config, generator, token_streamer)
            if handle is not None and self.trace.tokens < 0:
                handle.remove()
            return out
        finally:
            if self.flaw != "shared":
                self._run.lock.release()

    def _decode(self, model: Any, ids: Tensor, config: Any, generator: torch.Generator | None, streamer: Any) -> Tensor:
        trace, limit = self.trace, config.max_length + (1 if self.flaw == "long" else 0)
        end = set() if self.flaw == "deaf" else set((config.eos_token_id and _listed(config.eos_token_id)) or ())
        if self.flaw == "stuck weights":
            model.lm_head.weight.data.mul_(1.0001)
        if self.flaw == "writes input":
            ids[0, 0] = (ids[0, 0] + 1) % 60
        done = False
        while not done:
            draft = ids[:, -1:]
            logits = model(input_ids=torch.cat([ids, draft], dim=1), use_cache=False).logits[0, -2:]
            trace.model_calls += 0 if self.flaw == "miscount" else 1
            trace.positions += ids.shape[1] + 1
            for place in range(2):
                token = self._pick(logits[place], config.do_sample, generator)
                if place == 0 and int(token) == int(draft):
                    trace.accepted += 1
                ids = torch.cat([ids, token.view(1, 1)], dim=1)
                trace.tokens += 1
                trace.tokens_so_far.append(int(token))
                if streamer is not None:
                    streamer.put(token.view(1))
                done = int(token) in end or ids.shape[1] >= limit
                if done or int(token) != int(draft):
                    break
        if streamer is not None:
            streamer.end()
        return ids

    def _pick(self, logits: Tensor, sample: bool, generator: torch.Generator | None) -> Tensor:
        if not sample:
            return logits.argsort()[-2] if self.flaw == "second best" else logits.argmax()
        if self.flaw == "unseeded":
            generator = torch.Generator()
            generator.seed()
        sharp = 1.6 if self.flaw == "sharp" else 1.0
        return torch.multinomial((logits.float() * sharp).softmax(-1), 1, generator=generator)[0]


def _listed(ids: Any) -> list[int]:
    return [ids] if isinstance(ids, int) else list(ids)


def small() -> ToyDecoder:
    return ToyDecoder()
