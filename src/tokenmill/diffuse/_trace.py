"""What a run of unmasking did, in counts, and what it looked like on the way."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tokenmill.trace import Trace


@dataclass(slots=True)
class DiffusionTrace(Trace):
    """Counts of one batch.

    Attributes:
        model_calls: forward passes of the whole batch; `row_calls` has those that each row took part in.
        positions: places fed, summed over rows; what pads a batch is not counted.
        tokens: places revealed.
        refreshes: passes of a row that its cache policy calls a refresh.
        row_calls, row_positions, row_tokens: passes, places fed and tokens of each row of the call.
        lengths: length of each row's answer; a cut row is shorter than the others.
        still_masked: rows that ended with masks, after a rule gave up a block.
        revealed: for each pass, tokens revealed over all rows.
        accepted_runs: for each pass of a guided rule, the drafts that the guide agreed to in each live row.
        guide_calls, guide_positions: forward passes of a guide (rows count one each), and tokens fed to it.
        history: the answers (B, G) after each pass, the mask id where nothing is revealed; filled on request.
        prompt: where the answer starts.
        mask_id: the mask's id.
        sequences: (B, S) the ids as they stand; filled while the run goes on.
    """

    refreshes: int = 0
    row_calls: list[int] = field(default_factory=list)
    row_positions: list[int] = field(default_factory=list)
    row_tokens: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    still_masked: list[bool] = field(default_factory=list)
    revealed: list[int] = field(default_factory=list)
    accepted_runs: list[list[int]] = field(default_factory=list)
    guide_calls: int = 0
    guide_positions: int = 0
    history: list[Tensor] = field(default_factory=list)
    prompt: int = 0
    mask_id: int = -1
    sequences: Tensor | None = None

    def counts(self) -> dict[str, Any]:
        """The numbers of the trace as plain data; where the answer starts and the mask are no counts."""
        return {k: v for k, v in Trace.counts(self).items() if k not in ("prompt", "mask_id")}

    def answers(self) -> list[list[int]]:
        """What has been revealed of each row's answer, from left to right, masks left out."""
        if self.sequences is None:
            return []
        return [row[row != self.mask_id].tolist() for row in self.sequences[:, self.prompt :]]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A batch after a pass.

    Attributes:
        ids: (B, S) int64, prompt and answer; the mask id where nothing is revealed.
        prompt: where the answer starts.
        call: number of the pass, from 1.
        revealed: (B, S) bool, what this pass revealed.
        mask_id: the mask's id.
    """

    ids: Tensor
    prompt: int
    call: int
    revealed: Tensor
    mask_id: int

    @property
    def answer(self) -> Tensor:
        """(B, G) int64."""
        return self.ids[:, self.prompt :]

    @property
    def share(self) -> float:
        """How much of the answers is revealed, 0 to 1."""
        return float((self.answer != self.mask_id).to(torch.float32).mean()) if self.answer.numel() else 1.0
