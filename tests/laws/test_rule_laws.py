"""The laws of rules hold for a sound toy, and each is broken by a toy with its flaw."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import pytest
import torch

from tokenmill import laws
from tokenmill.catalog import Card, Paper
from tokenmill.diffuse import Diffusion, PrefixCache, Quota, Reveal, RevealRule

CARD = Card(
    name="Toy rule",
    kind="rule",
    paper=Paper(title="A toy", date="2026-01"),
    summary="A toy. It is for tests.",
    claim="none",
    api=("ToyRule",),
    exact=False,
    trains=False,
    task="generate",
    works_with=("llama",),
)


@dataclass(frozen=True)
class ToyRule(RevealRule):
    """Two places a pass, or something that a law forbids."""

    flaw: str = ""

    def reveal(self, proposal: Any) -> Any:
        canvas = proposal.canvas
        places = Quota(2).reveal(proposal)
        if self.flaw == "coupled" and len(canvas) > 1:
            return Quota(1).reveal(proposal)
        if self.flaw == "unseeded":
            return Quota(1 + int(torch.randint(3, ()))).reveal(proposal)
        if self.flaw == "idle" and int(canvas.passes[0]) % 4:
            return places & False
        if self.flaw == "looks at the cache" and not bool(canvas.refreshed[0]):
            return Quota(1).reveal(proposal)
        if self.flaw == "miscounts":
            canvas.trace.tokens += 1
        if self.flaw == "writes masks":
            return Reveal(places, tokens=torch.full_like(canvas.x, canvas.mask_id))
        if self.flaw == "gives up":
            return Reveal(places, leave=canvas.passes > 1)
        return places

    def decoder(self, **settings: Any) -> Any:
        """The decoder, whole or spoiled."""
        cache = PrefixCache() if self.flaw == "lazy cache" else None
        made = Diffusion(self, cache, infill=self.flaw == "fills prompts", **settings)
        return Spoiled(made, self.flaw) if self.flaw.startswith("decoder") else made


@dataclass
class Spoiled:
    """A decoder whose output is touched afterwards."""

    decoder: Diffusion
    flaw: str

    @property
    def trace(self) -> Any:
        return self.decoder.trace

    def generate(self, model: Any, ids: Any, **given: Any) -> Any:
        out = self.decoder.generate(model, ids, **given).clone()
        if self.flaw == "decoder touches prompts":
            out[:, 0] += 1
        elif self.flaw == "decoder rewrites":
            out[:, -1] = (out[:, -1] + 1) % 60
        elif self.flaw == "decoder is never empty" and out.shape == ids.shape:
            return out[:, :-1]
        return out


def broken(flaw: str = "", only: str = "") -> dict[str, str]:
    module = ModuleType("toy", "A toy.")
    vars(module).update(ToyRule=ToyRule, CARD=CARD, small=lambda: ToyRule(flaw))
    case, found = laws.Case(replace(CARD, slug="toy", family="diffuse"), module), {}
    for law in laws.laws_for("rule"):
        if only and law.name != only:
            continue
        try:
            law.check(case)
        except laws.DoesNotApply:
            continue
        except Exception as error:  # noqa: BLE001 - as in laws.judge
            found[law.name] = str(error)
    return found


def test_a_sound_rule_keeps_every_law() -> None:
    assert broken() == {}


@pytest.mark.parametrize(
    ("flaw", "law"),
    [
        ("coupled", "rows equal alone"),
        ("unseeded", "same seed same output"),
        ("unseeded", "trace starts anew at each call"),
        ("idle", "every pass makes headway"),
        ("looks at the cache", "caches that refresh change nothing"),
        ("miscounts", "counts add up"),
        ("writes masks", "prompt is untouched and no mask is left"),
        ("gives up", "runs with every policy"),
        ("fills prompts", "mask in the prompt is refused"),
        ("decoder touches prompts", "prompt is untouched and no mask is left"),
        ("decoder rewrites", "revealed tokens stay"),
        ("decoder is never empty", "empty answer is the prompt"),
    ],
)
def test_a_flaw_breaks_its_law(flaw: str, law: str) -> None:
    assert law in broken(flaw, law)


def test_a_policy_that_saves_nothing_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert broken("lazy cache", "own policy feeds fewer places") == {}
    monkeypatch.setattr(PrefixCache, "plan", lambda _, canvas: _everything(canvas))
    assert "own policy feeds fewer places" in broken("lazy cache", "own policy feeds fewer places")
    monkeypatch.setattr(PrefixCache, "plan", lambda _, canvas: _nothing_allowed(canvas))
    assert "own policy runs with every rule" in broken("lazy cache", "own policy runs with every rule")


def _everything(canvas: Any) -> Any:
    from tokenmill.diffuse import Plan

    return Plan(canvas.real, canvas.real, torch.ones_like(canvas.refreshed))


def _nothing_allowed(canvas: Any) -> Any:
    plan = _everything(canvas)
    plan.allow = torch.zeros_like(canvas.real)
    return plan
