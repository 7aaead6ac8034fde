"""A training goes on where it was stopped."""

from __future__ import annotations

from pathlib import Path

import torch

from tokenmill.models._state import load_state, save_state


def stepped(seed: int, steps: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    go_on(model, optimizer, steps)
    return model, optimizer


def go_on(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        model(torch.arange(3.0) + step).square().sum().backward()
        optimizer.step()


def test_a_training_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    model, optimizer = stepped(0, 4)
    path = tmp_path / "deep" / "state.safetensors"
    save_state(path, model, optimizer, seconds=12.5, step=4)
    again, other = stepped(1, 1)
    assert load_state(path, again, other) == (12.5, 4)
    for one, own in ((model, optimizer), (again, other)):
        go_on(one, own, 3)
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert [p.name for p in path.parent.iterdir()] == ["state.safetensors"]
