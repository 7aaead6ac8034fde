from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tokenmill import models
from tokenmill.errors import LimitError
from tokenmill.models import CostProfile, _profile


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TOKENMILL_CACHE", str(tmp_path))


def test_times_between_measured_numbers_lie_on_the_line_between_them() -> None:
    cost = CostProfile((1, 4, 8), (10.0, 40.0, 20.0))
    assert [cost.at(n) for n in (1, 2, 3, 4, 6, 8)] == [10, 20, 30, 40, 30, 20]


def test_beyond_the_ends_the_profile_goes_on() -> None:
    rising = CostProfile((2, 4), (10.0, 12.0))
    assert rising.at(1) == 10
    assert rising.at(10) == 18
    assert CostProfile((1, 4), (10.0, 4.0)).at(100) == 4
    assert CostProfile((3,), (7.0,)).at(50) == 7


@pytest.mark.parametrize(
    ("positions", "ms"), [((), ()), ((0, 1), (1.0, 1.0)), ((2, 1), (1.0, 1.0)), ((1, 2), (1.0,)), ((1,), (0.0,))]
)
def test_a_profile_that_makes_no_sense_is_refused(positions: tuple[int, ...], ms: tuple[float, ...]) -> None:
    with pytest.raises(LimitError, match="CostProfile"):
        CostProfile(positions, ms)
    with pytest.raises(LimitError, match="n = 0"):
        CostProfile((1,), (1.0,)).at(0)


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_every_number_is_measured_and_the_model_is_left_alone(kind: str) -> None:
    model = models.tiny(kind)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    cost = models.profile(model, positions=(1, 3, 40), context=24, repeats=2)
    assert cost.positions == (1, 3, 40)
    assert all(0 < ms < 10_000 for ms in cost.ms)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_passes_have_the_asked_for_shape_and_start_after_the_context() -> None:
    model, seen = models.tiny("llama"), []

    def look(_: object, __: object, kwargs: dict[str, torch.Tensor]) -> None:
        at = kwargs.get("position_ids")
        seen.append((kwargs["input_ids"].shape[1], None if at is None else at.flatten().tolist()))

    handle = model.register_forward_pre_hook(look, with_kwargs=True)
    models.profile(model, positions=(1, 3), context=5, repeats=2)
    handle.remove()
    assert seen == [(5, None)] + [(1, [5]), (3, [5, 6, 7])] * 3


def test_the_second_call_reads_what_the_first_one_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = models.tiny("llama")
    first = models.profile(model, positions=(1, 2), context=4, repeats=1)
    measured: list[int] = []
    monkeypatch.setattr(_profile, "_measure", lambda *_: measured.append(1) or (1.0, 2.0))
    assert models.profile(model, positions=(1, 2), context=4, repeats=1) == first
    assert models.profile(models.tiny("llama", seed=5), positions=(1, 2), context=4) == first
    assert not measured
    assert models.profile(model, positions=(1, 2), context=4, refresh=True).ms == (1.0, 2.0)
    assert models.profile(model, positions=(1, 2), context=4).ms == (1.0, 2.0)
    assert len(measured) == 1


def test_what_changes_the_cost_changes_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.tiny("llama")
    keys = [_profile._key(model)]
    with models.packed(model):
        keys.append(_profile._key(model))
    keys += [_profile._key(m) for m in (models.tiny("llama", attn="eager"), models.tiny("llama", layers=1))]
    keys.append(_profile._key(models.tiny("llama", dtype=torch.bfloat16)))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    keys.append(_profile._key(model))
    assert len({json.dumps(key, sort_keys=True) for key in keys}) == 6


def test_a_damaged_file_is_measured_again(tmp_path: Path) -> None:
    model = models.tiny("llama")
    models.profile(model, positions=(1,), context=4, repeats=1)
    (path,) = (tmp_path / "profiles").iterdir()
    for damage in ("", "{}", "[1, 2]", path.read_text()[:-9]):
        path.write_text(damage)
        models.profile(model, positions=(1,), context=4, repeats=1)
        assert json.loads(path.read_text())["positions"] == [1]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"positions": ()}, "positions"),
        ({"positions": (4, 2)}, "positions"),
        ({"context": 0}, "context = 0"),
        ({"repeats": 0}, "repeats = 0"),
        ({"context": 500}, "at most 384"),
    ],
)
def test_bad_numbers_are_refused_by_name(given: dict[str, object], words: str) -> None:
    with pytest.raises(LimitError, match=words):
        models.profile(models.tiny("llama"), **given)  # pyright: ignore[reportArgumentType]


def test_a_model_with_few_positions_is_measured_as_far_as_they_go() -> None:
    model = models.tiny("llama")
    model.config.max_position_embeddings = 40
    assert models.profile(model, repeats=1).positions == (1, 2, 4, 8, 16)
