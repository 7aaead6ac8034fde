from __future__ import annotations

import dataclasses
import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList, MinLengthLogitsProcessor, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from tests.diffuse import toys
from tokenmill.diffuse import (
    Denoiser,
    Diffusion,
    DualCache,
    Entropy,
    NoCache,
    PrefixCache,
    Quota,
    RandomReveal,
    Reveal,
    RevealRule,
    Snapshot,
    Threshold,
    nll_bound,
)
from tokenmill.diffuse._bound import bound_term
from tokenmill.errors import LimitError, NonFiniteError, StoppedError, UnsupportedError

IDS, PADDING = toys.prompts()


def test_generate_calls_the_decoder() -> None:
    model = toys.random_model()
    decoder = Diffusion(Threshold(0.3), DualCache(), block_length=4)
    out = model.generate(IDS, attention_mask=PADDING, custom_generate=decoder, max_new_tokens=10, do_sample=False)
    assert torch.equal(out, decoder.generate(model, IDS, attention_mask=PADDING, max_new_tokens=10))
    assert torch.equal(out[:, :9], IDS)
    asked: dict[str, Any] = {"custom_generate": decoder, "max_new_tokens": 10, "do_sample": False}
    whole = model.generate(IDS, attention_mask=PADDING, return_dict_in_generate=True, **asked)
    assert torch.equal(whole.sequences, out)


def test_counts_and_history_of_a_run() -> None:
    model = toys.random_model()
    seen: list[Snapshot] = []
    decoder = Diffusion(Quota(3), block_length=5, history=True, watch=seen.append)
    calls = toys.count_calls(model)
    out = decoder.generate(model, IDS, attention_mask=PADDING, max_new_tokens=10)
    trace = decoder.trace
    assert calls == [trace.model_calls + 1], "one pass more probes the model"
    assert trace.row_calls == [4, 4, 4]
    assert trace.revealed == [9, 6, 9, 6]
    assert trace.tokens == 30
    assert trace.row_tokens == trace.lengths == [10, 10, 10]
    assert trace.positions == 4 * (19 + 15 + 18) == sum(trace.row_positions)
    assert len(trace.history) == len(seen) == 4
    assert torch.equal(trace.history[-1], out[:, 9:])
    assert trace.tokens_so_far == out[0, 9:].tolist()
    for before, after, shot in zip([None, *trace.history], trace.history, seen, strict=False):
        assert torch.equal(shot.answer, after)
        old = torch.full_like(after, toys.MASK) if before is None else before
        assert torch.equal(shot.revealed[:, 9:], old != after)
        assert shot.share == pytest.approx(float((after != toys.MASK).float().mean()))
    assert [shot.call for shot in seen] == [1, 2, 3, 4]
    assert "prompt" not in trace.counts()


def test_rows_that_are_finished_leave_the_batch() -> None:
    model = toys.random_model()
    widths: list[int] = []
    model.register_forward_pre_hook(lambda _m, _a, kw: widths.append(kw["input_ids"].shape[0]), with_kwargs=True)
    for cache in (NoCache(), PrefixCache()):
        widths.clear()
        decoder = Diffusion(Threshold(0.25), cache)
        decoder.generate(model, IDS, attention_mask=PADDING, max_new_tokens=12)
        calls = decoder.trace.row_calls
        assert len(set(calls)) > 1, "the prompts were chosen so"
        ran = widths[-max(calls) :]
        assert ran == [sum(c > i for c in calls) for i in range(max(calls))]


def test_the_pairs_of_a_small_joint_are_sampled_exactly_one_at_a_time_and_not_two() -> None:
    """Family property 6: with the true conditionals, one token a pass in random order at temperature 1 samples the
    joint; two at once does not where they depend on each other."""
    generator = torch.Generator().manual_seed(2)
    joint = torch.rand(3, 3, 3, generator=generator, dtype=torch.float64) ** 3
    joint /= joint.sum()
    model, rows = toys.Joint(joint), 4000
    start = torch.full((rows, 1), 3)
    statistic = {}
    for n in (1, 3):
        decoder = Diffusion(RandomReveal(n), temperature=1.0, seed=7)
        out = decoder.generate(model, start, max_new_tokens=3)[:, 1:]
        seen = torch.bincount(out[:, 0] * 9 + out[:, 1] * 3 + out[:, 2], minlength=27).double()
        expected = joint.flatten() * rows
        common = expected >= 5
        groups = [(seen[common], expected[common]), (seen[~common].sum(), expected[~common].sum().clamp(min=1e-9))]
        statistic[n] = sum(float(((a - b) ** 2 / b).sum()) for a, b in groups)
        degrees = int(common.sum())
    assert statistic[1] < degrees + 4 * (2 * degrees) ** 0.5
    assert statistic[3] > 10 * degrees


