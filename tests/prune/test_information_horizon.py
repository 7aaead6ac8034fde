from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tokenmill.errors import LimitError
from tokenmill.hf.layout import decoder
from tokenmill.hf.vision import visual_mask
from tokenmill.prune import (
    InformationHorizon,
    PruneSchedule,
    RandomTokens,
    apply_schedule,
    kl_curve,
    solve_schedule,
    token_information,
)
from tokenmill.prune.information_horizon import information_horizon

from . import oracle, vlms


def one(kind: str = "llava") -> Any:
    return vlms.inputs(kind, rows=1, images=(1,))


@pytest.mark.prop("information-horizon", 1)
def test_an_empty_schedule_changes_nothing() -> None:
    model, inputs = vlms.model("llava"), vlms.inputs("llava")
    with torch.no_grad():
        plain = model(**inputs).logits
        with apply_schedule(model, PruneSchedule(())) as trace:
            ours = model(**inputs).logits
    assert torch.equal(plain, ours)
    assert trace.kept() == {}


@pytest.mark.prop("information-horizon", 5)
def test_a_stage_behind_the_last_layer_does_nothing() -> None:
    model, inputs = vlms.model("llava"), vlms.inputs("llava")
    with torch.no_grad():
        plain = model(**inputs).logits
        with apply_schedule(model, PruneSchedule(((vlms.LAYERS, 0, "drop_all"),))):
            assert torch.equal(plain, model(**inputs).logits)
    with pytest.raises(LimitError, match="layer"), apply_schedule(model, PruneSchedule(((5, 0.5, "random"),))):
        pass


@pytest.mark.prop("information-horizon", 5)
def test_random_before_the_first_layer_is_random_before_the_decoder() -> None:
    model, inputs = vlms.model("llava"), vlms.inputs("llava")
    method = InformationHorizon(schedule=PruneSchedule(((0, 0.5, "random"),)), seed=4)
    with torch.no_grad():
        ours, theirs = method.prepare(model, inputs), RandomTokens(keep=0.5, seed=4).prepare(model, inputs)
    assert all(torch.equal(a.keep, b.keep) for a, b in zip(ours.report, theirs.report, strict=True))


@pytest.mark.prop("information-horizon", 6)
def test_draws_are_uniform_and_seeded() -> None:
    model, inputs = vlms.model("llava"), one()
    visual = visual_mask(model, inputs["input_ids"])[0]
    counts = torch.zeros(16)
    schedule = PruneSchedule(((3, 4, "random"),))
    with torch.no_grad(), apply_schedule(model, schedule, seed=1) as trace:
        for _ in range(400):
            model(**inputs, use_cache=False)
            kept = trace.shortening.kept[3][0]
            assert int(kept.sum()) == 4
            assert not (kept & ~visual).any()
            counts += kept[visual]
    # 400 draws of a quarter: 100 each, standard deviation 8.7.
    assert float((counts - 100).abs().max()) < 4 * math.sqrt(400 * 0.25 * 0.75)
    draws = []
    for seed in (1, 1, 2):
        with torch.no_grad(), apply_schedule(model, schedule, seed=seed) as trace:
            model(**inputs, use_cache=False)
        draws.append(trace.shortening.kept[3])
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@pytest.mark.prop("information-horizon", 7)
@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_information_is_the_masked_forwards_difference(kind: str, attn: str) -> None:
    """Each group alone, by a full-length run in which all other visual tokens are hidden from the layer on."""
    model, inputs = vlms.model(kind, attn), one(kind)
    found = token_information(model, inputs, 7, [1, 2, vlms.LAYERS], window=2)
    visual = visual_mask(model, inputs["input_ids"])
    none = torch.zeros(1, 0, dtype=torch.long)

    def probability(dropped: dict[int, torch.Tensor]) -> float:
        return float(oracle.masked_logits(model, inputs, none, dropped)[0, -1].softmax(-1)[7])

    assert len(found.groups) == 4
    assert found.p_full == pytest.approx(probability({}), abs=1e-6)
    for at, layer in enumerate((1, 2)):
        base = probability({layer: visual})
        assert float(found.p_text[at]) == pytest.approx(base, abs=1e-6)
        for number, group in enumerate(found.groups):
            gone = visual.clone()
            gone[0, group] = False
            want = probability({layer: gone}) - base
            assert float(found.information[at, number]) == pytest.approx(want, abs=1e-6)
    assert found.information[2].tolist() == [0.0] * 4
    again = token_information(model, inputs, 7, [1, 2], window=2, batch=1)
    assert torch.allclose(again.information, found.information[:2], atol=1e-6)
    whole = token_information(model, inputs, 7, [1], window=4)
    assert float(whole.information[0, 0] + whole.p_text[0]) == pytest.approx(found.p_full, abs=1e-6)


@pytest.mark.prop("information-horizon", 8)
def test_ranking_by_probability_is_ranking_by_information() -> None:
    model, inputs = vlms.model("llava"), one()
    found = token_information(model, inputs, 7, [1], window=1)
    p = found.information[0] + found.p_text[0]
    assert torch.equal(p.argsort(), found.information[0].argsort())


