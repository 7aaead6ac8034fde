"""Expansion while batches are put together, so that every epoch sees another segmentation."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tokenmill.errors import LimitError

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from tokenmill.text.stochastok import StochasTok


@dataclass(frozen=True, slots=True)
class Anneal:
    """Ours: a schedule that is 1 and falls to 0 in a line, so that a model ends on the ordinary tokenization.

    Attributes:
        last: share of the training at whose end p falls.
    """

    last: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.last <= 1:
            raise LimitError("Anneal", "last", self.last, "in (0, 1]")

    def __call__(self, progress: float) -> float:
        """The factor of p when this share of the training is done."""
        return min(1.0, max(0.0, (1.0 - progress) / self.last))


class StochasTokCollator:
    """A `data_collator` for transformers' `Trainer`: examples are expanded, then padded by another collator.

    ``Trainer(..., data_collator=collator, callbacks=[collator.callback()])``. The callback tells the epoch, also to the
    workers of the data loader, and the progress of the training.

    An example's draws belong to its number if it has one (the column `index`; `Trainer` keeps unknown columns only with
    ``remove_unused_columns=False``), otherwise to its tokens: equal examples of one epoch are then cut alike.
    """

    def __init__(
        self,
        stochastok: StochasTok,
        base_collator: Callable[[list[dict[str, Any]]], Any],
        *,
        max_length: int | None = None,
        index: str = "index",
        schedule: Callable[[float], float] | None = None,
        carried: Sequence[str] = ("labels", "word_ids", "token_type_ids", "special_tokens_mask"),
    ) -> None:
        """
        Args:
            stochastok: what expands.
            base_collator: pads and makes tensors, such as `DataCollatorForLanguageModeling`.
            max_length: the context window; all columns of an example end there, after expansion.
            index: the column with the example's number; it is taken out.
            schedule: progress of the training in [0, 1] -> factor of p, such as `Anneal`.
            carried: columns with one value a token.
        """
        if max_length is not None and max_length < 1:
            raise LimitError("StochasTokCollator", "max_length", max_length, "at least 1")
        self.stochastok, self.base_collator = stochastok, base_collator
        self.max_length, self.index, self.schedule, self.carried = max_length, index, schedule, tuple(carried)
        # Shared memory, so that workers which hold a copy of this object see what the callback writes.
        self._state = torch.zeros(2, dtype=torch.float64).share_memory_()

    @property
    def epoch(self) -> int:
        """The epoch that examples are drawn for."""
        return int(self._state[0])

    @property
    def progress(self) -> float:
        """Which share of the training is done."""
        return float(self._state[1])

    def set_epoch(self, epoch: int) -> None:
        """Another epoch, another segmentation; for training loops without the callback."""
        self._state[0] = epoch

    def set_progress(self, progress: float) -> None:
        """Where the schedule stands, in [0, 1]."""
        self._state[1] = progress

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> Any:
        """Expand the examples and hand them to the base collator.

        Raises:
            LimitError: examples without "input_ids" or with different columns, and what `StochasTok` refuses.
        """
        if not features:
            return self.base_collator([])
        names = list(features[0])
        for number, feature in enumerate(features):
            if "input_ids" not in feature or list(feature) != names:
                limit = f"{', '.join(names)}, as the first example's, with input_ids"
                raise LimitError("StochasTokCollator", f"columns of example {number}", ", ".join(feature), limit)
        columns = {name: [f[name] for f in features] for name in names}
        if self.index in columns:
            indices = [int(i) for i in columns.pop(self.index)]
        else:
            indices = [_own_number(ids) for ids in columns["input_ids"]]
        how = self.stochastok
        if self.schedule is not None:
            how = how.scaled(self.schedule(self.progress))
        made = how.columns(columns, indices, epoch=self.epoch, carried=self.carried, max_length=self.max_length)
        return self.base_collator([{k: v[i] for k, v in made.items()} for i in range(len(features))])

    def callback(self) -> TrainerCallback:
        """What `Trainer` calls to tell the epoch and the progress."""
        from transformers import TrainerCallback

        collator = self

        class Tell(TrainerCallback):
            def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
                collator.set_epoch(round(state.epoch or 0))

            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
                collator.set_progress(state.global_step / max(state.max_steps, 1))

        return Tell()


def _own_number(ids: Any) -> int:
    """A number that the tokens themselves tell."""
    data = np.asarray(ids, dtype=np.int64).tobytes()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") >> 1