def test_the_bound_of_a_uniform_predictor_is_ln_v() -> None:
    """Family property 5: in expectation ln V a token, whatever is masked."""
    uniform = torch.full((2, 2, 2, 2), 1 / 16)
    model = toys.Joint(uniform)
    denoiser = Denoiser(model, mask_token_id=3)
    x = torch.tensor([[2, 0, 1, 1, 0]])
    answer = torch.tensor([[False, True, True, True, True]])
    for weighting, loose in (("count", 1e-5), ("time", 0.1)):
        generator = torch.Generator().manual_seed(0)
        found = nll_bound(denoiser, x, answer, samples=400, weighting=weighting, generator=generator)  # type: ignore[arg-type]
        assert float(found) == pytest.approx(float(torch.tensor(2.0).log()), abs=loose)


def test_the_bound_is_the_mean_over_all_orders() -> None:
    """Family property 5: enumerated over all corruptions, it equals the likelihood over all orders of revealing."""
    generator = torch.Generator().manual_seed(5)
    joint = torch.rand(2, 2, 2, generator=generator, dtype=torch.float64) ** 2
    joint /= joint.sum()
    wrong = torch.rand(2, 2, 2, generator=generator, dtype=torch.float64)  # conditionals that belong to no joint
    model = toys.Joint(wrong / wrong.sum())
    denoiser = Denoiser(model, mask_token_id=3)
    x = torch.tensor([[2, 1, 0, 1]])
    answer = torch.tensor([[False, True, True, True]])

    def nll(masked: Tensor) -> Tensor:
        logp = denoiser.logits(torch.where(masked, 3, x)).logits.double().log_softmax(-1)
        return torch.where(masked, -logp.gather(-1, x[..., None])[..., 0], 0.0)

    import itertools
    import math

    sets = [torch.tensor([[False, *bits]]) for bits in itertools.product([False, True], repeat=3) if any(bits)]
    weights = [1 / 3 / math.comb(3, int(one.sum())) for one in sets]
    bound = sum(w * float(bound_term(nll(one), one, answer)) for w, one in zip(weights, sets, strict=True))
    orders = []
    for order in itertools.permutations((1, 2, 3)):
        left, total = answer.clone(), 0.0
        for place in order:
            total += float(nll(left)[0, place])
            left[0, place] = False
        orders.append(total / 3)
    assert bound == pytest.approx(sum(orders) / 6, rel=1e-6)
    found = nll_bound(denoiser, x, answer, samples=1200, generator=torch.Generator().manual_seed(1))
    assert float(found) == pytest.approx(bound, rel=0.05)
    timed = nll_bound(denoiser, x, answer, samples=1200, weighting="time", generator=torch.Generator().manual_seed(1))
    assert float(timed) == pytest.approx(bound, rel=0.1)


def test_the_bound_refuses_what_it_cannot_do() -> None:
    denoiser = Denoiser(toys.random_model(), mask_token_id=toys.MASK)
    answer = torch.ones_like(IDS, dtype=torch.bool)
    with pytest.raises(LimitError, match="samples"):
        nll_bound(denoiser, IDS, answer, samples=0)
    with pytest.raises(LimitError, match="weighting"):
        nll_bound(denoiser, IDS, answer, weighting="evenly")  # type: ignore[arg-type]
    with pytest.raises(LimitError, match="answer"):
        nll_bound(denoiser, IDS, answer & (IDS < 0))


