from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GlmConfig, GlmForCausalLM, LlamaConfig, LlamaForCausalLM

import tokenmill.models as models
from tokenmill import hf
from tokenmill.errors import UnsupportedError

TINY: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


def yarn() -> Any:
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 100.0}
    return LlamaForCausalLM(LlamaConfig(**TINY, rope_parameters=rope))


def partial() -> Any:
    """Half of each head is rotated, in pairs of neighbours."""
    make: Any = GlmConfig  # which takes more than its signature says
    return GlmForCausalLM(make(**TINY, head_dim=8, partial_rotary_factor=0.5))


def spy(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, *, call: hf.Call, **kw: Any) -> Any:
    call.state.append((call, key))
    return call.inner(module, query, key, value, mask, **kw)


@pytest.mark.parametrize("make", [lambda: models.tiny("llama"), lambda: models.tiny("gemma3"), yarn, partial])
def test_the_cached_keys_are_what_the_rotation_says(make: Any) -> None:
    """Keys of a token that is repeated are one vector in the first layer, once they are turned back."""
    model = make().eval()
    hf.register("test-rotary-spy", spy)
    ids, positions = torch.full((2, 20), 7), torch.arange(20)[None] * 3
    with hf.attached(model, "test-rotary-spy", layers=[0], state=[]) as seen, torch.no_grad():
        model(input_ids=ids, position_ids=positions)
    call, key = seen[0]
    turn = hf.layer_rotary("test", model, 0)
    phases = turn.phases(positions)
    for ours, theirs in zip(phases, call.position_embeddings, strict=True):
        torch.testing.assert_close(ours, theirs)
    plain = turn.unrotate(key, phases)
    torch.testing.assert_close(plain, plain[:, :, :1].expand_as(plain), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(turn.rotate(plain, phases), key, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("make", [lambda: models.tiny("qwen2"), yarn, partial])
def test_dot_products_depend_on_the_distance_alone(make: Any) -> None:
    turn = hf.layer_rotary("test", make(), 0)
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 2, 1, 8, generator=generator)
    found = []
    for shift in (0, 5, 31):
        at = torch.tensor([[9 + shift]]), torch.tensor([[2 + shift]])
        found.append((turn.rotate(query, turn.phases(at[0])) * turn.rotate(key, turn.phases(at[1]))).sum(-1))
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[2], found[0], atol=1e-5, rtol=1e-5)


def test_the_dtype_is_kept_and_the_sum_is_not_rounded() -> None:
    turn = hf.layer_rotary("test", models.tiny("llama"), 0)
    x = torch.randn(1, 4, 30, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
    phases = turn.phases(torch.arange(30)[None])
    back = turn.unrotate(turn.rotate(x, phases), phases)
    assert back.dtype == torch.bfloat16
    torch.testing.assert_close(back, x, atol=0.03, rtol=0.03)


def test_positions_that_are_not_rotary_are_refused() -> None:
    model = models.tiny("llama")
    del model.model.rotary_emb
    with pytest.raises(UnsupportedError, match="no rotary positions"):
        hf.layer_rotary("test", model, 0)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("make", [lambda: models.tiny("llama"), lambda: models.tiny("gemma3"), yarn, partial])
def test_phases_that_are_looked_up_are_those_that_are_computed(make: Any) -> None:
    turn = hf.layer_rotary("test", make(), 0)
    positions = torch.tensor([[0, 3, 3, 19], [7, 1, 0, 2]])
    with torch.inference_mode():
        first = turn.phases_below(positions, 20)
    # The table grows with the bound, and what was made in inference mode serves a backward pass.
    for bound in (20, 60):
        for ours, theirs in zip(
            turn.phases_below(positions + bound - 20, bound), turn.phases(positions + bound - 20), strict=True
        ):
            torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(first, turn.phases(positions))
    x = torch.randn(2, 1, 4, turn.phases(positions)[0].shape[-1] * (2 if make is partial else 1), requires_grad=True)
    turn.rotate(x, turn.phases_below(positions, 20)).sum().backward()
    assert x.grad is not None
