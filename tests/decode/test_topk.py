from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenmill.decode._topk import BLOCK, SMALL, top_tokens

WIDE = SMALL + 3 * BLOCK + 57  # two stages, and a last block that is not full


def assert_stable_sort(logits: torch.Tensor, k: int) -> None:
    values, tokens = top_tokens(logits, k)
    sorted_values, sorted_tokens = logits.sort(dim=1, descending=True, stable=True)
    assert torch.equal(values, sorted_values[:, :k])
    assert torch.equal(tokens, sorted_tokens[:, :k])
    assert torch.equal(tokens[:, 0], logits.argmax(1))


@given(
    st.sampled_from([5, BLOCK, SMALL, SMALL + 1, SMALL + BLOCK, WIDE]),
    st.integers(1, 16),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    st.integers(2, 10_000),
    st.integers(0, 1000),
)
def test_equals_a_stable_descending_sort(v: int, k: int, dtype: torch.dtype, distinct: int, seed: int) -> None:
    """``distinct`` values over the whole row: few of them mean ties within blocks and between blocks."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(0, distinct, (3, v), generator=generator).to(dtype)
    assert_stable_sort(logits, min(k, v))


def test_of_equal_logits_the_lowest_token_comes_first() -> None:
    logits = torch.zeros(1, WIDE)
    logits[0, [70, 71, 5 * BLOCK, WIDE - 1]] = 2.0
    assert top_tokens(logits, 6)[1].tolist() == [[70, 71, 5 * BLOCK, WIDE - 1, 0, 1]]


def test_the_end_of_the_last_block_is_not_padding_with_a_value() -> None:
    logits = torch.full((2, WIDE), -1e30)
    logits[:, -1] = 1.0
    values, tokens = top_tokens(logits, 4)
    assert tokens[:, 0].tolist() == [WIDE - 1] * 2
    assert bool((tokens < WIDE).all())
    assert torch.equal(values[:, 1:], torch.full((2, 3), -1e30))


def test_masked_rows_keep_the_order_of_a_sort() -> None:
    logits = torch.full((1, WIDE), -torch.inf)
    logits[0, 300] = 0.0
    values, tokens = top_tokens(logits, 3)
    assert tokens[0, 0] == 300
    assert values[0].tolist() == [0.0, -torch.inf, -torch.inf]
    assert bool((tokens < WIDE).all())


@pytest.mark.parametrize("v", [50, WIDE])
@pytest.mark.parametrize("at", [0, 17, -1])
def test_a_nan_shows_in_the_first_value_of_its_row_alone(v: int, at: int) -> None:
    logits = torch.randn(3, v, generator=torch.Generator().manual_seed(0))
    logits[1, at] = torch.nan
    values, _ = top_tokens(logits, 4)
    assert values[:, 0].isnan().tolist() == [False, True, False]
