"""Laws of rules: objects that say which places a pass of a masked diffusion model reveals.

A method that brings a cache policy of its own has ``decoder(**settings)``, which gives the `Diffusion` made of both.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from . import Case, DoesNotApply, Law, Stage, expect
from ._unmasking import END, NEW, PROMPT, bidirectional, fill, laws, prompts, stage_of

ON_MODELS = True


def _decoder(method: Any, **settings: Any) -> Any:
    from tokenmill.diffuse import Diffusion

    settings = {"seed": 0, "eot_id": END} | settings
    return method.decoder(**settings) if hasattr(method, "decoder") else Diffusion(method, **settings)


def stage(name: str | None, seed: int) -> Stage:
    """See `stage_of`."""
    return stage_of(_decoder, name, seed)


def caches_that_refresh_change_nothing(case: Case) -> None:
    from tokenmill.diffuse import DelayedCache, DualCache, FreeCache, PrefixCache, WindowCache

    policies = (
        PrefixCache(refresh=1),
        DualCache(refresh=1),
        DelayedCache(refresh=1),
        FreeCache(freeze="never"),
        WindowCache(external=NEW, internal=NEW - 1, refresh=1),
    )
    for name in case.card.works_with:
        model, ids = bidirectional(name, 9), prompts(9, rows=2)
        plain = replace(_decoder(case.small(), block_length=6), cache=None)
        wanted = fill(model, ids, plain)
        for policy in policies:
            cached = replace(_decoder(case.small(), block_length=6), cache=policy)
            same = torch.equal(fill(model, ids, cached), wanted)
            expect(same, f"{name}: with {policy} the text is another than without a cache")
            expect(cached.trace.row_calls == plain.trace.row_calls, f"{name}: with {policy} the passes are others")


def runs_with_every_policy(case: Case) -> None:
    from tokenmill.diffuse import DelayedCache, DualCache, FreeCache, PrefixCache, WindowCache

    policies = (
        PrefixCache(),
        DualCache(),
        DelayedCache(refresh=3),
        FreeCache(block_size=4),
        FreeCache(policy="aggressive"),
        FreeCache(policy="sliding", window=4),
        WindowCache(external=8, internal=3, refresh=4),
    )
    for name in case.card.works_with:
        for policy in policies:
            made = replace(_decoder(case.small(), block_length=4), cache=policy)
            out = fill(bidirectional(name, 10), prompts(10, rows=2), made)
            expect(out.shape[1] == PROMPT + max(made.trace.lengths), f"{name}: with {policy} the length is not counted")
            expect(not any(made.trace.still_masked) or made.rule.leaves_masks, f"{name}: with {policy} masks are left")


def own_policy_runs_with_every_rule(case: Case) -> None:
    from tokenmill.diffuse import Diffusion, Entropy, EntropyBound, Factor, Margin, Quota, RandomReveal, Threshold

    policy = _policy(case)
    rules = (Quota(2), RandomReveal(2), Threshold(0.3), Factor(1.0), Entropy(2), Margin(2), EntropyBound(1.0))
    for name in case.card.works_with:
        for rule in rules:
            made = Diffusion(rule, policy, seed=0)
            out = fill(bidirectional(name, 11), prompts(11, rows=2), made)
            expect(out.shape[1] == PROMPT + NEW, f"{name}: with {rule} the answer has {out.shape[1] - PROMPT} tokens")
            expect(made.trace.tokens == 2 * NEW, f"{name}: with {rule} {made.trace.tokens} tokens are counted")


def own_policy_feeds_fewer_places(case: Case) -> None:
    _policy(case)
    for name in case.card.works_with:
        made = _decoder(case.small())
        fill(bidirectional(name, 12), prompts(12), made)
        full = made.trace.model_calls * (PROMPT + NEW)
        expect(made.trace.positions < full, f"{name}: {made.trace.positions} places fed, as without a cache")


def _policy(case: Case) -> Any:
    policy = _decoder(case.small()).cache
    if policy is None:
        raise DoesNotApply("the method is a rule without a cache policy of its own")
    return policy


LAWS = laws(_decoder) + Law.all(
    caches_that_refresh_change_nothing,
    runs_with_every_policy,
    own_policy_runs_with_every_rule,
    own_policy_feeds_fewer_places,
)
