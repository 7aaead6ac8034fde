"""How much of dense attention's probability lies on the keys that a method reads in decoding."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokenmill.attend._gather import grouped
from tokenmill.attend._session import Answer, Reading, SparseAttention

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(slots=True, eq=False)
class MassMeter(SparseAttention):
    """A method with a meter: the same outputs, and the share of the dense probability that was read, for each step.

    Each value carries a one-hot row that names its slot, so that a method's output tells which slots it read, whatever
    the method. Counts of bytes are not those of the method; take them from a run without the meter.

    Attributes:
        method: what is measured.
        masses: one number for each step of decoding and layer: the mean over rows and heads, in [0, 1].
    """

    method: SparseAttention
    masses: list[float] = field(default_factory=list)

    @property
    def needs_rotary(self) -> bool:  # type: ignore[override]
        """As the method."""
        return self.method.needs_rotary

    def check(self, model: PreTrainedModel) -> tuple[int, ...]:
        """As the method."""
        return self.method.check(model)

    def read(self, reading: Reading) -> Answer:
        """See `SparseAttention.read`."""
        if reading.queries > 1:
            return self.method.read(reading)
        value = reading.value
        slots = torch.eye(reading.size, dtype=value.dtype, device=value.device)
        named = torch.cat([value, slots.expand(*value.shape[:2], -1, -1)], -1)
        out, _ = self.method.read(replace(reading, value=named))  # (B, 1, H, d_v + S)
        chosen = out[:, 0, :, value.shape[3] :] > 0  # (B, H, S)
        self.masses.append(float((dense_weights(reading) * chosen).sum(-1).mean()))
        return out[..., : value.shape[3]].contiguous(), None


def dense_weights(reading: Reading) -> Tensor:
    """(B, H, S) float32: what dense attention of a single query would give to each slot, in the original positions."""
    logits = grouped(reading.query, reading.key) * reading.scaling
    softcap = reading.options.get("softcap")
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    seen = reading.seen(0, 1, reading.size)
    return logits.masked_fill(~seen, -torch.inf).softmax(-1)[:, :, 0]
