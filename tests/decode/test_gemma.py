"""Token Recycling on real weights: the same tokens as plain generate, below and beyond the sliding window."""

from __future__ import annotations

import pytest
import torch

import tokenmill as tm
from tokenmill.decode import TokenRecycling
from tokenmill.models import CostProfile

PROFILE = CostProfile((1, 4, 8, 16, 32, 64), (47.0, 55.0, 65.0, 78.0, 120.0, 180.0))
PROMPTS = [("python-stdlib", 16), ("stdlib-json", 60), ("python-reference", 250), ("python-stdlib", 500)]
LONG = [("python-reference", 540), ("python-stdlib", 900)]


def prompt(tokenizer, corpus: str, length: int) -> torch.Tensor:
    for record in tm.corpora.load(corpus).split("test"):
        if len(record.text) > 8 * length:
            return tokenizer(record.text[: 8 * length], return_tensors="pt").input_ids[:, :length]
    raise AssertionError("no record is long enough")


def new_tokens(model, ids: torch.Tensor, **settings) -> list[int]:
    out = model.generate(ids, do_sample=False, max_new_tokens=24, **settings)
    return out[0, ids.shape[1] :].tolist()


@pytest.mark.prop("token-recycling", 1)
@pytest.mark.parametrize(("corpus", "length"), PROMPTS + LONG)
def test_greedy_is_plain_greedy(gemma, corpus: str, length: int) -> None:
    model, tokenizer = gemma
    ids = prompt(tokenizer, corpus, length)
    expected = new_tokens(model, ids)
    cold = TokenRecycling()
    assert new_tokens(model, ids, custom_generate=cold) == expected
    assert cold.trace.drafted > 0
    auto = TokenRecycling(tree="auto", draft="hybrid", warm_up_from_prompt=True, profile=PROFILE)
    assert new_tokens(model, ids, custom_generate=auto) == expected


@pytest.mark.prop("token-recycling", 1)
@pytest.mark.parametrize(("corpus", "length"), [PROMPTS[1], LONG[0]])
def test_greedy_is_plain_greedy_with_eager_attention(gemma, corpus: str, length: int) -> None:
    model, tokenizer = gemma
    ids = prompt(tokenizer, corpus, length)
    model.set_attn_implementation("eager")
    try:
        assert new_tokens(model, ids, custom_generate=TokenRecycling()) == new_tokens(model, ids)
    finally:
        model.set_attn_implementation("sdpa")