@pytest.mark.prop("information-horizon", 9)
def test_divergence_without_pictures() -> None:
    model, inputs = vlms.model("llava"), one()
    curve = kl_curve(model, inputs)
    assert curve.shape == (vlms.LAYERS,)
    assert float(curve[-1]) == 0
    assert (curve[:-1] > 1e-4).all()
    none = torch.zeros(1, 0, dtype=torch.long)
    visual = visual_mask(model, inputs["input_ids"])
    full, bare = (oracle.masked_logits(model, inputs, none, d)[0, -1].log_softmax(-1) for d in ({}, {2: visual}))
    assert float(curve[1]) == pytest.approx(float((full.exp() * (full - bare)).sum()), abs=1e-5)
    # A model in which attention adds nothing answers from the text alone.
    with torch.no_grad():
        for layer in decoder(model).layers:
            layer.self_attn.o_proj.weight.zero_()
    assert float(kl_curve(model, inputs).abs().max()) < 1e-6


@pytest.mark.prop("information-horizon", 10)
def test_solver_meets_its_average() -> None:
    for average, rho in ((192, 0.13), (64, 0.10), (100, 0.0), (300, 1.0)):
        schedule = solve_schedule(32, 576, average, 20, rho)
        (_, n0, first), (layer, n1, second) = schedule.stages
        assert (first, layer, second) == ("divprune", 20, "random")
        assert n1 <= n0 <= 576
        assert abs((20 * n0 + 12 * n1) / 32 - average) <= 1
    firsts = [solve_schedule(32, 576, a, 20, 0.1).stages[0][1] for a in range(20, 300, 20)]
    assert firsts == sorted(firsts)
    with pytest.raises(LimitError, match="N=576"):
        solve_schedule(32, 576, 500, 20, 0.1)


def test_released_schedules() -> None:
    """284 then 38 of 576 hold 191.75 in the mean, 96 then 10 hold 63.75."""
    assert (20 * 284 + 12 * 38) / 32 == 191.75
    assert (20 * 96 + 12 * 10) / 32 == 63.75
    (_, n0, _), (_, n1, _) = solve_schedule(32, 576, 191.75, 20, 38 / 284).stages
    assert (n0, n1) == (284, 38)
    (_, n0, _), (_, n1, _) = solve_schedule(32, 576, 63.75, 20, 10 / 96).stages
    assert (n0, n1) == (96, 10)


@pytest.mark.prop("information-horizon", 11)
def test_dropping_all_leaves_text_in_the_cache() -> None:
    model, inputs = vlms.model("llava"), one()
    text = int((~visual_mask(model, inputs["input_ids"])).sum())
    with torch.no_grad(), apply_schedule(model, PruneSchedule(((2, 0, "drop_all"),))):
        out = model(**inputs, use_cache=True)
    assert [layer.keys.shape[2] for layer in out.past_key_values.layers][2:] == [text, text]


def test_horizon() -> None:
    assert information_horizon(torch.tensor([0.5, 0.2, 0.005, 0.02, 0.001, 0.0])) == 5
    assert information_horizon(torch.tensor([0.5, 0.2, 0.1])) is None
    assert information_horizon(torch.zeros(3)) == 1
    samples = torch.tensor([[0.5, 0.016, 0.0], [0.5, 0.0, 0.0]])
    assert information_horizon(samples) == 2
    groups = torch.zeros(2, 3, 4)
    groups[:, 0, 1] = -0.5
    assert information_horizon(groups, layers=[4, 8, 12]) == 8


def test_dart_keeps_exactly_what_was_asked() -> None:
    model, inputs = vlms.model("llava"), vlms.inputs("llava")
    for count in (1, 3, 4, 7, 16):
        with torch.no_grad(), apply_schedule(model, PruneSchedule(((2, count, "dart"),))) as trace:
            model(**inputs)
        visual = visual_mask(model, inputs["input_ids"])
        want = [min(count, n) for n in visual.sum(1).tolist()]
        assert trace.shortening.kept[2].sum(1).tolist() == want


def test_a_rule_of_ones_own() -> None:
    model, inputs = vlms.model("llava"), one()
    schedule = PruneSchedule(((2, 3, lambda _view, count: torch.arange(count)),))
    with torch.no_grad(), apply_schedule(model, schedule) as trace:
        model(**inputs)
    first = visual_mask(model, inputs["input_ids"])[0].nonzero()[:3, 0]
    assert torch.equal(trace.shortening.kept[2][0].nonzero()[:, 0], first)


@pytest.mark.parametrize(
    ("stages", "parts"),
    [
        (((8, 10, "divprune"), (20, 38, "random")), ("keep = 38", "the 10 that survive at layer 8")),
        (((8, 10, "divprune"), (8, 5, "random")), ("layer = 8", "above 8")),
        (((2, 5, "first"),), ("selector", "random")),
        (((0, 5, "dart"),), ("dart", "at least 1")),
        (((-1, 5, "random"),), ("layer = -1",)),
        (((1, -5, "random"),), ("keep = -5",)),
    ],
)
def test_bad_schedules(stages: Any, parts: tuple[str, ...]) -> None:
    with pytest.raises(LimitError) as caught:
        PruneSchedule(stages)
    for part in parts:
        assert part in str(caught.value)


def test_text_only_turns_pass_untouched_inside() -> None:
    model = vlms.model("llava")
    ids = torch.randint(1, 50, (2, 7))
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        with apply_schedule(model, PruneSchedule(((1, 0, "drop_all"),))) as trace:
            assert torch.equal(plain, model(input_ids=ids).logits)
    assert trace.kept() == {}
    with pytest.raises(LimitError, match="0 placeholders"):
        kl_curve(model, {"input_ids": ids[:1]})
