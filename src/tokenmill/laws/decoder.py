"""Laws of decoders: callables for ``model.generate(..., custom_generate=decoder)``."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tokenmill.errors import TokenmillError

from . import Case, DoesNotApply, Law, Stage, expect
from .general import VOCAB, seeded, tiny_model

ON_MODELS = True
_PROMPT = 24  # beyond the window of the tiny model with sliding layers
_NEW = 20
_SAMPLES = 300


def stage(name: str | None, seed: int) -> Stage:
    """Greedy generation of `_NEW` tokens from a random prompt on a tiny model."""
    model = tiny_model(str(name), seed)
    ids = prompt(seed)
    return Stage(
        run=lambda decoder: (generate(model, ids, decoder),),
        inputs={"input_ids": ids},
        model=model,
        error_at=3,
    )


def prompt(seed: int, length: int = _PROMPT, rows: int = 1) -> Tensor:
    """Random ids (rows, length) with one repeated stretch, so that look-up drafts find something."""
    ids = torch.randint(1, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))
    half = length // 2
    ids[:, half : 2 * half] = ids[:, :half]
    return ids


def generate(model: Any, ids: Tensor, decoder: Any, **settings: Any) -> Tensor:
    """New tokens (rows, n) of ``generate`` with a decoder, or of plain ``generate`` for None."""
    settings = {"do_sample": False, "max_new_tokens": _NEW, "attention_mask": torch.ones_like(ids)} | settings
    if decoder is not None:
        settings["custom_generate"] = decoder
        # generate takes an argument of this name only from a callable that has it
        if "generator" in settings and "generator" not in inspect.signature(decoder).parameters:
            del settings["generator"]
    return model.generate(input_ids=ids, **settings)[:, ids.shape[1] :]


def greedy_equals_plain_greedy(case: Case) -> None:
    _only_if_exact(case)
    for name in case.card.works_with:
        for seed, length in ((0, 1), (1, 5), (2, _PROMPT), (3, 40)):
            model, ids = tiny_model(name, seed), prompt(seed, length)
            plain, ours = generate(model, ids, None), generate(model, ids, case.small())
            expect(
                torch.equal(plain, ours),
                f"{name}, prompt of {length}: plain {plain.tolist()}, this method {ours.tolist()}",
            )


def counts_add_up(case: Case) -> None:
    for name in case.card.works_with:
        decoder, model, ids = case.small(), tiny_model(name, 4), prompt(4)
        calls = _count_calls(model, lambda d=decoder, m=model, i=ids: generate(m, i, d))
        trace = decoder.trace
        drafted = getattr(trace, "drafted", trace.positions)
        expect(trace.tokens == _NEW, f"{name}: the trace counts {trace.tokens} tokens of {_NEW}")
        expect(len(trace.tokens_so_far) == _NEW, f"{name}: tokens_so_far holds {len(trace.tokens_so_far)} of {_NEW}")
        expect(trace.model_calls == calls, f"{name}: the trace counts {trace.model_calls} model calls of {calls}")
        expect(0 <= trace.accepted <= drafted, f"{name}: {trace.accepted} tokens accepted of {drafted} drafted")
        expect(trace.accepted <= trace.tokens, f"{name}: {trace.accepted} accepted, but {trace.tokens} tokens made")
        least = _PROMPT - 1 + trace.model_calls - 1  # a prefill without the last prompt token, then one a call
        expect(trace.positions >= least, f"{name}: only {trace.positions} positions are counted")


def trace_starts_anew_at_each_call(case: Case) -> None:
    decoder, model = case.small(), tiny_model(case.card.works_with[0], 5)
    for _ in range(2):
        generate(model, prompt(5), decoder, max_new_tokens=6)
        expect(decoder.trace.tokens == 6, f"after a call for 6 tokens the trace counts {decoder.trace.tokens}")


def samples_follow_the_target(case: Case) -> None:
    """Chi-square test of the first two sampled tokens against the model's exact probabilities."""
    _only_if_exact(case)
    model, ids = tiny_model(case.card.works_with[0], 6), prompt(6, 8)
    with torch.inference_mode():
        first = model(input_ids=ids).logits[0, -1].double().softmax(-1)
        every = torch.cat([ids.expand(VOCAB, -1), torch.arange(VOCAB)[:, None]], dim=1)
        second = first @ model(input_ids=every).logits[:, -1].double().softmax(-1)
    counts = torch.zeros(2, VOCAB, dtype=torch.float64)
    for seed in range(_SAMPLES):
        made = _sample(model, ids, case, seed=seed, tokens=2)
        counts[torch.arange(2), made[0]] += 1
    for place, (seen, law) in enumerate(zip(counts, (first, second), strict=True)):
        p = _chi_square(seen, law * _SAMPLES)
        expect(p > 1e-4, f"sampled token {place + 1} does not follow the target's law (p = {p:.1e})")


