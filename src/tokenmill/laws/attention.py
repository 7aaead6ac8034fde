"""Laws of attention methods: context managers ``attach(model)`` that choose what attention reads."""

from __future__ import annotations

from typing import Any

import torch

from . import Case, DoesNotApply, Law, Stage, expect
from .general import VOCAB, tiny_model

ON_MODELS = True


def stage(name: str | None, seed: int) -> Stage:
    """One forward pass over a random prompt on a tiny model; neutral is the model alone."""
    model = tiny_model(str(name), seed)
    ids = torch.randint(1, VOCAB, (1, 24), generator=torch.Generator().manual_seed(seed))

    def run(method: Any) -> tuple[torch.Tensor, ...]:
        with torch.inference_mode():
            if method is None:
                return (model(input_ids=ids).logits,)
            with method.attach(model):
                return (model(input_ids=ids).logits,)

    return Stage(run=run, inputs={"input_ids": ids}, model=model)


def no_look_at_the_future(case: Case) -> None:
    if not getattr(case.small(), "causal", True):
        raise DoesNotApply("what a token of a prompt gets depends on the prompt's end by design")
    for name in case.card.works_with:
        at = stage(name, 0)
        before = at.run(case.small())[0]
        at.inputs["input_ids"][0, -1] = at.inputs["input_ids"][0, -1] % (VOCAB - 1) + 1
        after = at.run(case.small())[0]
        gap = float((before - after)[:, :-1].abs().max())
        expect(gap < 1e-5, f"{name}: another last token changes earlier logits by {gap:.1e}")


LAWS = Law.all(no_look_at_the_future)
