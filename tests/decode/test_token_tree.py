"""Contexts that share a cache give the logits of contexts that stand alone."""

from __future__ import annotations

import gc
import random
from typing import Any

import pytest
import torch

from tokenmill.decode._token_tree import Node, TokenTree
from tokenmill.errors import LimitError, UnsupportedError
from tokenmill.models import tiny
from tokenmill.trace import Trace


def alone(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -1]


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3"])
def test_every_branch_equals_a_forward_of_its_own(kind: str, attn: str) -> None:
    model, rng = tiny(kind, seed=2, attn=attn), random.Random(4)
    prompt = [rng.randrange(1, 64) for _ in range(21)]
    trace = Trace()
    tree = TokenTree("test", model, trace)
    tip, logits = tree.prefill(prompt)
    torch.testing.assert_close(logits, alone(model, prompt), rtol=1e-4, atol=1e-4)
    held: list[tuple[Node, list[int]]] = [(tip, prompt)]
    for _ in range(25):  # beyond the window of 16, from anywhere in the tree
        chosen = rng.choices(held[-6:] + held[:2], k=2)
        tokens = [rng.randrange(1, 64) for _ in range(4)]
        # Two contexts, one of them grown by a chain of two, one by two children.
        made, rows = tree.extend([chosen[0][0], 0, chosen[1][0], chosen[1][0]], tokens)
        texts = [[*chosen[0][1], tokens[0]], [*chosen[0][1], *tokens[:2]]]
        texts += [[*chosen[1][1], tokens[2]], [*chosen[1][1], tokens[3]]]
        for text, row in zip(texts, rows, strict=True):
            torch.testing.assert_close(row, alone(model, text), rtol=1e-4, atol=1e-4)
        held += list(zip(made, texts, strict=True))
    assert trace.model_calls == 26
    assert trace.positions == 21 + 100


def test_rows_of_forgotten_contexts_are_used_again() -> None:
    model = tiny("gemma3", seed=1)
    tree = TokenTree("test", model, Trace())
    tip, _ = tree.prefill([1, 2, 3])
    text = [1, 2, 3]
    for step in range(40):
        (kept, lost), rows = tree.extend([tip, tip], [step + 4, 60])
        text.append(step + 4)
        torch.testing.assert_close(rows[0], alone(model, text), rtol=1e-4, atol=1e-4)
        tip = kept
        del kept, lost, rows
        gc.collect()
    assert tree.rows <= 3 + 40 + 2


def test_a_long_prompt_is_read_in_parts() -> None:
    model = tiny("llama", seed=1)
    model.config.max_position_embeddings = 4096
    ids = torch.randint(1, 64, (1100,), generator=torch.Generator().manual_seed(0)).tolist()
    trace = Trace()
    _, logits = TokenTree("test", model, trace).prefill(ids)
    assert trace.model_calls == 3
    torch.testing.assert_close(logits, alone(model, ids), rtol=1e-3, atol=1e-3)


def test_refusals() -> None:
    model = tiny("llama")
    with pytest.raises(LimitError, match="prompt length = 0"):
        TokenTree("test", model, Trace()).prefill([])
    with pytest.raises(LimitError, match="at most 512"):
        TokenTree("test", model, Trace()).prefill([1] * 513)
    tree = TokenTree("test", model, Trace())
    tip, _ = tree.prefill([1] * 512)
    with pytest.raises(LimitError, match="at most 512"):
        tree.extend([tip], [1])
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UnsupportedError, match="flash"):
        TokenTree("test", model, Trace())
