"""Linear layers with prepacked weights: oneDNN's own layout, chosen once instead of at every call.

The operators are private to PyTorch, so they are tried on a small layer first; where they are missing or wrong, a
layer stays as it is.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenmill.errors import UnsupportedError

DTYPES = (torch.float32, torch.bfloat16)


class PackedLinear(nn.Linear):
    """A linear layer that reads a packed copy of its weight.

    It shares parameters, hooks and buffers with the layer that it stands for, so ``state_dict``, tied weights and
    hooks stay as they were. Weights that change in place are packed again; with gradients it computes as
    `torch.nn.Linear` does.
    """

    original: nn.Linear
    packed_weight: Tensor
    packed_from: tuple[int, int]

    def __init__(self, original: nn.Linear) -> None:
        # Not nn.Linear.__init__, which would draw new weights: both layers own the same dictionaries.
        self.__dict__ = {**original.__dict__}
        self.__dict__["original"] = original
        self._pack()

    def _pack(self) -> None:
        self.__dict__["packed_weight"] = _reorder(self.weight.detach())
        self.__dict__["packed_from"] = _identity(self.weight)

    def forward(self, input: Tensor) -> Tensor:
        """x (..., D in) -> (..., D out), as `torch.nn.Linear`."""
        needs_grad = torch.is_grad_enabled() and (input.requires_grad or self.weight.requires_grad)
        if needs_grad or input.dtype != self.weight.dtype:
            return F.linear(input, self.weight, self.bias)
        if self.packed_from != _identity(self.weight):
            self._pack()
        return _linear(input, self.packed_weight, self.bias)

    def _apply(self, *_: Any, **__: Any) -> Any:
        raise UnsupportedError("PackedLinear", "a packed model cannot change its dtype or device", "Unpack it first.")

    def __deepcopy__(self, _: dict[int, Any]) -> Any:
        raise UnsupportedError("PackedLinear", "a packed model cannot be copied", "Unpack it first.")

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, packed"


def pack(model: nn.Module) -> int:
    """Replace every `torch.nn.Linear` of a model on the CPU by a `PackedLinear`; returns how many were replaced.

    The packed copies come on top of the model's own weights, which stay for embeddings, gradients and saving. In
    bfloat16 the results are those of the stock layer, bit for bit; in float32 they differ in the last digits. Layers
    of other dtypes, other devices or subclasses are left alone. Packing takes effect where gradients are off.
    """
    made: dict[nn.Linear, PackedLinear] = {}  # a layer that stands in two places stays one layer
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children() would leave out the second place
            if type(child) is nn.Linear and _can_pack(child.weight):
                if child not in made:
                    made[child] = PackedLinear(child)
                setattr(parent, name, made[child])
    return len(made)


def unpack(model: nn.Module) -> int:
    """Put the very layers back that `pack` replaced; returns how many there were."""
    restored: set[nn.Linear] = set()
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if isinstance(child, PackedLinear):
                child.original.training = child.training
                setattr(parent, name, child.original)
                restored.add(child.original)
    return len(restored)


@contextmanager
def packed(model: nn.Module) -> Generator[int, None, None]:
    """Pack a model inside a ``with`` block; yields how many layers were packed.

    A model that was packed before stays packed afterwards.
    """
    already = is_packed(model)
    count = pack(model)
    try:
        yield count
    finally:
        if not already:
            unpack(model)


def is_packed(model: nn.Module) -> bool:
    """Whether any layer of the model is packed."""
    return any(isinstance(module, PackedLinear) for module in model.modules())


def _identity(weight: Tensor) -> tuple[int, int]:
    """Changes when the weight is written in place or points at other memory."""
    return weight.data_ptr(), 0 if weight.is_inference() else weight._version


def _can_pack(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype in DTYPES and weight.numel() > 0 and works(weight.dtype)


@cache
def works(dtype: torch.dtype) -> bool:
    """Whether the operators exist here and agree with the stock layer for few and for many rows."""
    if not torch.backends.mkldnn.is_available():
        return False
    try:
        generator = torch.Generator().manual_seed(0)
        weight, rows = (torch.randn(size, 64, generator=generator).to(dtype) for size in (48, 33))
        for count in (1, 2, 17, 33):
            got, expected = _linear(rows[:count], _reorder(weight), None), F.linear(rows[:count], weight)
            if not torch.allclose(got.float(), expected.float(), rtol=1e-2, atol=1e-2):
                return False
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    return True


def _reorder(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight)


def _linear(x: Tensor, packed_weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, packed_weight, bias, "none", [], "")
