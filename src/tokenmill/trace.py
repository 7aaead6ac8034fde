"""What a run did, in counts: every method returns or yields a `Trace`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(slots=True)
class Trace:
    """Counts of one run. A method adds fields in a subclass of its own.

    Attributes:
        model_calls: forward passes of the (target) model, prefill included.
        positions: token positions that went through the model.
        tokens: tokens that were produced.
        accepted: drafted tokens that were accepted (never more than were drafted).
        checks: calls of a constraint.
        bytes_read: bytes of keys and values that attention read.
        flops: floating point operations by formula.
        tokens_so_far: ids produced so far; filled while the run goes on, so an error loses nothing.
    """

    model_calls: int = 0
    positions: int = 0
    tokens: int = 0
    accepted: int = 0
    checks: int = 0
    bytes_read: int = 0
    flops: float = 0.0
    tokens_so_far: list[int] = field(default_factory=list)

    def counts(self) -> dict[str, Any]:
        """The numbers of the trace as plain data, without the tokens."""
        return {k: v for k, v in asdict(self).items() if isinstance(v, int | float) and not isinstance(v, bool)}
