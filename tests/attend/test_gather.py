from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenmill.attend import sparse_attend, top_indices
from tokenmill.attend._gather import heads, take
from tokenmill.errors import LimitError


@given(st.integers(1, 30), st.integers(1, 4), st.data())
def test_the_highest_win_and_ties_go_to_the_lower_index(n: int, levels: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, n))
    values = data.draw(st.lists(st.integers(-levels, levels), min_size=2 * n, max_size=2 * n))
    score = torch.tensor(values).view(2, n).float()
    score[score == -levels] = -torch.inf
    found = top_indices(score, k)
    for row, values in zip(found.tolist(), score.tolist(), strict=True):
        order = sorted(range(n), key=lambda i, values=values: (-values[i], i))
        assert row == sorted(order[:k])


def test_bad_counts() -> None:
    for k in (-1, 6, True):
        with pytest.raises(LimitError, match="S=5"):
            top_indices(torch.zeros(2, 5), k)


def test_rows_are_taken_for_all_heads_or_for_each() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, 2, 9, 3, generator=generator)
    shared = torch.tensor([[0, 4, 8], [1, 1, 2]])
    assert torch.equal(take(rows, shared), torch.stack([rows[b][:, shared[b]] for b in range(2)]))
    each = torch.randint(0, 9, (2, 6, 4), generator=generator)
    wide = heads(rows, 6)
    assert torch.equal(wide, rows.repeat_interleave(3, 1))
    want = torch.stack([torch.stack([wide[b, h, each[b, h]] for h in range(6)]) for b in range(2)])
    assert torch.equal(take(rows, each), want)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("each_head", [False, True])
def test_indices_and_masks_say_the_same(each_head: bool, softcap: float | None) -> None:
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(2, 6, 4, 8, generator=generator)
    key, value = (torch.randn(2, 2, 20, d, generator=generator) for d in (8, 5))
    shape = (2, 6, 20) if each_head else (2, 20)
    index = torch.rand(shape, generator=generator).argsort(-1)[..., :7]
    causal = torch.ones(4, 20, dtype=torch.bool).tril(16)
    chosen = torch.zeros(shape, dtype=torch.bool).scatter(-1, index, True)
    chosen = chosen[:, :, None] if each_head else chosen[:, None, None]
    inside = causal.expand(2, 6, -1, -1).gather(
        -1, (index if each_head else index[:, None].expand(-1, 6, -1))[:, :, None].expand(-1, -1, 4, -1)
    )
    gathered = sparse_attend(query, key, value, scaling=0.3, index=index, seen=inside, softcap=softcap)
    masked = sparse_attend(query, key, value, scaling=0.3, seen=chosen & causal, softcap=softcap)
    assert gathered.shape == (2, 6, 4, 5)
    torch.testing.assert_close(gathered, masked, atol=1e-5, rtol=1e-5)


def test_dense_attention_is_that_of_torch() -> None:
    generator = torch.Generator().manual_seed(2)
    query = torch.randn(2, 6, 4, 8, generator=generator)
    key, value = torch.randn(2, 2, 2, 20, 8, generator=generator)
    want = torch.nn.functional.scaled_dot_product_attention(query, heads(key, 6), heads(value, 6), scale=0.3)
    torch.testing.assert_close(sparse_attend(query, key, value, scaling=0.3), want, atol=1e-5, rtol=1e-5)


def test_a_query_that_sees_nothing_gets_nothing() -> None:
    query, key = torch.ones(1, 2, 1, 4), torch.ones(1, 1, 3, 4)
    seen = torch.zeros(1, 1, 1, 3, dtype=torch.bool)
    assert torch.equal(sparse_attend(query, key, key, scaling=1.0, seen=seen), torch.zeros(1, 2, 1, 4))
