from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tokenmill.errors import LimitError
from tokenmill.text import ByteTrie

letters = st.sampled_from([0, 97, 98, 254, 255])
words = st.one_of(st.none(), st.lists(letters, max_size=5).map(bytes))
vocabularies = st.lists(words, max_size=30)


def weights_for(size: int, seed: int = 0) -> Tensor:
    return torch.rand(size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def below(tokens: list[bytes | None], prefix: bytes) -> list[int]:
    """The slow twin: ids of the tokens that start with a prefix, by bytes, ties by id."""
    return sorted((i for i, t in enumerate(tokens) if t and t.startswith(prefix)), key=lambda i: (tokens[i], i))


@given(vocabularies)
def test_the_order_is_by_bytes_then_id(tokens: list[bytes | None]) -> None:
    trie = ByteTrie(tokens)
    assert trie.order.tolist() == below(tokens, b"")
    assert len(trie) == len(trie.order)
    for at, i in enumerate(trie.order.tolist()):
        assert bytes(trie.bytes[trie.offsets[at] : trie.offsets[at + 1]].tolist()) == tokens[i]


@given(vocabularies, st.lists(letters, max_size=4).map(bytes))
def test_a_prefix_is_a_range(tokens: list[bytes | None], prefix: bytes) -> None:
    trie = ByteTrie(tokens)
    low, high = trie.range(prefix)
    assert trie.order[low:high].tolist() == below(tokens, prefix)
    for depth in range(len(prefix) + 1):
        outer = trie.range(prefix[:depth])
        for byte in prefix[depth : depth + 1]:
            narrowed = trie.narrow(*outer, depth, byte)
            inner = trie.range(prefix[: depth + 1])
            assert trie.order[slice(*narrowed)].tolist() == trie.order[slice(*inner)].tolist()


@given(vocabularies, st.lists(letters, max_size=2).map(bytes))
def test_next_bytes_weigh_what_their_tokens_weigh(tokens: list[bytes | None], prefix: bytes) -> None:
    trie = ByteTrie(tokens)
    low, high = trie.range(prefix)
    by_id = weights_for(len(tokens))
    weights = by_id[trie.order[low:high]]
    expected = torch.zeros(257, dtype=torch.float64)
    slots = []
    for i in below(tokens, prefix):
        token = tokens[i]
        assert token is not None
        slots.append(token[len(prefix)] if len(token) > len(prefix) else 256)
        expected[slots[-1]] += by_id[i]
    assert trie.byte_at(low, high, len(prefix)).tolist() == slots
    assert torch.allclose(trie.next_byte_sums(weights, low, high, len(prefix)), expected, rtol=0, atol=1e-12)


@given(vocabularies)
def test_every_node_holds_what_is_below_it(tokens: list[bytes | None]) -> None:
    trie = ByteTrie(tokens)
    weights = torch.stack([weights_for(len(tokens), 1), weights_for(len(tokens), 2)])
    sums = trie.subtree_sums(weights)
    prefixes = {t[:d] for t in tokens if t for d in range(len(t) + 1)} | {b""}
    assert sums.shape == (2, len(prefixes))
    spelled = {0: b""}
    for node in range(1, len(prefixes)):
        parent = int(trie.parent[node])
        assert parent < node
        spelled[node] = spelled[parent] + bytes([int(trie.byte[node])])
    assert set(spelled.values()) == prefixes
    for node, prefix in spelled.items():
        ids = below(tokens, prefix)
        assert torch.allclose(sums[:, node], weights[:, ids].sum(1), rtol=0, atol=1e-12)
        assert int(trie.depth[node]) == len(prefix)
        assert trie.order[int(trie.lo[node]) : int(trie.hi[node])].tolist() == ids
    assert [spelled[int(node)] for node in trie.nodes.ends] == [tokens[int(i)] for i in trie.order]


def test_a_tiny_mass_beside_a_large_one_is_kept() -> None:
    """A difference of running totals would give 0 here."""
    trie = ByteTrie([b"a", b"b", b"ba", b"c"])
    weights = torch.tensor([1.0, 1e-200, 1e-220, 1.0], dtype=torch.float64)
    sums = trie.subtree_sums(weights)
    node = next(n for n in range(len(sums)) if int(trie.depth[n]) == 2)
    assert float(sums[node]) == 1e-220
    assert float(sums[int(trie.parent[node])]) == 1e-200 + 1e-220
    assert float(trie.next_byte_sums(weights[trie.order], 0, 4, 0)[ord("b")]) == 1e-200 + 1e-220


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_sums_keep_the_dtype_and_what_is_small_in_it(dtype: torch.dtype) -> None:
    trie = ByteTrie([bytes([97, i % 250, i // 250]) for i in range(4000)])
    weights = torch.full((4000,), 1 / 4096, dtype=dtype)
    for sums in (trie.subtree_sums(weights)[0], trie.next_byte_sums(weights, 0, 4000, 0)[97]):
        assert sums.dtype == dtype
        assert float(sums) == pytest.approx(4000 / 4096, rel=5e-3)


def test_gradients_pass_through_the_sums() -> None:
    trie = ByteTrie([b"a", b"ab", b"b"])
    weights = weights_for(3).requires_grad_()
    trie.subtree_sums(weights).sum().backward()
    assert weights.grad is not None
    assert weights.grad.tolist() == [2.0, 3.0, 2.0]  # the nodes above each token, the root included


def test_weights_of_another_vocabulary_are_refused() -> None:
    trie = ByteTrie([b"a", b"ab", None])
    with pytest.raises(LimitError, match=r"weights\.shape = \(2,\).*V=3"):
        trie.subtree_sums(torch.ones(2))
    with pytest.raises(LimitError, match=r"weights\.shape = \(3,\).*\(2,\)"):
        trie.next_byte_sums(torch.ones(3), 0, 2, 0)


def test_a_vocabulary_without_bytes_is_one_empty_root() -> None:
    trie = ByteTrie([None, b""])
    assert trie.range(b"") == (0, 0)
    assert trie.subtree_sums(torch.ones(2)).tolist() == [0.0]
    assert trie.next_byte_sums(torch.ones(0), 0, 0, 0).sum() == 0
