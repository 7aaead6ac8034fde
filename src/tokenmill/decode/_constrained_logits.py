"""Rejection sampling as a logits processor: ordinary `generate` samples, and every row is constrained."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from tokenmill.decode._draws import DrawTable
from tokenmill.decode._oracle import Oracle
from tokenmill.decode._population import Particle, SMCTrace, Status, common_prefix
from tokenmill.decode._potential import State
from tokenmill.decode._rejection import Method, check_limits, weighted_step
from tokenmill.decode._request import check_seed
from tokenmill.decode._weights import NoValidContinuation, WeightedSequences
from tokenmill.errors import LimitError
from tokenmill.text import TokenBytes

_WHERE = "AWRSLogitsProcessor"


@dataclass(slots=True)
class _Row:
    """What is known of one row: its new tokens, what each of them weighed, and the way back to any of them."""

    particle: Particle
    ids: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    before: list[tuple[State, int, Status]] = field(default_factory=list)  # state, bytes of text, status
    drawn: tuple[int, float] | None = None  # the token that generate is about to append, and its weight

    @property
    def log_weight(self) -> float:
        return math.fsum(self.weights) + (self.drawn[1] if self.drawn is not None else 0.0)

    def go_back(self, length: int) -> None:
        """Forget all but the first ``length`` tokens."""
        if length < len(self.ids):
            state, bytes_read, status = self.before[length]
            text = self.particle.text[:bytes_read]
            self.particle = Particle(state, self.particle.row, text=text, status=status, whole=status == "finished")
            del self.ids[length:], self.weights[length:], self.before[length:]
            self.drawn = None


class AWRSLogitsProcessor(LogitsProcessor):
    """Leaves each row one token: the first that the constraint allows of those drawn from the row's own law.

    For ``model.generate(..., do_sample=True, logits_processor=[processor])``, with batches. Sampling then has no
    choice, so the law of a row is that of masked sampling at temperature 1; the weights of its tokens are recorded.
    `generate` puts its own warpers behind, where they change nothing: to sample at another temperature, put a
    ``TemperatureLogitsWarper`` before this processor in the list.

    What a row has read is kept from call to call. A row whose history is another one than before (beams) is read
    again from where it differs; tokens that were not drawn here weigh 1. A batch whose prompt is new starts anew.

    Args:
        constraint: see `AWRS`.
        tokenizer: the model's tokenizer, or its `TokenBytes`.
        prompt_length: columns before the text; None takes those of the first call.
        seed: of the draws; None uses torch's global generator.
        eos_token_id: end tokens; None takes the tokenizer's, if it has one.
        method, max_accepts, max_rejects: see `awrs_step`.

    Attributes:
        trace: ``checks`` and ``checks_per_token``.

    Raises:
        LimitError: no constraint, or a setting outside its limits.
    """

    def __init__(
        self,
        constraint: Any,
        tokenizer: Any,
        prompt_length: int | None = None,
        seed: int | None = None,
        *,
        eos_token_id: int | list[int] | None = None,
        method: Method = "auto",
        max_accepts: int = 2,
        max_rejects: int | None = None,
    ) -> None:
        check_limits(_WHERE, method, max_accepts, max_rejects)
        check_seed(_WHERE, seed)
        if prompt_length is not None and (isinstance(prompt_length, bool) or prompt_length < 0):
            raise LimitError(_WHERE, "prompt_length", prompt_length, "None or an integer >= 0")
        self.method: Method = method
        self.max_accepts, self.max_rejects = max_accepts, max_rejects
        self.prompt_length, self.seed = prompt_length, seed
        ends = getattr(tokenizer, "eos_token_id", None) if eos_token_id is None else eos_token_id
        self.trace = SMCTrace()
        tokens = TokenBytes.of(tokenizer)
        ids = [] if ends is None else torch.as_tensor(ends).flatten().tolist()
        self._oracle = Oracle(_WHERE, constraint, tokens, ids, self.trace)
        self._oracle.partial = self._sequences
        self._start = self._oracle.start()
        self._rows: list[_Row] = []
        self._prompt = torch.empty(0, 0, dtype=torch.int64)  # (B, P)
        self._length = 0
        self._generator: torch.Generator | None = None
        self._blocked: Tensor | None = None

    @property
    def log_weights(self) -> Tensor:
        """(B,) float64: the log-weight of each row of the last batch."""
        return torch.tensor([row.log_weight for row in self._rows], dtype=torch.float64)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Draw a valid token for each row.

        Args:
            input_ids: (B, T) int64.
            scores: (B, V), any float dtype.

        Returns:
            (B, V): -inf except at one token a row; rows that have ended are left as they are.

        Raises:
            NoValidContinuation: a row has no valid token; ``.partial`` holds all rows.
            LimitError: a row holds a text that the constraint forbids, or scores are NaN.
        """
        self._oracle.forget()
        self._follow(input_ids)
        if self._blocked is None or self._blocked.device != scores.device:
            self._blocked = self._oracle.blocked(scores.shape[1]).to(scores.device)
        if self.seed is not None and self._generator is None:
            self._generator = torch.Generator(scores.device).manual_seed(self.seed)
        law = scores.float().log_softmax(1, dtype=torch.float64)
        table = DrawTable(law, generator=self._generator, blocked=self._blocked, event=self._oracle.eos_ids)
        only = torch.full_like(scores, -math.inf)
        for number, row in enumerate(self._rows):
            if row.particle.status == "finished":
                only[number] = scores[number]
                continue
            token = self._draw(table, law, number)
            only[number, token] = scores[number, token]
        return only

    def _draw(self, table: DrawTable, law: Tensor, number: int) -> int:
        row = self._rows[number]
        step = weighted_step(
            table.row(number),
            lambda token: self._oracle.accepts(row.particle, token),
            method=self.method,
            max_accepts=self.max_accepts,
            max_rejects=self.max_rejects,
        )
        self.trace.checks_per_token.append(step.n_checks)
        if step.token < 0:
            what = f"{_WHERE}: row {number} has no valid token behind {row.particle.text!r}"
            text = f"{what}; check prefix(), or use AWRS with more particles."
            raise NoValidContinuation(text, partial=self._sequences())
        token = step.token
        if self._oracle.is_end(token):
            token = self._oracle.end_token(law[number], self._generator)
        row.drawn = (token, step.logw)
        return token

    def _follow(self, input_ids: Tensor) -> None:
        """Bring every row up to what ``input_ids`` (B, T) hold now."""
        batch, length = input_ids.shape
        new = batch != len(self._rows)
        if self.prompt_length is None and not new:
            prompt = input_ids[:, : self._prompt.shape[1]].to(self._prompt.device)
            new = length != self._length + 1 or not torch.equal(prompt, self._prompt)
        if new:
            self._prompt = input_ids[:, : self.prompt_length].clone()
            self._rows = [_Row(Particle(self._start, number)) for number in range(batch)]
        self._length = length
        text = input_ids[:, self._prompt.shape[1] :]
        for row, ids in zip(self._rows, text.tolist(), strict=True):
            self._read(row, ids)

    def _read(self, row: _Row, ids: list[int]) -> None:
        if ids[: len(row.ids)] != row.ids:
            row.go_back(len(common_prefix([row.ids, ids])))
        for token in ids[len(row.ids) :]:
            particle = row.particle
            row.before.append((particle.state, len(particle.text), particle.status))
            row.ids.append(token)
            row.weights.append(row.drawn[1] if row.drawn is not None and row.drawn[0] == token else 0.0)
            row.drawn = None
            if particle.status != "finished":
                self._append(particle, token)
        row.drawn = None

    def _append(self, particle: Particle, token: int) -> None:
        if not self._oracle.accepts(particle, token):
            what = f"token {token} behind {particle.text!r}"
            mend = "The text behind the prompt must satisfy the constraint: check prompt_length."
            raise LimitError(_WHERE, "input_ids", what, "allowed by the constraint", mend)
        if self._oracle.is_end(token):
            particle.status, particle.whole = "finished", True
        else:
            self._oracle.advance(particle, token)

    def _sequences(self) -> WeightedSequences:
        rows = self._rows
        return WeightedSequences(
            sequences=[list(row.ids) for row in rows],
            texts=[row.particle.text for row in rows],
            log_weights=self.log_weights,
            finished=[row.particle.whole for row in rows],
        )
