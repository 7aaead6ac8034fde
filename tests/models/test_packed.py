from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from tokenmill import models
from tokenmill.errors import UnsupportedError
from tokenmill.models import _packed

KINDS = ("llama", "qwen2", "gemma3")
ROWS = [1, 2, 3, 4, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 100, 127, 128]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_rows_gives_what_the_stock_layer_gives(dtype: torch.dtype, bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(640, 1000, bias=bias, dtype=dtype)
    holder = nn.Sequential(layer)
    assert models.pack(holder) == 1
    with torch.no_grad():
        for rows in ROWS:
            x = torch.randn(1, rows, 640, generator=generator).to(dtype)
            got, expected = holder(x), layer(x)
            assert got.shape == expected.shape
            assert got.dtype == dtype
            if dtype is torch.bfloat16 and not bias:
                assert torch.equal(got, expected), rows
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_model_gives_the_same_logits_and_unpacks_to_the_same_layers(kind: str, dtype: torch.dtype) -> None:
    model = models.tiny(kind, dtype=dtype)
    before = dict(model.named_modules())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    ids = torch.randint(64, (1, 20), generator=torch.Generator().manual_seed(0))
    linears = sum(type(module) is nn.Linear for module in before.values())
    with torch.no_grad():
        expected = model(ids).logits
        with models.packed(model) as count:
            assert count == linears > 0
            assert models.is_packed(model)
            assert type(model.get_output_embeddings()) is models.PackedLinear
            got = model(ids).logits
            assert set(model.state_dict()) == set(state)
            assert all(torch.equal(model.state_dict()[name], state[name]) for name in state)
    assert torch.allclose(got.float(), expected.float(), rtol=0, atol=3e-5) or torch.equal(got, expected)
    after = dict(model.named_modules())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)


def test_a_tied_output_layer_stays_tied() -> None:
    model = models.tiny("gemma3")
    models.pack(model)
    output = model.get_output_embeddings()
    assert type(output) is models.PackedLinear
    assert output.weight is model.get_input_embeddings().weight
    assert len(list(model.parameters())) == len(list(models.tiny("gemma3").parameters()))


def test_packing_twice_is_packing_once_and_an_inner_block_leaves_the_outer_one_alone() -> None:
    model = models.tiny("llama")
    count = models.pack(model)
    assert count > 0
    assert models.pack(model) == 0
    with models.packed(model):
        pass
    assert models.is_packed(model)
    assert models.unpack(model) == count
    assert models.unpack(model) == 0


def test_an_error_inside_the_block_restores_the_model() -> None:
    model = models.tiny("llama")
    with pytest.raises(KeyError), models.packed(model):
        raise KeyError
    assert not models.is_packed(model)


def test_one_layer_in_two_places_stays_one_layer() -> None:
    layer = nn.Linear(8, 8)
    holder = nn.Sequential(layer, nn.ReLU(), layer)
    assert models.pack(holder) == 1
    assert holder[0] is holder[2]
    assert models.unpack(holder) == 1
    assert holder[0] is layer
    assert holder[2] is layer


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.weight.mul_(2),
        lambda layer: setattr(layer, "weight", nn.Parameter(torch.ones_like(layer.weight))),
        lambda layer: layer.load_state_dict({"weight": torch.zeros_like(layer.weight)}),
    ],
)
def test_changed_weights_are_packed_again(change: Callable[[nn.Module], object]) -> None:
    layer = nn.Linear(32, 16, bias=False)
    holder, x = nn.Sequential(layer), torch.randn(3, 32)
    models.pack(holder)
    with torch.no_grad():
        old = holder(x)
        change(holder[0])
        assert not torch.allclose(holder(x), old)
        torch.testing.assert_close(holder(x), layer(x))


def test_gradients_flow_as_through_the_stock_layer() -> None:
    layer = nn.Linear(32, 16)
    holder = nn.Sequential(layer)
    x = torch.randn(3, 32, requires_grad=True)
    layer(x).sum().backward()
    expected = layer.weight.grad
    layer.weight.grad = None
    models.pack(holder)
    holder(x).sum().backward()
    torch.testing.assert_close(holder[0].weight.grad, expected)


def test_hooks_of_either_layer_run() -> None:
    layer, seen = nn.Linear(8, 8), []
    layer.register_forward_hook(lambda *_: seen.append("before"))
    holder = nn.Sequential(layer)
    models.pack(holder)
    handle = holder[0].register_forward_hook(lambda *_: seen.append("packed"))
    holder(torch.zeros(1, 8))
    assert seen == ["before", "packed"]
    handle.remove()
    models.unpack(holder)
    holder(torch.zeros(1, 8))
    assert seen == ["before", "packed", "before"]


def test_layers_that_cannot_be_packed_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Special(nn.Linear):
        pass

    assert models.pack(nn.Sequential(nn.Linear(4, 4, dtype=torch.float64), Special(4, 4))) == 0
    monkeypatch.setattr(_packed, "works", lambda _: False)
    model = models.tiny("llama")
    assert models.pack(model) == 0
    assert not models.is_packed(model)


@pytest.mark.parametrize("broken", ["missing", "wrong"])
def test_the_operators_are_tried_before_they_are_used(monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    def missing(*_: object) -> torch.Tensor:
        raise AttributeError("no such operator")

    def wrong(x: torch.Tensor, weight: torch.Tensor, _: object) -> torch.Tensor:
        return x.new_zeros(x.shape[0], 48)

    monkeypatch.setattr(_packed, "_linear", missing if broken == "missing" else wrong)
    _packed.works.cache_clear()
    assert not _packed.works(torch.float32)
    _packed.works.cache_clear()


def test_what_would_break_a_packed_model_is_refused() -> None:
    model = models.tiny("llama")
    with models.packed(model):
        with pytest.raises(UnsupportedError, match="Unpack it first"):
            model.to(torch.bfloat16)  # pyright: ignore[reportArgumentType]
        with pytest.raises(UnsupportedError, match="Unpack it first"):
            copy.deepcopy(model)


def test_a_packed_model_is_saved_as_an_unpacked_one(tmp_path: Path) -> None:
    model = models.tiny("gemma3")
    with models.packed(model):
        model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())


def test_eval_mode_set_while_packed_stays() -> None:
    model = models.tiny("llama")
    with models.packed(model):
        model.train()
    assert all(module.training for module in model.modules())