def sampling_repeats_under_a_seed(case: Case) -> None:
    model, ids = tiny_model(case.card.works_with[0], 13), prompt(13)
    first, again, other = (_sample(model, ids, case, seed=seed, tokens=_NEW) for seed in (0, 0, 1))
    expect(torch.equal(first, again), "two sampled runs with one seed differ")
    expect(not torch.equal(first, other), "sampled runs with two seeds are the same")


def batch_is_refused_or_rows_equal_alone(case: Case) -> None:
    model, ids = tiny_model(case.card.works_with[0], 7), prompt(7, rows=2)
    try:
        together = generate(model, ids, case.small())
    except TokenmillError as error:
        expect("2" in str(error), f"the refusal does not name the number of rows: {error}")
        return
    for row in range(2):
        alone = generate(model, ids[row : row + 1], case.small())
        expect(torch.equal(together[row : row + 1], alone), f"row {row} of a batch differs from the row alone")


def empty_prompt_is_refused(case: Case) -> None:
    model = tiny_model(case.card.works_with[0], 8)
    empty = torch.empty(1, 0, dtype=torch.long)
    try:
        generate(model, empty, case.small())
    except TokenmillError:
        return
    expect(False, "an empty prompt is accepted")


def end_token_stops_exactly(case: Case) -> None:
    for name in case.card.works_with:
        model, ids = tiny_model(name, 9), prompt(9)
        whole = generate(model, ids, None)[0].tolist()
        for at in (0, 3, 10):
            stop = {"eos_token_id": whole[at], "pad_token_id": 0}
            plain, ours = generate(model, ids, None, **stop), generate(model, ids, case.small(), **stop)
            _only_if_exact(case)
            expect(torch.equal(plain, ours), f"{name}: end token {whole[at]}: {plain.tolist()} became {ours.tolist()}")


def length_stops_exactly(case: Case) -> None:
    model, ids = tiny_model(case.card.works_with[0], 10), prompt(10)
    for n in (1, 2, 3, 7):
        made = generate(model, ids, case.small(), max_new_tokens=n).shape[1]
        expect(made == n, f"{made} tokens for max_new_tokens={n}")


def second_call_at_the_same_time_raises(case: Case) -> None:
    model, ids, decoder = tiny_model(case.card.works_with[0], 12), prompt(12), case.small()
    other = tiny_model(case.card.works_with[0], 12)
    refused: list[bool] = []

    def call_again(*_: Any) -> None:
        if refused:
            return
        refused.append(False)
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()

    def second() -> None:
        try:
            generate(other, ids, decoder)
        except TokenmillError:
            refused[0] = True

    handle = model.register_forward_pre_hook(call_again)
    try:
        made = generate(model, ids, decoder)
    finally:
        handle.remove()
    expect(refused == [True], "a second call on the same object, while the first still runs, is accepted")
    expect(torch.equal(made, generate(model, ids, case.small())), "the refused call disturbed the first one")


def _sample(model: Any, ids: Tensor, case: Case, *, seed: int, tokens: int) -> Tensor:
    """Sample from the unwarped law, with the seed given in every way that a decoder may take it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return generate(
            model,
            ids,
            seeded(case.small(), seed),
            generator=torch.Generator().manual_seed(seed),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=tokens,
        )


def _only_if_exact(case: Case) -> None:
    if not case.card.exact:
        raise DoesNotApply("the card does not claim to be exact")


def _count_calls(model: nn.Module, work: Callable[[], Any]) -> int:
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    handle = model.register_forward_hook(count)
    try:
        work()
    finally:
        handle.remove()
    return calls


def _chi_square(seen: Tensor, expected: Tensor) -> float:
    """p-value of counts (V,) against expected counts (V,); rare tokens are one bin."""
    rare = expected < 5
    bins = [(float(s), float(e)) for s, e in zip(seen[~rare], expected[~rare], strict=True)]
    if rare.any() and float(expected[rare].sum()) > 0:
        bins.append((float(seen[rare].sum()), float(expected[rare].sum())))
    statistic = sum((s - e) ** 2 / e for s, e in bins)
    half = torch.tensor([(len(bins) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


LAWS = Law.all(
    greedy_equals_plain_greedy,
    counts_add_up,
    trace_starts_anew_at_each_call,
    samples_follow_the_target,
    sampling_repeats_under_a_seed,
    batch_is_refused_or_rows_equal_alone,
    empty_prompt_is_refused,
    end_token_stops_exactly,
    length_stops_exactly,
    second_call_at_the_same_time_raises,
)
