"""Shares of visual tokens over the decoder's layers, and the one that brings their mean to a budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tokenmill.errors import LimitError


@dataclass(frozen=True, slots=True)
class LayerSchedule:
    """Layers inside the decoder that prune, and the share of what is left that each keeps."""

    layers: tuple[int, ...] = (9, 18)
    ratios: tuple[float, ...] = (1.0, 1.0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        object.__setattr__(self, "ratios", tuple(self.ratios))
        if len(self.layers) != len(self.ratios):
            raise LimitError("LayerSchedule", "ratios", self.ratios, f"{len(self.layers)} shares, one a layer")
        for before, layer in zip((0, *self.layers), self.layers, strict=False):
            if layer <= before:
                raise LimitError("LayerSchedule", "layers", self.layers, "strictly ascending from 1")
        for ratio in self.ratios:
            if not 0 < ratio <= 1:
                raise LimitError("LayerSchedule", "ratios", self.ratios, "shares in (0, 1]")


def average_ratio(r0: float, ratios: Sequence[float], layers: Sequence[int], num_layers: int) -> float:
    """Share of visual tokens in the mean over layers (the budget, step 6)."""
    total, share, before = 0.0, r0, 0
    for layer, ratio in zip(layers, ratios, strict=True):
        total += share * (layer - before)
        share *= ratio
        before = layer
    return (total + share * (num_layers - before)) / num_layers


def solve_last_ratio(rho: float, r0: float, r1: float, layers: Sequence[int], num_layers: int) -> float:
    """The second layer's share r2 that brings the mean to ``rho``, at most 1.

    Raises:
        LimitError: the layers before it hold more than the budget already; the message holds the equation.
    """
    l1, l2 = layers
    left = num_layers * rho - r0 * l1 - r0 * r1 * (l2 - l1)
    r2 = left / (num_layers - l2) / (r0 * r1)
    if r2 <= 0:
        spent = f"{r0:g} * {l1} + {r0 * r1:g} * {l2 - l1} = {r0 * l1 + r0 * r1 * (l2 - l1):g}"
        raise LimitError(
            "solve_last_ratio", "rho", rho, f"above {spent} over {num_layers} layers", "Lower r0 or r1, or raise rho."
        )
    return min(1.0, r2)
