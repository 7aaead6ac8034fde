"""Laws of whatever makes a decoder for masked diffusion models, on tiny bidirectional ones."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tokenmill import models
from tokenmill.errors import TokenmillError

from . import Case, DoesNotApply, Law, Stage, expect
from .general import VOCAB, seeded

PROMPT, NEW = 10, 12
END = 5
MASK = VOCAB - 1
Making = Callable[..., Any]


def stage_of(decoder: Making, name: str | None, seed: int) -> Stage:
    """An answer of `NEW` tokens behind a random prompt; neutral is one token a pass with nothing cached."""
    from tokenmill.diffuse import Diffusion, Quota

    model, ids = bidirectional(str(name), seed), prompts(seed)

    def run(method: Any) -> tuple[Tensor, ...]:
        made = Diffusion(Quota(1), seed=0) if method is None else decoder(method)
        return (fill(model, ids, made),)

    return Stage(run=run, inputs={"input_ids": ids}, model=model, error_at=4)


def bidirectional(name: str, seed: int) -> Any:
    """The tiny random masked diffusion model of a model type; its mask is the last id."""
    return models.tiny(name.removesuffix("_text"), seed=seed, vocab=VOCAB, bidirectional=True)


def prompts(seed: int, rows: int = 1, length: int = PROMPT) -> Tensor:
    """Random ids (rows, length) without mask and end."""
    return torch.randint(END + 1, MASK, (rows, length), generator=torch.Generator().manual_seed(seed))


def fill(model: Any, ids: Tensor, decoder: Any, new: int = NEW, mask: Tensor | None = None) -> Tensor:
    """Prompt and answer (B, T)."""
    return decoder.generate(model, ids, max_new_tokens=new, attention_mask=mask)


def prompt_is_untouched_and_no_mask_is_left(decoder: Making, case: Case) -> None:
    for name in case.card.works_with:
        model, ids = bidirectional(name, 1), prompts(1, rows=3)
        made = decoder(seeded(case.small(), 1))
        out = fill(model, ids, made)
        expect(torch.equal(out[:, :PROMPT], ids), f"{name}: the prompt was changed")
        expect(not bool((out == MASK).any()), f"{name}: a mask is in the output")
        expect(out.shape[1] <= PROMPT + NEW, f"{name}: {out.shape[1] - PROMPT} tokens, asked for {NEW}")


def revealed_tokens_stay(decoder: Making, case: Case) -> None:
    for name in case.card.works_with:
        made = decoder(seeded(case.small(), 2), history=True)
        out = fill(bidirectional(name, 2), prompts(2, rows=2), made)
        past = [*made.trace.history, out[:, PROMPT:]]
        for before, after in itertools.pairwise(past):
            width = min(before.shape[1], after.shape[1])
            seen = before[:, :width] != MASK
            same = torch.where(seen, before[:, :width] == after[:, :width], True)
            expect(bool(same.all()), f"{name}: a revealed token was changed")


def counts_add_up(decoder: Making, case: Case) -> None:
    for name in case.card.works_with:
        made = decoder(seeded(case.small(), 3))
        fill(bidirectional(name, 3), prompts(3, rows=2), made)
        trace = made.trace
        expect(trace.positions == sum(trace.row_positions), f"{name}: positions of rows do not add up")
        expect(trace.tokens == sum(trace.row_tokens) == sum(trace.revealed), f"{name}: tokens do not add up")
        expect(trace.model_calls == max(trace.row_calls), f"{name}: {trace.model_calls} calls, a row has more")
        most = [calls * (PROMPT + NEW) for calls in trace.row_calls]
        fine = all(fed <= limit for fed, limit in zip(trace.row_positions, most, strict=True))
        expect(fine, f"{name}: more positions than passes times places")
        expect(0 <= trace.accepted <= trace.tokens, f"{name}: {trace.accepted} accepted of {trace.tokens} tokens")


def every_pass_makes_headway(decoder: Making, case: Case) -> None:
    if getattr(decoder(case.small()).rule, "leaves_masks", False):
        raise DoesNotApply("the rule may leave masks, so a pass may reveal nothing")
    for name in case.card.works_with:
        made = decoder(seeded(case.small(), 4))
        fill(bidirectional(name, 4), prompts(4), made)
        expect(made.trace.model_calls <= NEW, f"{name}: {made.trace.model_calls} passes for {NEW} tokens")


def rows_equal_alone(decoder: Making, case: Case) -> None:
    if case.card.batch_coupled:
        raise DoesNotApply("rows influence each other by design, says the card")
    for name in case.card.works_with:
        model, ids = bidirectional(name, 5), prompts(5, rows=3)
        mask = torch.ones_like(ids)
        mask[1, :4], mask[2, :1] = 0, 0
        together = decoder(case.small(), seed=20)
        out = fill(model, ids, together, mask=mask)
        for row in range(3):
            own = int(mask[row].sum())
            alone = decoder(case.small(), seed=20 + row)
            answer = fill(model, ids[row : row + 1, PROMPT - own :], alone)[0, own:]
            length = together.trace.lengths[row]
            expect(alone.trace.lengths[0] == length, f"{name}: row {row} ends elsewhere in a batch")
            same = torch.equal(out[row, PROMPT : PROMPT + length], answer[:length])
            expect(same, f"{name}: row {row} of a batch differs from the row alone")
            expect(
                alone.trace.row_calls[0] == together.trace.row_calls[row]
                and alone.trace.row_positions[0] == together.trace.row_positions[row],
                f"{name}: row {row} of a batch takes other passes than alone",
            )


def trace_starts_anew_at_each_call(decoder: Making, case: Case) -> None:
    model, made = bidirectional(case.card.works_with[0], 6), decoder(case.small())
    first = fill(model, prompts(6), made)
    before = made.trace.counts()
    again = fill(model, prompts(6), made)
    same = torch.equal(first, again) and before == made.trace.counts()
    expect(same, "a second call of one decoder differs from the first")


def empty_answer_is_the_prompt(decoder: Making, case: Case) -> None:
    made, ids = decoder(case.small()), prompts(7)
    out = fill(bidirectional(case.card.works_with[0], 7), ids, made, new=0)
    expect(torch.equal(out, ids), "for no new tokens the prompt does not come back")


def mask_in_the_prompt_is_refused(decoder: Making, case: Case) -> None:
    ids = prompts(8)
    ids[0, 3] = MASK
    try:
        fill(bidirectional(case.card.works_with[0], 8), ids, decoder(case.small()))
    except TokenmillError as error:
        expect("infill" in str(error), f"the refusal does not name the way out: {error}")
        return
    expect(False, "a mask in the prompt is accepted")


_SHARED = (
    prompt_is_untouched_and_no_mask_is_left,
    revealed_tokens_stay,
    counts_add_up,
    every_pass_makes_headway,
    rows_equal_alone,
    trace_starts_anew_at_each_call,
    empty_answer_is_the_prompt,
    mask_in_the_prompt_is_refused,
)


def laws(decoder: Making) -> tuple[Law, ...]:
    """The laws of a method that ``decoder(method, **settings)`` makes a decoder of."""
    return tuple(Law(law.__name__.replace("_", " "), partial(law, decoder)) for law in _SHARED)
