"""Laws of selectors: objects whose ``select(x)`` gives the kept tokens of x (B, N, D) as indices (B, K)."""

from __future__ import annotations

import torch
from torch import Tensor

from . import Case, DoesNotApply, Law, Stage, expect

ON_MODELS = False


def stage(_: str | None, seed: int) -> Stage:
    """Selection among 20 random tokens of 3 items; the neutral selection is all of them."""
    x = tokens(seed)
    every = torch.arange(x.shape[1]).expand(x.shape[0], -1)
    return Stage(run=lambda m: (every if m is None else m.select(x),), inputs={"x": x})


def tokens(seed: int, n: int = 20) -> Tensor:
    """Random features (3, n, 8)."""
    return torch.randn(3, n, 8, generator=torch.Generator().manual_seed(seed))


def rows_do_not_talk(case: Case) -> None:
    if case.card.batch_coupled:
        raise DoesNotApply("rows influence each other by design, says the card")
    x = tokens(0)
    together = case.small().select(x)
    for row in range(len(x)):
        alone = case.small().select(x[row : row + 1])
        expect(torch.equal(together[row : row + 1], alone), f"row {row} of a batch differs from the row alone")


def kept_tokens_are_distinct_and_in_range(case: Case) -> None:
    x = tokens(1)
    kept = case.small().select(x)
    expect(kept.dtype == torch.int64 and kept.dim() == 2, f"the selection is {kept.dtype} of {kept.dim()} dimensions")
    expect(int(kept.min()) >= 0 and int(kept.max()) < x.shape[1], "an index is outside the tokens")
    expect(bool((kept.diff(dim=1) > 0).all()), "the selection is not ascending, or holds a token twice")


LAWS = Law.all(rows_do_not_talk, kept_tokens_are_distinct_and_in_range)
