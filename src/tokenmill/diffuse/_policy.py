"""What a cache policy is: it says which places a pass feeds and which ones attention reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from tokenmill.diffuse._canvas import Canvas


@dataclass(slots=True)
class Plan:
    """The places of one pass.

    Attributes:
        compute: (B, S) bool, places that are fed; their keys and values are written.
        read: (B, S) bool, places that attention reads; it takes in ``compute``.
        allow: (B, S) bool, places that may be revealed, as far as the policy is concerned; ``None`` for all that are
            predicted.
        refresh: (B,) bool, the rows for which this pass renews the cache.
        frozen: (B,) int64, places below it keep their keys and values for good; feeding one is an error.
    """

    compute: Tensor
    read: Tensor
    refresh: Tensor
    allow: Tensor | None = None
    frozen: Tensor | None = None


class PolicyRun(Protocol):
    """A policy at work on one batch; a policy without state is its own run."""

    def plan(self, canvas: Canvas, /) -> Plan: ...

    def saw(self, canvas: Canvas, plan: Plan, /) -> None: ...

    def select(self, index: Tensor, /) -> None: ...


class KVPolicy:
    """Base of cache policies: frozen dataclasses that say what a pass feeds and reads.

    A policy without state has `plan`; one with state has `begin`, which makes its `PolicyRun` for a batch.
    """

    caches: bool = True
    """Keys and values are kept from pass to pass."""

    def begin(self, canvas: Canvas) -> PolicyRun:  # noqa: ARG002 - for those with state
        """The policy at work on the rows of ``canvas``, before the first pass."""
        return self

    def plan(self, canvas: Canvas) -> Plan:
        """The places of the next pass."""
        raise NotImplementedError(f"{type(self).__name__} has neither plan() nor begin()")

    def saw(self, canvas: Canvas, plan: Plan) -> None:
        """Called after a pass was revealed: ``canvas`` holds the new tokens, ``canvas.revealed`` which they are."""

    def select(self, index: Tensor) -> None:
        """Keep the state of the rows ``index`` (R,); called when rows are finished."""


def every(canvas: Canvas, times: int | None) -> Tensor:
    """(B,) bool: the rows at a block's first pass, and at every ``times``-th one behind it."""
    if times is None:
        return canvas.block_passes == 0
    return canvas.block_passes % times == 0
