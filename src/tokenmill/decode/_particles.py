"""A transformers model as the language model of a population: one prefill, then one row a particle."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import FloatTensor, LongTensor, Tensor

from tokenmill import hf
from tokenmill.decode._request import Request
from tokenmill.errors import NonFiniteError, StoppedError
from tokenmill.trace import Trace


class Particles:
    """Rows behind one prompt, all of one length, in a cache that is copied, selected and reordered by rows.

    The prompt goes through the model once, in a batch of one. The cache that `generate` handed over keeps exactly the
    prompt; particles live in a copy of it.

    Args:
        where: the method, for messages.
        request: the prompt (1, T), what goes with it, and the processors that every row's logits pass.
        trace: counts calls and positions.

    Raises:
        UnsupportedError: a cache whose rows cannot be selected.
        LimitError: an argument that the model does not take.
    """

    def __init__(self, where: str, request: Request, trace: Trace) -> None:
        self.where, self.request, self.trace = where, request, trace
        self.model = request.model
        inputs = hf.split_model_kwargs(self.model, request.model_kwargs)
        self.given = hf.check_cache(where, inputs.running.get("past_key_values"))
        self._length = getattr(request.generation_config, "_mask_length", None)
        self._inputs = hf.with_positions(self.model, request.input_ids, inputs, length=self._length)
        self._running: dict[str, Any] = {}
        self._ids = request.input_ids  # (n, T), with the prompt

    @torch.no_grad()
    def start(self, n: int) -> Tensor:
        """Read the prompt and make ``n`` rows of it; (n, V) float64 log-probabilities behind it."""
        past = self.given.get_seq_length()
        inputs = hf.prefill_inputs(self.model, self.request.input_ids, self._inputs, length=self._length)
        law = self._law(self._forward(inputs))  # (1, V)
        self.trace.positions += self.given.get_seq_length() - past
        cache = copy.deepcopy(self.given)
        if n > 1:
            cache.batch_repeat_interleave(n)
        self._running = {**self._inputs.running, "past_key_values": cache}
        self._ids = self.request.input_ids.expand(n, -1)
        return law.expand(n, -1)

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """Append one token (n,) to each row; (n, V) float64 log-probabilities behind them."""
        if not self._running:
            raise StoppedError(f"{self.where}: start() comes before the first step.")
        self._running = hf.grow(self._running)
        self._ids = torch.cat([self._ids, tokens[:, None].to(self._ids)], dim=1)
        rows = {name: _rows(value, tokens.shape[0]) for name, value in self._running.items()}
        law = self._law(self._forward(hf.step_inputs(self.model, self._ids[:, -1:], rows)))
        self.trace.positions += tokens.shape[0]
        return law

    @torch.no_grad()
    def select(self, rows: Tensor) -> None:
        """Keep these rows (m,), copies allowed."""
        self._running["past_key_values"].batch_select_indices(rows)
        self._ids = self._ids.index_select(0, rows)

    def _forward(self, inputs: dict[str, Any]) -> Tensor:
        """(n, V) logits behind the last token of each row.

        Raises:
            NonFiniteError: a row has no finite maximum.
        """
        self.trace.model_calls += 1
        logits = cast("Tensor", self.model(**inputs, return_dict=True).logits)[:, -1]
        highest = logits.amax(1)
        if not bool(torch.isfinite(highest).all()):
            value = highest[~torch.isfinite(highest)][0].item()
            raise NonFiniteError(
                f"{self.where}: the model's logits hold {value} at call {self.trace.model_calls}, "
                "but every row must have a finite maximum. The particles so far are in .partial."
            )
        return logits

    def _law(self, logits: Tensor) -> Tensor:
        """(n, V) float64 log-probabilities after the processors."""
        ids = self._ids[: logits.shape[0]]
        scores = self.request.logits_processor(cast("LongTensor", ids), cast("FloatTensor", logits.float()))
        return scores.log_softmax(1, dtype=torch.float64)


def _rows(value: Any, n: int) -> Any:
    """What belongs to the tokens of the one prompt, for n rows: (1, T) to (n, T), (R, 1, T) to (R, n, T)."""
    if not isinstance(value, Tensor) or value.dim() < 2:
        return value
    return value.expand(*value.shape[:-2], n, value.shape[-1])
