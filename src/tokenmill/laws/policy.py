"""Laws of cache policies: objects that say what a pass of a masked diffusion model feeds and reads.

A method that is a policy with a rule of its own has ``decoder(**settings)``.
"""

from __future__ import annotations

from typing import Any

from . import Case, Law, Stage, expect
from ._unmasking import END, NEW, PROMPT, bidirectional, fill, laws, prompts, stage_of

ON_MODELS = True


def _decoder(method: Any, **settings: Any) -> Any:
    from tokenmill.diffuse import Diffusion, Quota

    settings = {"seed": 0, "eot_id": END} | settings
    if hasattr(method, "decoder"):
        return method.decoder(**settings)
    return Diffusion(Quota(1), method, **settings)


def stage(name: str | None, seed: int) -> Stage:
    """See `stage_of`; a bare policy runs with one token a pass."""
    return stage_of(_decoder, name, seed)


def runs_with_every_rule(case: Case) -> None:
    from tokenmill.diffuse import Diffusion, Entropy, EntropyBound, Factor, Margin, Quota, RandomReveal, Threshold

    rules = (Quota(2), RandomReveal(2), Threshold(0.3), Factor(1.0), Entropy(2), Margin(2), EntropyBound(1.0))
    for name in case.card.works_with:
        policy = _decoder(case.small()).cache
        for rule in rules:
            made = Diffusion(rule, policy, seed=0)
            out = fill(bidirectional(name, 9), prompts(9, rows=2), made)
            expect(out.shape[1] == PROMPT + NEW, f"{name}: with {rule} the answer has {out.shape[1] - PROMPT} tokens")
            expect(made.trace.tokens == 2 * NEW, f"{name}: with {rule} {made.trace.tokens} tokens are counted")


def feeds_fewer_places(case: Case) -> None:
    for name in case.card.works_with:
        made = _decoder(case.small())
        fill(bidirectional(name, 10), prompts(10), made)
        full = made.trace.model_calls * (PROMPT + NEW)
        expect(made.trace.positions < full, f"{name}: {made.trace.positions} places fed, as without a cache")


LAWS = laws(_decoder) + Law.all(runs_with_every_rule, feeds_fewer_places)