def test_quotas_follow_the_steps() -> None:
    model = toys.random_model()
    for steps, length, revealed in (
        (4, None, [3, 3, 3, 2]),
        (6, 4, [2, 2, 2, 2, 2, 1]),
        (5, 4, [2, 2, 2, 2, 3]),
        (2, 4, [4, 4, 3]),
    ):
        decoder = Diffusion(Quota(None), steps=steps, block_length=length)
        decoder.generate(model, IDS[:1], max_new_tokens=11)
        assert decoder.trace.revealed == revealed
    decoder = Diffusion(Entropy(None), steps=11, schedule="linear")
    decoder.generate(model, IDS[:1], max_new_tokens=11)
    assert sum(decoder.trace.revealed) == 11
    assert decoder.trace.revealed[0] == 0
    free = Diffusion(Entropy(None), schedule="linear")
    free.generate(model, IDS[:1], max_new_tokens=11)
    assert free.trace.revealed == decoder.trace.revealed
    fixed = Diffusion(Quota(4), steps=11)
    fixed.generate(model, IDS[:1], max_new_tokens=11)
    assert fixed.trace.revealed == [4, 4, 3]


def test_the_temperature_comes_from_the_decoder_or_from_generate() -> None:
    model = toys.random_model()

    def made(seed: int = 4, temperature: float | None = None, **asked: Any) -> Tensor:
        decoder = Diffusion(Quota(2), seed=seed, temperature=temperature)
        return model.generate(IDS, custom_generate=decoder, max_new_tokens=10, **asked)

    greedy = made(do_sample=False)
    assert torch.equal(made(temperature=0.0, do_sample=True), greedy)
    drawn = made(do_sample=True, temperature=2.0, top_k=0, top_p=1.0)
    assert not torch.equal(drawn, greedy)
    assert torch.equal(drawn, made(do_sample=True, temperature=2.0, top_k=0, top_p=1.0))
    assert not torch.equal(drawn, made(seed=5, do_sample=True, temperature=2.0, top_k=0, top_p=1.0))
    direct = Diffusion(Quota(2), seed=4, temperature=2.0).generate(model, IDS, max_new_tokens=10)
    assert torch.equal(drawn, direct)
    assert torch.equal(made(do_sample=True, temperature=2.0, top_k=1), greedy)
    assert torch.equal(made(do_sample=True, temperature=2.0, top_k=0, top_p=1e-6), greedy)


def test_chance_comes_from_the_seed_the_generator_or_torch() -> None:
    model, decoder = toys.random_model(), Diffusion(RandomReveal(1), temperature=1.5)

    def made(seed: int, way: str) -> Tensor:
        generator = torch.Generator().manual_seed(seed) if way == "generator" else None
        one = dataclasses.replace(decoder, seed=seed) if way == "seed" else decoder
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed if way == "torch" else 99)
            state = torch.get_rng_state()
            out = one.generate(model, IDS, max_new_tokens=8, generator=generator)
            assert torch.equal(state, torch.get_rng_state()) == (way != "torch")
        return out

    for way in ("seed", "generator", "torch"):
        assert torch.equal(made(1, way), made(1, way))
        assert not torch.equal(made(1, way), made(2, way))
    one, two = made(1, "seed")[0], decoder.generate(model, IDS[:1].repeat(2, 1), max_new_tokens=8)
    assert one.shape == (17,)
    assert not torch.equal(two[0], two[1]), "equal prompts draw on their own"


class Stream(BaseStreamer):
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.parts: list[list[int]] = []
        self.ended = 0

    def put(self, value: Tensor) -> None:
        self.parts.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended += 1


def test_text_is_streamed_as_far_as_it_is_final() -> None:
    model, stream = toys.random_model(), Stream()
    decoder = Diffusion(Threshold(0.4), block_length=4)
    out = model.generate(IDS[:1], custom_generate=decoder, max_new_tokens=10, do_sample=False, token_streamer=stream)
    assert [i for part in stream.parts for i in part] == out[0].tolist()
    assert stream.parts[0] == IDS[0].tolist()
    assert len(stream.parts) > 2
    assert stream.ended == 1
    broken = Stream()
    with pytest.raises(LimitError, match="infill"):
        model.generate(
            IDS[:1].fill_diagonal_(toys.MASK), custom_generate=decoder, max_new_tokens=4, token_streamer=broken
        )
    IDS[0, 0] = toys.prompts()[0][0, 0]
    assert broken.ended == 1


