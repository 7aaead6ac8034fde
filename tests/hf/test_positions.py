from __future__ import annotations

import pytest
import torch

from tokenmill import hf
from tokenmill.errors import LimitError

STEPS = torch.tensor([1, 2, 2, 3])


def test_new_tokens_stand_behind_the_last_given_position() -> None:
    """Pruned inputs leave gaps: the cache's length says nothing about the next position."""
    last = hf.last_position(torch.tensor([[0, 3, 11]]))
    assert last.tolist() == [[11]]
    assert hf.next_positions(last, STEPS).tolist() == [[12, 13, 13, 14]]


@pytest.mark.parametrize("rows", [3, 4])
def test_models_with_rows_of_positions_go_on_in_every_row(rows: int) -> None:
    positions = torch.arange(rows * 5).view(rows, 1, 5)
    last = hf.last_position(positions)
    assert last.shape == (rows, 1, 1)
    following = hf.next_positions(last, STEPS)
    assert following.shape == (rows, 1, 4)
    for row in range(rows):
        assert following[row, 0].tolist() == [row * 5 + 4 + step for step in (1, 2, 2, 3)]


def test_the_dtype_is_that_of_the_given_positions() -> None:
    last = hf.last_position(torch.tensor([[5]], dtype=torch.int32))
    assert hf.next_positions(last, STEPS).dtype == torch.int32


@pytest.mark.parametrize("shape", [(4,), (1, 3, 1, 4)])
def test_other_ranks_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(LimitError, match=rf"position_ids\.dim\(\) = {len(shape)}"):
        hf.last_position(torch.zeros(shape, dtype=torch.long))
