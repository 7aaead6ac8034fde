"""The state of a training that was interrupted: weights, optimiser and what was counted, in one safetensors file."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


def save_state(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, *, seconds: float, step: int) -> None:
    """Write everything that going on needs, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Copies, since the file format refuses tied weights.
    found = {f"net.{name}": tensor.clone() for name, tensor in model.state_dict().items()}
    for number, values in optimizer.state_dict()["state"].items():
        found |= {f"optimizer.{number}.{name}": tensor for name, tensor in values.items()}
    half = path.with_suffix(".tmp")
    save_file(found, half, metadata={"seconds": str(seconds), "step": str(step)})
    half.replace(path)


def load_state(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[float, int]:
    """Seconds and steps that were done; model and optimiser go on from there."""
    tensors = load_file(path)
    model.load_state_dict({name[4:]: tensor for name, tensor in tensors.items() if name.startswith("net.")})
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, number, part = name.split(".")
            state.setdefault(int(number), {})[part] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    with safe_open(path, "pt") as file:
        about = file.metadata()
    return float(about["seconds"]), int(about["step"])
