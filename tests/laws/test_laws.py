"""Every law holds for a sound toy and is broken by a toy with the flaw that it is there to find."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from torch import Tensor

from tokenmill import laws
from tokenmill.budget import check, to_count
from tokenmill.catalog import Card, Kind, Paper


def _toy_decoder() -> ModuleType:
    spec = importlib.util.spec_from_file_location("toy_decoder", Path(__file__).with_name("toy_decoder.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["toy_decoder"] = module
    spec.loader.exec_module(module)
    return module


toy = _toy_decoder()


def _case(card: Card, small: Callable[[], Any], **names: Any) -> laws.Case:
    module = ModuleType("toy", "A toy.")
    vars(module).update(names | {"small": small, "CARD": card})
    return laws.Case(replace(card, slug="toy", family="decode"), module)


def _breaks(case: laws.Case, name: str) -> bool:
    """Whether the law of this name is broken."""
    (law,) = (law for law in laws.laws_for(case.card.kind) if law.name == name)
    return law.name in _judge(case, [law])


def _judge(case: laws.Case, only: Sequence[laws.Law] = ()) -> dict[str, str]:
    broken: dict[str, str] = {}
    for law in only or laws.laws_for(case.card.kind):
        try:
            law.check(case)
        except laws.DoesNotApply:
            continue
        except Exception as error:  # noqa: BLE001 - as in laws.judge
            broken[law.name] = str(error)
    return broken


def _decoder(flaw: str = "", **card: Any) -> laws.Case:
    make = lambda: toy.ToyDecoder(flaw=flaw)  # noqa: E731
    return _case(replace(toy.CARD, **card), make, ToyDecoder=toy.ToyDecoder)


def test_a_sound_decoder_keeps_every_law() -> None:
    assert _judge(_decoder()) == {}


@pytest.mark.parametrize(
    ("flaw", "law"),
    [
        ("second best", "greedy equals plain greedy"),
        ("miscount", "counts add up"),
        ("old trace", "trace starts anew at each call"),
        ("sharp", "samples follow the target"),
        ("unseeded", "sampling repeats under a seed"),
        ("batch", "batch is refused or rows equal alone"),
        ("deaf", "end token stops exactly"),
        ("long", "length stops exactly"),
        ("shared", "second call at the same time raises"),
        ("hook", "model is left as found"),
        ("hook", "model is left as found after an error"),
        ("stuck weights", "model is left as found"),
        ("writes input", "inputs are untouched"),
        ("accepts anything", "bad values are refused by name"),
        ("nameless error", "bad values are refused by name"),
    ],
)
def test_a_flaw_breaks_its_law(flaw: str, law: str) -> None:
    assert _breaks(_decoder(flaw), law)


@pytest.mark.parametrize(
    "change",
    [
        {"summary": ""},
        {"summary": "One sentence only."},
        {"task": "no-such-task"},
        {"kind": "magic"},
        {"paper": Paper(title="A toy", date="last year")},
        {"paper": Paper(title="A toy", date="2026-01", arxiv="abc")},
    ],
)
def test_an_incomplete_card_breaks_the_law(change: dict[str, Any]) -> None:
    assert _breaks(_decoder(**change), "card is complete")


def test_api_must_exist_and_be_what_small_gives() -> None:
    assert _breaks(_decoder(api=("Missing",)), "api is there")
    case = _case(toy.CARD, lambda: 3, ToyDecoder=toy.ToyDecoder)
    assert _breaks(case, "small is the main object")


@dataclass
class Thawed:
    """Settings that can be set."""

    keep: int = 3

    def __post_init__(self) -> None:
        check("Thawed", self.keep)


@dataclass(frozen=True)
class BadDefault:
    """A default that its own check refuses."""

    keep: int = 0

    def __post_init__(self) -> None:
        check("BadDefault", self.keep)


def test_settings_must_be_frozen_and_their_defaults_valid() -> None:
    card = replace(toy.CARD, api=("Main",))
    assert _breaks(_case(card, Thawed, Main=Thawed), "settings are frozen")
    assert _breaks(_case(card, lambda: BadDefault(keep=2), Main=BadDefault), "defaults are valid")


@dataclass(frozen=True, slots=True, kw_only=True)
class First:
    """Keeps the tokens with the largest norm."""

    keep: float = 0.25
    flaw: str = ""

    def __post_init__(self) -> None:
        check("First", self.keep)

    def select(self, x: Tensor) -> Tensor:
        size = x.norm(dim=-1)
        if self.flaw == "rows talk":
            size = size - size.mean(dim=0)
        if self.flaw == "writes":
            x.zero_()
        k = to_count("First", self.keep, x.shape[1])
        kept = size.topk(k, dim=1).indices.sort(dim=1).values
        if self.flaw == "repeats":
            kept[:, 1] = kept[:, 0]
        return kept.int() if self.flaw == "int32" else kept


def _selector(flaw: str = "", **card: Any) -> laws.Case:
    kind: Kind = "selector"
    return _case(replace(toy.CARD, kind=kind, api=("First",), **card), lambda: First(flaw=flaw), First=First)


def test_a_sound_selector_keeps_every_law() -> None:
    assert _judge(_selector()) == {}


@pytest.mark.parametrize(
    ("flaw", "law"),
    [
        ("rows talk", "rows do not talk"),
        ("writes", "inputs are untouched"),
        ("repeats", "kept tokens are distinct and in range"),
        ("int32", "device and dtype are kept"),
    ],
)
def test_a_flaw_breaks_the_selectors_law(flaw: str, law: str) -> None:
    assert _breaks(_selector(flaw), law)


def test_rows_may_talk_when_the_card_says_so() -> None:
    assert _judge(_selector("rows talk", batch_coupled=True)) == {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Damp:
    """Halves the output of every attention layer."""

    flaw: str = ""

    def attach(self, model: Any) -> Any:
        return _Attached(model, self.flaw)


class _Attached:
    def __init__(self, model: Any, flaw: str) -> None:
        self.model, self.flaw, self.handles = model, flaw, []

    def __enter__(self) -> None:
        for name, module in self.model.named_modules():
            if name.endswith("o_proj"):
                hook = self._future if self.flaw == "future" else self._half
                self.handles.append(module.register_forward_hook(hook))

    def __exit__(self, error: Any, *_: Any) -> None:
        if self.flaw != "leaves hooks" and not (self.flaw == "leaves hooks on error" and error):
            for handle in self.handles:
                handle.remove()

    def _half(self, _module: Any, _args: Any, output: Tensor) -> Tensor:
        return output / 2

    def _future(self, _module: Any, _args: Any, output: Tensor) -> Tensor:
        return output + output.mean(dim=1, keepdim=True)


def _attention(flaw: str = "") -> laws.Case:
    kind: Kind = "attention"
    return _case(replace(toy.CARD, kind=kind, api=("Damp",)), lambda: Damp(flaw=flaw), Damp=Damp)


def test_a_sound_attention_method_keeps_every_law() -> None:
    assert _judge(_attention()) == {}


@pytest.mark.parametrize(
    ("flaw", "law"),
    [
        ("future", "no look at the future"),
        ("leaves hooks", "model is left as found"),
        ("leaves hooks on error", "model is left as found after an error"),
    ],
)
def test_a_flaw_breaks_the_attention_law(flaw: str, law: str) -> None:
    assert _breaks(_attention(flaw), law)


def test_an_error_of_the_method_is_a_broken_law(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(laws.Case, "of", lambda slug: _decoder())

    def boom(case: laws.Case) -> None:
        raise RuntimeError("inside the method")

    result = laws.judge("toy", laws.Law("boom", boom))
    assert (result.status, result.message) == ("broken", "RuntimeError: inside the method")