def test_masks_inside_the_prompt_are_filled_on_request() -> None:
    model = toys.random_model()
    ids = IDS.clone()
    ids[0, 2:4], ids[1, 6], ids[2, 8] = toys.MASK, toys.MASK, toys.MASK
    with pytest.raises(LimitError, match=r"mask id 31 \(row 0, place 2\)"):
        Diffusion(Quota(1)).generate(model, ids, attention_mask=PADDING, max_new_tokens=4)
    for cache in (None, PrefixCache(), DualCache()):
        decoder = Diffusion(Quota(1), cache, infill=True, block_length=2)
        out = decoder.generate(model, ids, attention_mask=PADDING, max_new_tokens=4)
        assert not (out == toys.MASK).any()
        assert torch.equal(out[:, :9][ids != toys.MASK], ids[ids != toys.MASK])
        assert decoder.trace.row_calls == [6, 5, 5]
        only = decoder.generate(model, ids, attention_mask=PADDING, max_new_tokens=0)
        assert only.shape == (3, 9)
        assert not (only == toys.MASK).any()
    with pytest.raises(LimitError, match="start"):
        Diffusion(Quota(1), infill=True, logits_shift=True).generate(
            model, ids.masked_fill(torch.arange(9) == 0, toys.MASK), max_new_tokens=2
        )


class Cutting(RevealRule):
    """Reveals one place a pass; in its third pass cuts row b behind place 12 + b."""

    def reveal(self, proposal: Any) -> Reveal:
        canvas = proposal.canvas
        places = Quota(1).reveal(proposal)
        return Reveal(places, cut=torch.where(canvas.passes == 2, 12 + canvas.row, -1))


@pytest.mark.parametrize("cache", [NoCache(), PrefixCache(), DualCache(refresh=2)], ids=repr)
def test_a_rule_may_cut_each_row_elsewhere(cache: Any) -> None:
    model = toys.random_model()
    decoder = Diffusion(Cutting(), cache, block_length=3)
    out = decoder.generate(model, IDS, attention_mask=PADDING, max_new_tokens=12)
    trace = decoder.trace
    assert trace.lengths == trace.row_tokens == [4, 5, 6]
    assert trace.row_calls == [4, 5, 6]
    assert out.shape == (3, 9 + 6)
    assert out[0, 13:].tolist() == [0, 0]
    assert not (out == toys.MASK).any()
    # What is cut is gone from later passes: three passes over the whole, then over what is left.
    if isinstance(cache, NoCache):
        assert trace.row_positions[0] == 3 * 21 + 13
        assert trace.row_positions[2] == 3 * 20 + 3 * 14
    # Cutting is the same as never having had the tail, from then on.
    shorter = Diffusion(Quota(1), cache, block_length=3)
    if isinstance(cache, DualCache):
        for row in range(3):
            ids = out[row : row + 1, 9 - int(PADDING[row].sum()) : 12]
            whole = shorter.generate(model, ids, max_new_tokens=trace.lengths[row] - 3)
            assert torch.equal(whole[0, -(trace.lengths[row] - 3) :], out[row, 12 : 9 + trace.lengths[row]])


class Leaving(RevealRule):
    """Gives up the first block of row 1 after two passes."""

    leaves_masks = True

    def reveal(self, proposal: Any) -> Reveal:
        canvas = proposal.canvas
        leave = (canvas.row == 1) & (canvas.passes == 1)
        return Reveal(Quota(1).reveal(proposal), leave=leave)


def test_a_rule_may_give_up_a_block() -> None:
    model = toys.random_model()
    decoder = Diffusion(Leaving(), block_length=4)
    out = decoder.generate(model, IDS, attention_mask=PADDING, max_new_tokens=8)
    assert decoder.trace.still_masked == [False, True, False]
    assert decoder.trace.row_calls == [8, 6, 8]
    assert decoder.trace.row_tokens == [8, 6, 8]
    assert (out[1, 9:13] == 0).sum() == 2
    assert not (out == toys.MASK).any()

    class Silent(Leaving):
        leaves_masks = False

    with pytest.raises(StoppedError, match="Silent gave up masks of row 1"):
        Diffusion(Silent(), block_length=4).generate(model, IDS, attention_mask=PADDING, max_new_tokens=8)


