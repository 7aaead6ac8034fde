"""What trainings leave on disk: the state of one that was interrupted, and small networks with their settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tokenmill.errors import LimitError


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


def save_network(folder: Path, name: str, network: nn.Module, settings: dict[str, Any]) -> None:
    """Write ``name.safetensors`` and ``name.json`` into a folder, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    half = folder / f"{name}.safetensors.tmp"
    save_file({key: tensor.contiguous() for key, tensor in network.state_dict().items()}, half)
    half.replace(folder / f"{name}.safetensors")
    half = folder / f"{name}.json.tmp"
    half.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    half.replace(folder / f"{name}.json")


def load_network(where: str, folder: str | Path, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and weights that `save_network` wrote.

    Raises:
        LimitError: they are not in the folder.
    """
    folder = Path(folder)
    if not (folder / f"{name}.json").is_file():
        raise LimitError(where, "folder", str(folder), f"a folder with a saved {name}")
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8")), load_file(folder / f"{name}.safetensors")
