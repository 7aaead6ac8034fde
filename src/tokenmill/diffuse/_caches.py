"""Cache policies that other work introduced: none, prefix, dual, delayed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenmill.diffuse._canvas import Canvas
from tokenmill.diffuse._policy import KVPolicy, Plan, every
from tokenmill.errors import LimitError


@dataclass(frozen=True)
class NoCache(KVPolicy):
    """Every pass feeds the whole sequence; exact, and the only policy for encoders."""

    caches = False

    def plan(self, canvas: Canvas) -> Plan:
        """All real places."""
        return Plan(canvas.real, canvas.real, torch.ones_like(canvas.refreshed))


@dataclass(frozen=True, kw_only=True)
class PrefixCache(KVPolicy):
    """Keys and values left of the current block are kept; the block and everything behind it is fed (Fast-dLLM).

    Attributes:
        refresh: passes from one full pass to the next inside a block; None renews at a block's first pass only.
    """

    refresh: int | None = None

    def __post_init__(self) -> None:
        check_refresh("PrefixCache", self.refresh)

    def plan(self, canvas: Canvas) -> Plan:
        """Everything at a block's first pass, then the places from the block's start on."""
        behind = canvas.places >= canvas.start[:, None]
        return _partial(canvas, every(canvas, self.refresh), behind)


@dataclass(frozen=True, kw_only=True)
class DualCache(KVPolicy):
    """Only the current block is fed; keys and values on both sides of it are kept (Fast-dLLM).

    Attributes:
        refresh: passes from one full pass to the next inside a block; None renews at a block's first pass only.
    """

    refresh: int | None = None

    def __post_init__(self) -> None:
        check_refresh("DualCache", self.refresh)

    def plan(self, canvas: Canvas) -> Plan:
        """Everything at a block's first pass, then the block."""
        return _partial(canvas, every(canvas, self.refresh), canvas.in_block)


@dataclass(frozen=True, kw_only=True)
class DelayedCache(KVPolicy):
    """Masks are fed, and a token once more after it was revealed; then its keys and values are kept (dKV-Cache).

    Attributes:
        refresh: passes from one full pass to the next.
        keep_prompt: the prompt is fed once, and left out of later refreshes (the authors' Prefill variant).
    """

    refresh: int = 8
    keep_prompt: bool = False

    def __post_init__(self) -> None:
        check_refresh("DelayedCache", self.refresh)

    def plan(self, canvas: Canvas) -> Plan:
        """Everything at each refresh; otherwise masks and what the last pass revealed."""
        refresh = canvas.passes % self.refresh == 0
        full = canvas.real
        if self.keep_prompt:
            answer = canvas.places >= canvas.prompt
            full = full & (answer | canvas.masked | (canvas.passes == 0)[:, None])
        few = canvas.masked | canvas.revealed
        few = (few | canvas.sources(canvas.masked)) & canvas.real
        full = full | few
        return Plan(torch.where(refresh[:, None], full, few), canvas.real, refresh)


def _partial(canvas: Canvas, refresh: Tensor, few: Tensor) -> Plan:
    """Everything in rows that refresh, ``few`` (B, S) and what its predictions are read at in the others."""
    few = (few & canvas.real) | canvas.sources(few)
    return Plan(torch.where(refresh[:, None], canvas.real, few), canvas.real, refresh)


def check_refresh(where: str, refresh: int | None) -> None:
    """Refuse a refresh that is not a count."""
    if refresh is not None and (isinstance(refresh, bool) or refresh < 1):
        raise LimitError(where, "refresh", refresh, "at least 1 pass")
