"""Laws of every method: card, settings, and what a method in use must leave alone."""

from __future__ import annotations

import dataclasses
import math
import re
import typing
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from tokenmill import bench, catalog, models
from tokenmill.errors import TokenmillError
from tokenmill.settings import hints_of

from . import BrokenLawError, Case, DoesNotApply, Law, expect

if TYPE_CHECKING:
    from . import Kind


VOCAB = 64


class _StopHereError(RuntimeError):
    """Raised inside a model by the law about exceptions."""


def card_is_complete(case: Case) -> None:
    card = case.card
    for field in ("name", "summary", "claim", "api", "task", "licence"):
        expect(getattr(card, field), f"the card's {field} is empty")
    expect(card.kind in catalog.KINDS, f"kind {card.kind!r} is not one of {', '.join(catalog.KINDS)}")
    expect(card.paper.title, "the paper has no title")
    expect(re.fullmatch(r"\d{4}-\d{2}(-\d{2})?", card.paper.date), f"paper date {card.paper.date!r} is not year-month")
    arxiv = card.paper.arxiv
    expect(not arxiv or re.fullmatch(r"\d{4}\.\d{4,5}", arxiv), f"arXiv number {arxiv!r} is not like 2408.08696")
    expect(len(re.findall(r"[.!?](\s|$)", card.summary)) >= 2, "the summary is shorter than two sentences")
    expect(card.task in bench.task_names(), f"task {card.task!r} is not one of {', '.join(bench.task_names())}")
    expect(case.module.__doc__, "the module has no docstring")


def api_is_there(case: Case) -> None:
    for name in case.card.api:
        expect(hasattr(case.module, name), f"api names {name!r}, which {case.module.__name__} does not have")
        expect(getattr(case.module, name).__doc__, f"{name} has no docstring")


def small_is_the_main_object(case: Case) -> None:
    main = getattr(case.module, case.card.api[0])
    if not isinstance(main, type):
        raise DoesNotApply(f"{case.card.api[0]} is a function")
    expect(isinstance(case.small(), main), f"small() gives a {type(case.small()).__name__}, not a {main.__name__}")


def settings_are_frozen(case: Case) -> None:
    settings = _settings(case)
    for field in dataclasses.fields(settings):
        try:
            setattr(settings, field.name, getattr(settings, field.name))
        except dataclasses.FrozenInstanceError:
            continue
        expect(False, f"{type(settings).__name__}.{field.name} can be set after construction")