def test_a_rule_that_stands_still_is_stopped() -> None:
    class Idle(RevealRule):
        def reveal(self, proposal: Any) -> Tensor:
            return torch.zeros_like(proposal.eligible)

    with pytest.raises(StoppedError, match="Idle has not finished") as caught:
        Diffusion(Idle()).generate(toys.random_model(), IDS[:1], max_new_tokens=3)
    assert caught.value.partial == [[]]


def test_only_eligible_places_are_revealed() -> None:
    class Greedy(RevealRule):
        def reveal(self, proposal: Any) -> Reveal:
            every = torch.ones_like(proposal.eligible)
            return Reveal(every, tokens=torch.full_like(proposal.drafts, 7))

    decoder = Diffusion(Greedy(), block_length=4)
    out = decoder.generate(toys.random_model(), IDS, attention_mask=PADDING, max_new_tokens=8)
    assert torch.equal(out[:, :9], IDS)
    assert (out[:, 9:] == 7).all()
    assert decoder.trace.row_calls == [2, 2, 2]


def test_end_tokens_in_a_row_stop_early() -> None:
    class Ends(toys.Llada):
        """Says the end everywhere but in the first two places of the answer."""

        def forward(self, input_ids: Tensor, attention_mask: Any = None, attention_bias: Any = None) -> Any:
            out = super().forward(input_ids, attention_mask)
            out.logits[:, 11:, toys.END] += 30.0
            return out

    model = Ends()
    ids = IDS.clone()
    ids[:, 4:8] = toys.END  # in the prompt they stop nothing
    settings: dict[str, Any] = {"mask_token_id": toys.MASK, "eot_id": toys.END, "block_length": 1}
    for count in (1, 3):
        decoder = Diffusion(Quota(1), early_stop=count, **settings)
        out = decoder.generate(model, ids, max_new_tokens=12)
        assert decoder.trace.lengths == [2 + count] * 3
        assert (out[:, 11:] == toys.END).all()
        assert out.shape[1] == 11 + count
    whole = Diffusion(Quota(1), **settings).generate(model, ids, max_new_tokens=12)
    assert whole.shape[1] == 21


def test_the_mask_and_the_shift_come_from_the_configuration() -> None:
    model = toys.random_model()
    model.config.logits_shift = True
    ours = Diffusion(Quota(2)).generate(model, IDS, max_new_tokens=6)
    model.config.logits_shift = False
    assert torch.equal(ours, Diffusion(Quota(2), logits_shift=True).generate(model, IDS, max_new_tokens=6))
    assert not torch.equal(ours, Diffusion(Quota(2)).generate(model, IDS, max_new_tokens=6))
    model.config.mask_token_id = None
    with pytest.raises(LimitError, match="mask_token_id"):
        Diffusion(Quota(2)).generate(model, IDS, max_new_tokens=6)


def test_an_empty_answer_or_batch_gives_the_input_back() -> None:
    model = toys.random_model()
    assert torch.equal(Diffusion(Quota(1)).generate(model, IDS, max_new_tokens=0), IDS)
    assert Diffusion(Quota(1)).generate(model, IDS[:0], max_new_tokens=5).shape == (0, 9)
    with pytest.raises(LimitError, match="max_new_tokens"):
        Diffusion(Quota(1)).generate(model, IDS, max_new_tokens=-1)


def test_an_empty_prompt_needs_no_shift() -> None:
    model, none = toys.random_model(), torch.empty(2, 0, dtype=torch.long)
    assert Diffusion(Quota(1)).generate(model, none, max_new_tokens=5).shape == (2, 5)
    with pytest.raises(LimitError, match="bos"):
        Diffusion(Quota(1), logits_shift=True).generate(model, none, max_new_tokens=5)


