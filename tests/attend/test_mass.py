"""The share of the dense probability that a method reads, measured beside the method."""

from __future__ import annotations

import pytest
import torch

from tokenmill.attend import SparseAttention
from tokenmill.attend._mass import MassMeter

from .methods import IDS, KINDS, PADDING, cases, full, model, steps

# HISA on ordinary attention is put in by a method of its own.
METERED = [name for name, method in cases().items() if isinstance(method, SparseAttention)]


@pytest.mark.parametrize("name", METERED)
@pytest.mark.parametrize("kind", KINDS)
def test_the_meter_changes_no_output_and_measures_every_step(kind: str, name: str) -> None:
    tiny, method = model(kind), cases()[name]
    with method.attach(tiny) as plain:
        want = steps(tiny, IDS, PADDING, 30)
    meter = MassMeter(method)
    with meter.attach(tiny) as trace:
        got = steps(tiny, IDS, PADDING, 30)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    layers = len(method.check(tiny))
    assert len(meter.masses) == 10 * layers
    assert all(0 < mass < 1 for mass in meter.masses)
    assert (trace.keys_read, trace.keys_scored) == (plain.keys_read, plain.keys_scored)


@pytest.mark.parametrize("name", METERED)
def test_whoever_reads_everything_has_all_the_mass(name: str) -> None:
    tiny, meter = model("qwen2"), MassMeter(full(cases()[name]))
    with meter.attach(tiny):
        steps(tiny, IDS, PADDING, 30)
    assert min(meter.masses) == pytest.approx(1.0, abs=1e-5)


def test_the_oracles_mass_is_the_sum_of_its_highest_probabilities() -> None:
    tiny = model("llama", attn="eager", layers=1)
    meter = MassMeter(cases()["oracle"])
    with meter.attach(tiny):
        steps(tiny, IDS, torch.ones_like(IDS), 39)
    with torch.no_grad():
        weights = tiny(input_ids=IDS, output_attentions=True).attentions[0][:, :, -1]  # (B, H, S)
    assert meter.masses == [pytest.approx(float(weights.topk(6).values.sum(-1).mean()), abs=1e-5)]