def defaults_are_valid(case: Case) -> None:
    settings = _settings(case)
    required = {
        f.name: getattr(settings, f.name)
        for f in dataclasses.fields(settings)
        if f.init and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    type(settings)(**required)


def bad_values_are_refused_by_name(case: Case) -> None:
    settings = _settings(case)
    hints = hints_of(type(settings))
    for field in dataclasses.fields(settings):
        if not field.init or field.name == "seed":
            continue
        for bad in _bad_values(hints.get(field.name), getattr(settings, field.name)):
            try:
                dataclasses.replace(settings, **{field.name: bad})
            except TokenmillError as error:
                expect(field.name in str(error), f"{field.name} = {bad!r} is refused without its name: {error}")
                continue
            expect(False, f"{field.name} = {bad!r} is accepted")


def _bad_values(hint: Any, value: Any) -> list[Any]:
    options = (hint, *typing.get_args(hint))
    if any(typing.get_origin(option) is Literal for option in options):
        return ["no such value"]
    if isinstance(value, bool):
        return []
    if isinstance(value, float):
        return [math.nan]
    return [-(10**9)] if isinstance(value, int) else []


def _settings(case: Case) -> Any:
    """The frozen dataclass with a method's parameters: the method itself, or its `config`."""
    if not isinstance(getattr(case.module, case.card.api[0]), type):
        raise DoesNotApply(f"{case.card.api[0]} is a function")
    small = case.small()
    for settings in (small, getattr(small, "config", None)):
        if dataclasses.is_dataclass(settings) and not isinstance(settings, type):
            return settings
    if isinstance(small, type) or not callable(small):
        raise DoesNotApply("this method has no settings")
    raise BrokenLawError(f"{type(small).__name__} is no dataclass and has no config that is one")


def works_on_every_model_it_names(kind: Kind, case: Case) -> None:
    for name in _models(kind, case):
        output = kind.stage(name, 0).run(case.small())
        expect(all(bool(torch.isfinite(t.float()).all()) for t in output), f"{_on(name)}the output is not finite")


def same_seed_same_output(kind: Kind, case: Case) -> None:
    for name in _models(kind, case):
        first, second = (kind.stage(name, 7).run(seeded(case.small(), 7)) for _ in range(2))
        same = len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        expect(same, f"{_on(name)}two runs with one seed differ")


def inputs_are_untouched(kind: Kind, case: Case) -> None:
    for name in _models(kind, case):
        stage = kind.stage(name, 3)
        before = {key: tensor.clone() for key, tensor in stage.inputs.items()}
        stage.run(case.small())
        for key, tensor in stage.inputs.items():
            expect(torch.equal(tensor, before[key]), f"{_on(name)}the input {key!r} was changed")


def device_and_dtype_are_kept(kind: Kind, case: Case) -> None:
    for name in _models(kind, case):
        stage = kind.stage(name, 1)
        plain = stage.run(None)
        for ours, theirs in zip(stage.run(case.small()), plain, strict=True):
            expect(ours.device == theirs.device, f"{_on(name)}the output lies on {ours.device}, not {theirs.device}")
            expect(ours.dtype == theirs.dtype, f"{_on(name)}the output is {ours.dtype}, not {theirs.dtype}")


def model_is_left_as_found(kind: Kind, case: Case) -> None:
    for name in _models(kind, case):
        stage = kind.stage(name, 2)
        if stage.model is None:
            raise DoesNotApply("this method touches no model")
        before = fingerprint(stage.model)
        stage.run(case.small())
        _same_model(before, stage.model, f"{_on(name)}after a run")


def model_is_left_as_found_after_an_error(kind: Kind, case: Case) -> None:
    for name in _models(kind, case):
        stage = kind.stage(name, 2)
        if stage.model is None:
            raise DoesNotApply("this method touches no model")
        before = fingerprint(stage.model)
        with _stopped_at(stage.model, call=stage.error_at):
            try:
                stage.run(case.small())
            except _StopHereError:
                pass
            except TokenmillError as error:
                cause = error.__cause__ or error.__context__
                expect(isinstance(cause, _StopHereError), f"{_on(name)}the error {error} hides the real one")
            else:
                expect(False, f"{_on(name)}an error inside the model does not come out")
        _same_model(before, stage.model, f"{_on(name)}after an error")


def tiny_model(name: str, seed: int) -> Any:
    """The tiny random model of a model type that a card names, such as ``"llama"`` or ``"gemma3_text"``."""
    return models.tiny(name.removesuffix("_text"), seed=seed, vocab=VOCAB)


def seeded(method: Any, seed: int) -> Any:
    """The method with this seed, when it has a field of that name."""
    if dataclasses.is_dataclass(method) and not isinstance(method, type) and hasattr(method, "seed"):
        return dataclasses.replace(method, seed=seed)
    return method


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that a method must give back: weights, modules, hooks, attributes, settings."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        hooks = [len(v) for k, v in sorted(vars(module).items()) if "hooks" in k and hasattr(v, "__len__")]
        own = sorted(k for k in vars(module) if k not in ("_modules", "_parameters", "_buffers"))
        found[f"module {name}"] = (id(module), type(module), module.training, hooks, own)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        found[f"tensor {name}"] = (id(tensor), tensor.requires_grad, tensor.detach().clone())
    for name in ("config", "generation_config"):
        if (settings := getattr(model, name, None)) is not None:
            found[name] = (settings.to_dict(), getattr(settings, "_attn_implementation", None))
    return found


def _same_model(before: dict[str, Any], model: nn.Module, when: str) -> None:
    after = fingerprint(model)
    expect(before.keys() == after.keys(), f"{when} the model has other parts: {before.keys() ^ after.keys()}")
    for key, was in before.items():
        now = after[key]
        same = was == now if not key.startswith("tensor") else was[:2] == now[:2] and torch.equal(was[2], now[2])
        expect(same, f"{when} the model's {key} is not what it was")


@contextmanager
def _stopped_at(model: nn.Module, *, call: int) -> Generator[None, None, None]:
    """Raise inside the model's `call`-th forward pass; the hook is gone when the block ends."""
    calls = 0

    def stop(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise _StopHereError("stopped by a law")

    # The last submodule, so that the method's own hooks on the layers before it have been passed.
    handle = list(model.modules())[-1].register_forward_pre_hook(stop)
    try:
        yield
    finally:
        handle.remove()


def _models(kind: Kind, case: Case) -> tuple[str, ...] | tuple[None]:
    if not kind.ON_MODELS:
        return (None,)
    expect(case.card.works_with, "the card names no model in works_with")
    return case.card.works_with


def _on(name: str | None) -> str:
    return f"{name}: " if name else ""


LAWS = Law.all(
    card_is_complete,
    api_is_there,
    small_is_the_main_object,
    settings_are_frozen,
    defaults_are_valid,
    bad_values_are_refused_by_name,
)
IN_USE = (
    works_on_every_model_it_names,
    same_seed_same_output,
    inputs_are_untouched,
    device_and_dtype_are_kept,
    model_is_left_as_found,
    model_is_left_as_found_after_an_error,
)