@pytest.mark.parametrize("ids", [{"pad_token_id": toys.MASK}, {"eos_token_id": toys.MASK}])
def test_ids_that_coincide_with_the_mask_are_refused(ids: dict[str, int]) -> None:
    model = toys.random_model()
    for name, value in ids.items():
        setattr(model.generation_config, name, value)
    with pytest.raises(LimitError, match="mask_token_id = 31"):
        Diffusion(Quota(1)).generate(model, IDS, max_new_tokens=4)


def test_padding_may_be_the_end() -> None:
    """Dream pads with its end token."""
    model = toys.random_model()
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = toys.END
    out = Diffusion(Quota(1)).generate(model, IDS, attention_mask=PADDING, max_new_tokens=4)
    assert out.shape == (3, 13)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_stop_with_what_there_is(value: float) -> None:
    model = toys.random_model()
    calls = toys.count_calls(model)

    def spoil(_m: Any, _i: Any, out: Tensor) -> Tensor | None:
        return out.index_fill(-1, torch.tensor([4]), value) if calls[0] == 5 else None

    model.lm_head.register_forward_hook(spoil)
    decoder = Diffusion(Quota(2))
    with pytest.raises(NonFiniteError, match="at call 4") as caught:
        decoder.generate(model, IDS, attention_mask=PADDING, max_new_tokens=12)
    assert [len(row) for row in caught.value.partial] == [6, 6, 6]


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"block_length": 0}, "block_length"),
        ({"steps": 0}, "steps"),
        ({"schedule": "cosine"}, "schedule"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"early_stop": -1}, "early_stop"),
        ({"seed": -1}, "seed"),
        ({"mask_token_id": -5}, "mask_token_id"),
        ({"cache": PrefixCache}, "cache"),
    ],
)
def test_bad_settings_are_refused_by_name(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(LimitError, match=text):
        Diffusion(Quota(1), **settings)


def test_a_class_is_no_rule() -> None:
    for bad in (Quota, None, 0.9):
        with pytest.raises(LimitError, match="rule"):
            Diffusion(bad)  # type: ignore[arg-type]


def test_what_reads_from_left_to_right_is_refused() -> None:
    model, decoder = toys.random_model(), Diffusion(Quota(1))
    asked: dict[str, Any] = {"custom_generate": decoder, "max_new_tokens": 4}
    processors = LogitsProcessorList([MinLengthLogitsProcessor(3, 1)])
    with pytest.raises(UnsupportedError, match="MinLengthLogitsProcessor"):
        model.generate(IDS, logits_processor=processors, **asked)
    with pytest.raises(UnsupportedError, match="stopping criteria"):
        model.generate(IDS, stopping_criteria=StoppingCriteriaList([lambda *_, **__: torch.zeros(3).bool()]), **asked)
    with pytest.raises(UnsupportedError, match="num_beams"):
        model.generate(IDS, num_beams=2, **asked)
    with pytest.raises(UnsupportedError, match="scores"):
        model.generate(IDS, return_dict_in_generate=True, output_scores=True, **asked)
    right = PADDING.flip(1)
    with pytest.raises(UnsupportedError, match="left"):
        model.generate(IDS, attention_mask=right, **asked)
    with pytest.raises(LimitError, match="attention_mask"):
        decoder.generate(model, IDS, attention_mask=PADDING[:, 1:], max_new_tokens=4)
    with pytest.raises(LimitError, match="input_ids"):
        decoder.generate(model, IDS[0], max_new_tokens=4)
    with pytest.raises(LimitError, match="512, the model's positions"):
        decoder.generate(model, IDS, max_new_tokens=600)


def test_a_second_call_at_the_same_time_is_refused() -> None:
    model, decoder, refused = toys.random_model(), Diffusion(Quota(2)), []

    def again() -> None:
        try:
            decoder.generate(toys.random_model(), IDS, max_new_tokens=4)
        except StoppedError as error:
            refused.append(str(error))

    def interrupt(*_: Any) -> None:
        if not refused:
            thread = threading.Thread(target=again)
            thread.start()
            thread.join()

    handle = model.register_forward_pre_hook(interrupt)
    out = decoder.generate(model, IDS, max_new_tokens=6)
    handle.remove()
    assert len(refused) == 1
    assert torch.equal(out, Diffusion(Quota(2)).generate(model, IDS, max_new_tokens=6))
