"""The live rows of a batch that is being unmasked: what rules and cache policies look at."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor


@dataclass(slots=True)
class Canvas:
    """B rows of S places, prompt and answer. A row that is finished leaves; `select` keeps the others.

    A place is a column of ``x`` and a row of the KV cache. Prompts are padded on the left, so the answer stands in the
    same places [prompt, S) in every row.

    Attributes:
        x: (B, S) int64, ids; the mask id where nothing is revealed yet.
        real: (B, S) bool, false at padding and behind a cut.
        positions: (B, S) int64, absolute position ids.
        prompt: first place of the answer.
        mask_id: the mask's id.
        eot_ids: (E,) int64, ids that end a text; E may be 0.
        block_length: places of one block.
        shift: the prediction for a place is read at the place before it.
        vocab_size: number of ids that the model has.
        row: (B,) int64, which row of the call this is.
        left: (B, S) bool, masks of blocks that a rule has given up.
        drafts: (B, S) int64, the latest prediction for each place; the mask id where there was none.
        confidence: (B, S) float32, probability of that prediction (without temperature); 0 where there was none.
        fresh: (B, S) bool, the places that the last pass predicted.
        revealed: (B, S) bool, the places that the last pass revealed.
        refreshed: (B,) bool, the last pass was one that the cache policy calls a refresh.
        passes, block_passes: (B,) int64, passes so far, and in the current block.
        head: (B,) int64, where the first block starts: the answer, or a mask inside the prompt.
        start, stop: (B,) int64, the current block is [start, stop).
        block_masks: (B,) int64, masks that the current block had at its first pass.
        quota: (B,) int64, how many tokens the decoder's schedule of steps reveals in this pass.
        generators: one generator a row, empty when nothing is drawn.
        trace: the trace of the call, for rules with counts of their own.
    """

    x: Tensor
    real: Tensor
    positions: Tensor
    prompt: int
    mask_id: int
    eot_ids: Tensor
    block_length: int
    shift: bool
    vocab_size: int
    row: Tensor
    left: Tensor
    drafts: Tensor
    confidence: Tensor
    fresh: Tensor
    revealed: Tensor
    refreshed: Tensor
    passes: Tensor
    block_passes: Tensor
    head: Tensor
    start: Tensor
    stop: Tensor
    block_masks: Tensor
    quota: Tensor
    generators: list[torch.Generator] = field(default_factory=list)
    trace: Any = None

    @classmethod
    def of(
        cls,
        x: Tensor,
        real: Tensor,
        positions: Tensor,
        *,
        prompt: int,
        mask_id: int,
        eot_ids: Tensor,
        block_length: int,
        shift: bool,
        vocab_size: int = 0,
    ) -> Canvas:
        """A canvas before its first pass."""
        batch = x.shape[0]

        def zero() -> Tensor:
            return x.new_zeros(batch)

        def none() -> Tensor:
            return torch.zeros_like(real)

        made = cls(
            x=x,
            real=real,
            positions=positions,
            prompt=prompt,
            mask_id=mask_id,
            eot_ids=eot_ids,
            block_length=block_length,
            shift=shift,
            vocab_size=vocab_size,
            row=torch.arange(batch, device=x.device),
            left=none(),
            drafts=torch.full_like(x, mask_id),
            confidence=torch.zeros(x.shape, dtype=torch.float32, device=x.device),
            fresh=none(),
            revealed=none(),
            refreshed=none()[:, 0],
            passes=zero(),
            block_passes=zero(),
            head=zero() + prompt,
            start=zero() - 1,
            stop=zero() - 1,
            block_masks=zero(),
            quota=zero() + 1,
        )
        made.head = made.first.clamp(max=prompt)
        made.find_block()
        return made

    def __len__(self) -> int:
        return self.x.shape[0]

    @property
    def size(self) -> int:
        """S, the number of places."""
        return self.x.shape[1]

    @property
    def places(self) -> Tensor:
        """(1, S) int64: 0 to S - 1."""
        return torch.arange(self.size, device=self.x.device)[None]

    @property
    def masked(self) -> Tensor:
        """(B, S) bool: places that are still to be revealed."""
        return (self.x == self.mask_id) & self.real & ~self.left

    @property
    def first(self) -> Tensor:
        """(B,) int64: the first place that is still to be revealed; S in a row without one."""
        return _first(self.masked)

    @property
    def length(self) -> Tensor:
        """(B,) int64: one past the last real place."""
        return self.size - _first(self.real.flip(1))

    @property
    def in_block(self) -> Tensor:
        """(B, S) bool: places of the current block."""
        return (self.places >= self.start[:, None]) & (self.places < self.stop[:, None])

    def sources(self, wanted: Tensor) -> Tensor:
        """The places (B, S) bool that have to be fed for predictions of the places ``wanted`` (B, S) bool."""
        if not self.shift:
            return wanted & self.real
        return torch.nn.functional.pad(wanted[:, 1:], (0, 1)) & self.real

    def find_block(self) -> None:
        """Move each row's block to that of its first mask; blocks go strictly from left to right."""
        first = self.first
        block = ((first - self.prompt) // self.block_length).clamp(min=0)
        start = self.prompt + block * self.block_length
        stop = (start + self.block_length).minimum(self.length)
        start = torch.where(block == 0, self.head, start)
        moved = start != self.start
        self.block_passes = torch.where(moved, 0, self.block_passes)
        self.start, self.stop = start, stop
        masks = (self.masked & self.in_block).sum(1)
        self.block_masks = torch.where(moved, masks, self.block_masks)

    def cut(self, last: Tensor, filler: int) -> None:
        """Drop what stands behind the place ``last`` (B,) of each row; rows with -1 keep all."""
        gone = (last[:, None] >= 0) & (self.places > last[:, None])
        self.real = self.real & ~gone
        self.x = self.x.masked_fill(gone, filler)

    def select(self, index: Tensor) -> None:
        """Keep the rows ``index`` (R,) int64."""
        for one in fields(self):
            value = getattr(self, one.name)
            if isinstance(value, Tensor) and one.name != "eot_ids":
                setattr(self, one.name, value[index])
        if self.generators:
            self.generators = [self.generators[i] for i in index.tolist()]


def _first(where: Tensor) -> Tensor:
    """The first true column (B,) of ``where`` (B, S); S in a row without one."""
    found = where.to(torch.int8).argmax(1)
    return torch.where(where.any(1), found, where.shape[1])
