from __future__ import annotations

import pytest
import torch

from tokenmill.errors import LimitError
from tokenmill.models import tiny

KINDS = ("llama", "qwen2", "gemma3")


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_decides_the_weights_and_nothing_else_does(kind: str) -> None:
    torch.manual_seed(1)
    first = tiny(kind, seed=3).state_dict()
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    second, other = tiny(kind, seed=3).state_dict(), tiny(kind, seed=4).state_dict()
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert any(not torch.equal(first[k], other[k]) for k in first)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_greedy_output_wanders(kind: str, seed: int) -> None:
    model = tiny(kind, seed=seed)
    prompt = torch.randint(64, (1, 8), generator=torch.Generator().manual_seed(seed))
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=40, do_sample=False)
    assert out.shape == (1, 48)
    assert out[0, 8:].unique().numel() >= 6


def test_shapes_are_those_the_kinds_promise() -> None:
    llama, qwen2, gemma3 = (tiny(kind).config for kind in KINDS)
    assert (llama.num_attention_heads, llama.num_key_value_heads, llama.num_hidden_layers) == (4, 4, 2)
    assert (qwen2.num_attention_heads, qwen2.num_key_value_heads, qwen2.num_hidden_layers) == (4, 2, 2)
    assert (gemma3.num_key_value_heads, gemma3.num_hidden_layers, gemma3.sliding_window) == (1, 6, 16)
    assert set(gemma3.layer_types) == {"sliding_attention", "full_attention"}
    assert set(tiny("gemma3", layers=2).config.layer_types) == {"sliding_attention", "full_attention"}


def test_dtype_and_attention_are_what_was_asked_for() -> None:
    model = tiny("qwen2", dtype=torch.bfloat16, attn="eager", vocab=7)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config._attn_implementation == "eager"
    assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 7)


@pytest.mark.parametrize(
    ("given", "words"), [({"kind": "lama"}, "llama"), ({"vocab": 1}, "vocab = 1"), ({"layers": 0}, "layers = 0")]
)
def test_bad_arguments_are_refused_by_name(given: dict[str, object], words: str) -> None:
    with pytest.raises(LimitError, match=words):
        tiny(**{"kind": "llama", **given})  # pyright: ignore[reportArgumentType]
