"""Laws of rules: objects that say which places a pass of a masked diffusion model reveals."""

from __future__ import annotations

from typing import Any

import torch

from . import Case, Law, Stage, expect
from ._unmasking import END, NEW, PROMPT, bidirectional, fill, laws, prompts, stage_of

ON_MODELS = True


def _decoder(method: Any, cache: Any = None, **settings: Any) -> Any:
    from tokenmill.diffuse import Diffusion

    return Diffusion(method, cache, **({"seed": 0, "eot_id": END} | settings))


def stage(name: str | None, seed: int) -> Stage:
    """See `stage_of`; the rule runs with nothing cached."""
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
        plain = _decoder(case.small(), block_length=6)
        wanted = fill(model, ids, plain)
        for policy in policies:
            cached = _decoder(case.small(), policy, block_length=6)
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
            made = _decoder(case.small(), policy, block_length=4)
            out = fill(bidirectional(name, 10), prompts(10, rows=2), made)
            full = all(n == NEW for n in made.trace.lengths)
            expect(not full or out.shape[1] == PROMPT + NEW, f"{name}: with {policy} the answer is short")
            expect(not any(made.trace.still_masked) or made.rule.leaves_masks, f"{name}: with {policy} masks are left")


LAWS = laws(_decoder) + Law.all(caches_that_refresh_change_nothing, runs_with_every_policy)
