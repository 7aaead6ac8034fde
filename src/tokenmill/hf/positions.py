"""Positions of new tokens: they follow the positions that were given, never the cache's length."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenmill.errors import LimitError

if TYPE_CHECKING:
    from torch import Tensor


def last_position(position_ids: Tensor) -> Tensor:
    """The position of the last token that a forward saw.

    Args:
        position_ids: (1, T), or (R, 1, T) for models with R rows of positions (mRoPE has 3, or 4 with the text row).

    Returns:
        (1, 1) or (R, 1, 1), int64. Pruned inputs have gaps, so this may exceed the number of cached tokens.

    Raises:
        LimitError: another rank.
    """
    if position_ids.dim() not in (2, 3):
        raise LimitError(
            "last_position", "position_ids.dim()", position_ids.dim(), "2 (B, T) or 3 (rows, B, T)", "See the model."
        )
    return position_ids[..., -1:]


def next_positions(last: Tensor, steps: Tensor) -> Tensor:
    """Positions of tokens that stand ``steps`` tokens behind the last one.

    Args:
        last: (1, 1) or (R, 1, 1), see `last_position`.
        steps: (N,) int64, 1 for the next token; tree nodes of equal depth share a position.

    Returns:
        (1, N) or (R, 1, N) in the dtype and on the device of ``last``.
    """
    return last + steps.to(device=last.device, dtype=last.dtype)
