from __future__ import annotations

import math
import warnings
from collections import Counter
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MaxLengthCriteria,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
)
from transformers.cache_utils import DynamicCache

from tests.decode.chance import chi_square, joint_law
from tests.decode.conftest import Zoo
from tests.decode.test_smc import Language, Likes
from tests.decode.test_token_recycling import KINDS, Listener, StopsAt, generate, prompt
from tokenmill import models
from tokenmill.decode._constrained_logits import AWRSLogitsProcessor
from tokenmill.decode._dfa import DFA
from tokenmill.decode._oracle import Oracle
from tokenmill.decode._particles import Particles
from tokenmill.decode._population import SMCTrace, common_prefix
from tokenmill.decode._request import Request
from tokenmill.decode._smc import Sampler, SMCSettings
from tokenmill.decode._weights import NoValidContinuation, WeightedSequences
from tokenmill.decode.awrs import AWRS, small
from tokenmill.errors import LimitError, NonFiniteError, StoppedError, UnsupportedError
from tokenmill.models import tiny
from tokenmill.text import TokenBytes

V, END = 64, 3
BYTES = TokenBytes.from_list([bytes([i]) for i in range(V)])
FOUR = TokenBytes.from_list([b"a", b"b", b"ab", None], {"<end>": END})
SAMPLED: dict[str, Any] = {"do_sample": True, "top_k": 0, "top_p": 1.0}
IDS = torch.tensor([[1, 3, 2, 2]])


def everything() -> DFA:
    return DFA([[0] * 256], [True])


def mod_three() -> DFA:
    """Bytes below 64 whose sum is 0 or 1 modulo 3 at every place: about two thirds are valid everywhere."""
    table = [[(s + b) % 3 if (s + b) % 3 < 2 and b < V else -1 for b in range(256)] for s in range(2)]
    return DFA(table, [True, True])


def letters(*strings: bytes, dead_ends: tuple[bytes, ...] = ()) -> Language:
    return Language(strings, dead_ends)


class Follows:
    """A wrapper that compares each row of log-probabilities with a fresh forward over the particle's whole text."""

    def __init__(self, inner: Particles, model: Any, ids: Tensor, processors: LogitsProcessorList) -> None:
        self.inner, self.model, self.ids, self.processors = inner, model, ids, processors
        self.texts: list[list[int]] = []
        self.worst, self.moved, self.rows = 0.0, 0, list[int]()

    def _compare(self, law: Tensor) -> Tensor:
        self.rows.append(len(self.texts))
        text = torch.cat([self.ids.expand(len(self.texts), -1), torch.tensor(self.texts).long()], dim=1)
        with torch.no_grad():
            scores = self.model(input_ids=text, use_cache=False).logits[:, -1].float()
        fresh = self.processors(text, scores).double().log_softmax(1)  # pyright: ignore[reportArgumentType]
        self.worst = max(self.worst, float((fresh - law).abs().max()))
        return law

    def start(self, n: int) -> Tensor:
        self.texts = [[] for _ in range(n)]
        return self._compare(self.inner.start(n))

    def step(self, tokens: Tensor) -> Tensor:
        self.texts = [[*text, token] for text, token in zip(self.texts, tokens.tolist(), strict=True)]
        return self._compare(self.inner.step(tokens))

    def select(self, rows: Tensor) -> None:
        self.moved += int(rows.tolist() != list(range(len(self.texts))))
        self.texts = [self.texts[i] for i in rows.tolist()]
        self.inner.select(rows)


def request_of(model: Any, ids: Tensor, **kwargs: Any) -> Request:
    """What generate would hand over."""
    given = {"past_key_values": DynamicCache(config=model.config), "use_cache": True} | kwargs
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.5), TemperatureLogitsWarper(1.3)])
    return Request(model, ids, processors, StoppingCriteriaList(), model.generation_config, given)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("length", "end"), [(5, []), (16, []), (40, []), (40, [7])])
def test_moved_rows_of_the_cache_are_those_of_a_fresh_forward(kind: str, length: int, end: list[int]) -> None:
    """Prompts below, at and beyond the window of 16, and texts beyond it; rows move at nearly every step.

    With an end token rows also leave the batch.
    """
    model, ids, trace = tiny(kind, seed=3, dtype=torch.float64), prompt(length), SMCTrace()
    request = request_of(model, ids)
    follows = Follows(Particles("test", request, trace), model, ids, request.logits_processor)
    oracle = Oracle("test", mod_three(), BYTES, end, trace)
    settings = SMCSettings(n_particles=6, ess_threshold=1.0, resampling="multinomial", boundary="prefix")
    run = Sampler("test", settings, follows, oracle, generator=torch.Generator().manual_seed(length))
    found = run.run(26)
    assert follows.worst < 1e-5  # logits are float32 from here on
    assert follows.moved >= (2 if end else 16)
    assert [len(text) for text in found.sequences] == [26] * 6 or end
    assert request.model_kwargs["past_key_values"].get_seq_length() == length
    assert trace.model_calls == len(follows.rows)
    assert trace.positions == length + sum(follows.rows[1:])


@pytest.mark.parametrize("kind", KINDS)
def test_left_padding_and_gapped_positions_are_followed(kind: str) -> None:
    model, ids = tiny(kind, seed=3, dtype=torch.float64), prompt(9)
    for given in (
        {"attention_mask": torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1]])},
        {"position_ids": torch.tensor([[0, 1, 2, 10, 11, 12, 30, 31, 32]])},
    ):
        laws = []
        for together in (True, False):
            particles = Particles("test", request_of(model, ids, **given), SMCTrace())
            if together:
                particles.start(3)
                particles.step(torch.tensor([5, 6, 7]))
                particles.select(torch.tensor([2, 2, 0]))
                laws.append(particles.step(torch.tensor([8, 9, 10])))
                continue
            for first, second in ((7, 8), (7, 9), (5, 10)):
                particles = Particles("test", request_of(model, ids, **given), SMCTrace())
                particles.start(1)
                particles.step(torch.tensor([first]))
                laws.append(particles.step(torch.tensor([second])))
        assert torch.allclose(laws[0], torch.cat(laws[1:]), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_makes_no_difference_also_without_positions(kind: str) -> None:
    """A proposal model is given no positions: they follow the mask."""
    model, ids, laws = tiny(kind, seed=3, dtype=torch.float64), prompt(9), []
    ids[:, :3] = ids[:, 3]  # the penalty for repetition reads padding too
    for text, given in ((ids, {"attention_mask": torch.tensor([[0] * 3 + [1] * 6])}), (ids[:, 3:], {})):
        particles = Particles("test", request_of(model, text, **given), SMCTrace())
        laws.append((particles.start(2), particles.step(torch.tensor([5, 6])), particles.step(torch.tensor([7, 8]))))
    for padded, bare in zip(*laws, strict=True):
        assert torch.allclose(padded, bare, atol=1e-6)


def exact_masses(model: Any, language: Language, most: int) -> dict[bytes, float]:
    """p(text) of the strings of a language, end token within ``most`` tokens, by enumeration."""
    found: dict[bytes, float] = {}
    for length in range(1, most + 1):
        for text, share in joint_law(model, IDS, length).items():
            if text[-1] == END and END not in text[:-1]:
                data = FOUR.join(text[:-1])
                if data in language.strings:
                    found[data] = found.get(data, 0.0) + share
    return found


def four(seed: int = 5) -> Any:
    return tiny("llama", seed=seed, vocab=4, layers=1, dtype=torch.float64)


LANGUAGE = letters(b"ab", b"aba", b"b", b"bb", dead_ends=(b"aab", b"bab", b"abab"))


@pytest.mark.prop("awrs", 6)
@pytest.mark.parametrize("extra", ["", "proposal", "critic"])
def test_generate_estimates_the_mass_of_the_constraint(extra: str) -> None:
    """End to end: model, cache, particles, end token and length limit; means over runs equal enumeration."""
    model, scores = four(), {b"ab": 1.0, b"b": -1.0}
    settings: dict[str, Any] = {}
    if extra == "proposal":
        settings["proposal"] = four(6)
    if extra == "critic":
        settings["critic"] = Likes(scores, 0.3)
    masses = exact_masses(model, LANGUAGE, 4)
    if extra == "critic":
        masses = {text: mass * math.exp(scores.get(text, 0.0)) for text, mass in masses.items()}
    decoder = AWRS(LANGUAGE, FOUR, n_particles=4, ess_threshold=0.8, **settings)
    seeded, totals = torch.Generator().manual_seed(2), []
    for _ in range(100):
        try:
            generate(model, IDS, decoder, max_new_tokens=4, eos_token_id=END, generator=seeded, **SAMPLED)
        except NoValidContinuation:
            assert not decoder.sequences.alive
        posterior, mass = decoder.sequences.posterior(), math.exp(decoder.sequences.log_ml)
        totals.append([mass * posterior.get(text, 0.0) for text in masses] + [mass])
        assert set(posterior) <= set(masses)
    found = torch.tensor(totals, dtype=torch.float64)
    expected = torch.tensor([*masses.values(), math.fsum(masses.values())], dtype=torch.float64)
    error = found.std(0) / len(totals) ** 0.5
    common = expected > 0.05 * float(expected[-1])
    assert bool(((found.mean(0) - expected).abs() < 4 * error + 1e-9)[common].all())
    assert (decoder.trace.proposal_calls > 0) == (extra == "proposal")
    assert (decoder.trace.critic_calls > 0) == (extra == "critic")


@pytest.mark.prop("awrs", 8)
def test_the_result_is_drawn_by_weight_and_is_whole() -> None:
    model, decoder = four(), AWRS(LANGUAGE, FOUR, n_particles=12)
    seeded, shares, drawn = torch.Generator().manual_seed(4), Counter[bytes](), Counter[bytes]()
    for _ in range(80):
        made = generate(model, IDS, decoder, max_new_tokens=4, eos_token_id=END, generator=seeded, **SAMPLED)
        ids = made[0, IDS.shape[1] :].tolist()
        assert ids[-1] == END
        assert LANGUAGE.complete(FOUR.join(ids[:-1])) == 0
        assert ids in decoder.sequences.sequences
        assert decoder.trace.tokens_so_far == ids
        assert decoder.trace.tokens == len(ids)
        drawn[FOUR.join(ids[:-1])] += 1
        shares.update(decoder.sequences.posterior())
    for text, share in shares.items():
        assert abs(drawn[text] - share) < 4 * math.sqrt(share) + 1


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_with_everything_allowed_is_plain_greedy(zoo: Zoo, kind: str) -> None:
    model, ids = zoo(kind, "sdpa"), prompt(20)
    plain = generate(model, ids, max_new_tokens=20)
    assert torch.equal(generate(model, ids, small(), max_new_tokens=20), plain)
    end = int(plain[0, 26])
    stopped = generate(model, ids, max_new_tokens=20, eos_token_id=end, pad_token_id=0)
    ours = generate(model, ids, small(), max_new_tokens=20, eos_token_id=end, pad_token_id=0)
    assert torch.equal(ours, stopped)


class Mask:
    """The slow twin of greedy: every token of the vocabulary is checked."""

    def __init__(self, constraint: DFA, start: int) -> None:
        self.constraint, self.start = constraint, start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        text = BYTES.join(input_ids[0, self.start :].tolist())
        allowed = [self.constraint.prefix(text + bytes([i])) == 0 for i in range(V)]
        return scores.masked_fill(~torch.tensor(allowed), -math.inf)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_takes_the_likeliest_valid_token(zoo: Zoo, kind: str) -> None:
    model, ids = zoo(kind, "sdpa"), prompt(11)
    masked = generate(model, ids, max_new_tokens=20, logits_processor=[Mask(mod_three(), 11)])
    decoder = AWRS(mod_three(), BYTES)
    assert torch.equal(generate(model, ids, decoder, max_new_tokens=20), masked)
    assert len(decoder.sequences) == 1
    assert decoder.sequences.log_ml == 0.0
    assert 20 <= decoder.trace.checks < 20 * 8


@pytest.mark.prop("awrs", 9)
def test_a_seed_repeats_a_run(zoo: Zoo) -> None:
    model, ids = zoo("qwen2", "sdpa"), prompt(8)
    made = []
    for seed in (1, 1, 2):
        decoder = AWRS(mod_three(), BYTES, seed=seed)
        text = generate(model, ids, decoder, **SAMPLED)
        made.append((text.tolist(), decoder.sequences))
    assert made[0] == made[1]
    assert made[0] != made[2]


def test_unfinished_texts_live_or_die_at_the_limit() -> None:
    model = four()
    long = letters(b"a" * 9)
    for boundary, alive in (("prefix", True), ("eos", False)):
        decoder = AWRS(long, FOUR, boundary=boundary, n_particles=3)  # pyright: ignore[reportArgumentType]
        if alive:
            made = generate(model, IDS, decoder, max_new_tokens=5, eos_token_id=END, **SAMPLED)
            assert made.shape[1] == IDS.shape[1] + 5
            assert decoder.sequences.finished == [False] * 3
            continue
        with pytest.raises(NoValidContinuation, match=r"all 3 particles died at step 5; raise n_particles.*max_new"):
            generate(model, IDS, decoder, max_new_tokens=5, eos_token_id=END, **SAMPLED)
    # without an end token there is nothing to force
    assert generate(model, IDS, AWRS(long, FOUR), max_new_tokens=5, **SAMPLED).shape[1] == IDS.shape[1] + 5


def test_when_all_particles_die_the_error_has_them() -> None:
    trap = letters(dead_ends=(b"ba",))
    decoder, named = AWRS(trap, FOUR, n_particles=4), r"all 4 particles died at step 3; raise n_p.*check prefix\(\)\."
    with pytest.raises(NoValidContinuation, match=named) as caught:
        generate(four(), IDS, decoder, max_new_tokens=9, eos_token_id=END, **SAMPLED)
    assert isinstance(caught.value.partial, WeightedSequences)
    assert caught.value.partial == decoder.sequences
    assert caught.value.partial.log_ml == -math.inf
    assert caught.value.partial.texts == [b"ba"] * 4
    assert decoder.trace.died_at == 3


def test_length_and_the_callers_criteria_stop_exactly(zoo: Zoo) -> None:
    model, ids = zoo("llama", "sdpa"), prompt(10)
    plain = generate(model, ids, max_new_tokens=12)[0].tolist()
    stop = StopsAt(plain[14:16])
    made = generate(model, ids, small(), max_new_tokens=12, stopping_criteria=StoppingCriteriaList([stop]))
    assert made[0].tolist() == plain[:16]
    assert stop.lengths == list(range(11, 17))
    sooner = StoppingCriteriaList([MaxLengthCriteria(14)])
    assert generate(model, ids, small(), max_new_tokens=12, stopping_criteria=sooner)[0].tolist() == plain[:14]
    for n in (1, 2, 5):
        assert generate(model, ids, AWRS(mod_three(), BYTES), max_new_tokens=n, **SAMPLED).shape[1] == 10 + n


def test_streamed_tokens_are_certain_and_complete(zoo: Zoo) -> None:
    model, ids = zoo("llama", "sdpa"), prompt(6)
    for n in (1, 6):
        listener, decoder = Listener(), AWRS(mod_three(), BYTES, n_particles=n, seed=3, ess_threshold=0.9)
        made = generate(model, ids, decoder, token_streamer=listener, **SAMPLED)
        assert listener.heard == made[0].tolist()
        assert listener.ends == 1


def test_the_common_prefix_of_texts() -> None:
    assert common_prefix([[1, 2, 3], [1, 2], [1, 2, 4]]) == [1, 2]
    assert common_prefix([[1], [2], [1]]) == []
    assert common_prefix([[5, 6]]) == [5, 6]
    assert common_prefix([[], [1]]) == []


def test_outputs_are_those_that_a_weighted_draw_has(zoo: Zoo) -> None:
    model, ids = zoo("llama", "sdpa"), prompt(6)
    out = generate(model, ids, AWRS(mod_three(), BYTES, seed=1), return_dict_in_generate=True, **SAMPLED)
    plain = generate(model, ids, AWRS(mod_three(), BYTES, seed=1), **SAMPLED)
    assert torch.equal(out.sequences, plain)
    assert out.past_key_values.get_seq_length() == 6
    for wanted in ("output_scores", "output_logits", "output_attentions"):
        with pytest.raises(UnsupportedError):
            generate(model, ids, small(), return_dict_in_generate=True, **{wanted: True})


def test_the_callers_cache_keeps_the_prompt_and_can_be_used_again(zoo: Zoo) -> None:
    model, ids = zoo("gemma3", "sdpa"), prompt(30)
    cache = DynamicCache(config=model.config)
    first = generate(model, ids, AWRS(mod_three(), BYTES), past_key_values=cache, **SAMPLED)
    assert cache.get_seq_length() == 30
    decoder = AWRS(mod_three(), BYTES)
    again = generate(model, first, decoder, past_key_values=cache)
    assert torch.equal(again, generate(model, first, AWRS(mod_three(), BYTES)))
    assert decoder.trace.positions == first.shape[1] - 30 + 13


def test_counts_are_those_of_the_model(zoo: Zoo) -> None:
    model, ids = zoo("llama", "sdpa"), prompt(7)
    fed: list[int] = []
    handle = model.register_forward_pre_hook(lambda _, args, kw: fed.append(kw["input_ids"].numel()), with_kwargs=True)
    try:
        decoder = AWRS(mod_three(), BYTES, seed=0)
        generate(model, ids, decoder, max_new_tokens=9, eos_token_id=5, **SAMPLED)
    finally:
        handle.remove()
    trace = decoder.trace
    assert (trace.model_calls, trace.positions) == (len(fed), sum(fed))
    assert trace.particle_tokens == len(trace.checks_per_token)
    assert trace.checks <= sum(trace.checks_per_token)
    assert trace.ess == pytest.approx(decoder.sequences.ess)
    assert trace.finished == sum(decoder.sequences.finished)
    assert "checks" in trace.counts()


def test_cuts_of_the_vocabulary_are_warned_of(zoo: Zoo) -> None:
    model, ids = zoo("llama", "sdpa"), prompt(6)
    with pytest.warns(UserWarning, match="TopKLogitsWarper, TopPLogitsWarper may take away"):
        generate(model, ids, AWRS(everything(), BYTES), do_sample=True, top_k=5, top_p=0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(model, ids, AWRS(everything(), BYTES), temperature=0.7, **SAMPLED)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"n_particles": 0}, "n_particles"),
        ({"ess_threshold": 2.0}, "ess_threshold"),
        ({"resampling": "none"}, "resampling"),
        ({"method": "gumbel"}, "method"),
        ({"max_accepts": 1}, "max_accepts"),
        ({"max_rejects": 0}, "max_rejects"),
        ({"boundary": "stop"}, "boundary"),
        ({"critic": 3}, "critic"),
        ({"seed": -1}, "seed"),
        ({"constraint": "a+"}, "constraint"),
    ],
)
def test_settings_outside_their_limits_are_refused(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(LimitError, match=named):
        AWRS(**({"constraint": everything(), "tokenizer": BYTES} | settings))


def test_batches_and_second_results_are_refused_by_number(zoo: Zoo) -> None:
    model = zoo("llama", "sdpa")
    with pytest.raises(UnsupportedError, match="batch 3"):
        generate(model, prompt(5).expand(3, -1), small())
    with pytest.raises(UnsupportedError, match="batch 2"):
        generate(model, prompt(5), small(), num_return_sequences=2, do_sample=True)


def test_there_are_no_sequences_before_the_first_call() -> None:
    with pytest.raises(StoppedError, match="before the first call"):
        _ = small().sequences


def test_logits_that_are_not_finite_keep_the_particles(zoo: Zoo) -> None:
    model, ids, decoder = tiny("llama", seed=3), prompt(5), AWRS(mod_three(), BYTES, seed=1)
    calls: list[int] = []

    def spoil(module: Any, args: Any, output: Any) -> Any:
        calls.append(1)
        return output * math.nan if len(calls) == 4 else output

    handle = model.lm_head.register_forward_hook(spoil)  # pyright: ignore
    try:
        with pytest.raises(NonFiniteError, match="nan at call 4") as caught:
            generate(model, ids, decoder, **SAMPLED)
    finally:
        handle.remove()
    assert isinstance(caught.value.partial, WeightedSequences)
    assert {len(i) for i in caught.value.partial.sequences} == {3}
    heaviest = int(decoder.sequences.log_weights.argmax())
    assert heaviest > 0
    assert decoder.trace.tokens_so_far == decoder.sequences.sequences[heaviest]


def test_an_error_of_the_constraint_ends_the_streamer_and_keeps_the_particles(zoo: Zoo) -> None:
    class Breaks(Language):
        def prefix(self, context: bytes) -> float:
            if len(context) > 2:
                raise KeyError("unknown")
            return 0.0

    listener = Listener()
    with pytest.raises(StoppedError, match="KeyError") as caught:
        generate(zoo("llama", "sdpa"), prompt(5), AWRS(Breaks([b"x"]), BYTES), token_streamer=listener, **SAMPLED)
    assert listener.ends == 1
    assert {len(text) for text in caught.value.partial.texts} == {2}


def test_a_real_tokenizer_with_its_end_token() -> None:
    """The shipped model of Python source, byte-level BPE: two lines of digits, whatever tokens they fall into."""
    model, tokenizer = models.load("python-target")
    digit, table = range(48, 58), [[-1] * 256 for _ in range(4)]
    for state in (0, 2):
        for byte in digit:
            table[state][byte] = state + 1
    for state in (1, 3):
        for byte in digit:
            table[state][byte] = state
    table[1][10] = 2
    inputs = tokenizer("x = [\n", return_tensors="pt")
    decoder = AWRS(DFA(table, [False, False, False, True]), tokenizer, seed=0, boundary="prefix")
    made = generate(model, inputs["input_ids"], decoder, max_new_tokens=12, **SAMPLED)
    text = tokenizer.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert set(text) <= set("0123456789\n")
    assert text.count("\n") <= 1
    assert decoder.trace.median_checks < 200


def masked_law(model: Any, language: Language, tokens: int) -> dict[tuple[int, ...], float]:
    """Masked sampling by enumeration; texts that have ended are followed by token 0, the padding."""
    found: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(tokens):
        longer: dict[tuple[int, ...], float] = {}
        for text, share in found.items():
            if END in text:
                longer[(*text, 0)] = share
                continue
            p = next(iter(_laws(model, [text])))
            data = FOUR.join(text)
            valid = [t for t in range(3) if data + FOUR.join([t]) in language.possible]
            valid += [END] if data in language.strings else []
            for t in valid:
                longer[(*text, t)] = share * float(p[t] / p[valid].sum())
        found = longer
    return found


@torch.no_grad()
def _laws(model: Any, texts: list[tuple[int, ...]]) -> Tensor:
    ids = torch.cat([IDS.expand(len(texts), -1), torch.tensor(texts).long().view(len(texts), -1)], dim=1)
    return model(input_ids=ids).logits[:, -1].double().softmax(1)


WORDS = letters(b"ab", b"aba", b"b", b"bb", b"abab", b"bbab")
PADDED: dict[str, Any] = {"eos_token_id": END, "pad_token_id": 0}


@pytest.mark.prop("awrs", 8)
def test_the_processor_is_masked_sampling_in_law() -> None:
    model, rows = four(), 3000
    processor = AWRSLogitsProcessor(WORDS, FOUR, seed=5, eos_token_id=END)
    made = generate(model, IDS.expand(rows, -1), logits_processor=[processor], max_new_tokens=4, **PADDED, **SAMPLED)
    texts = [tuple(t) for t in made[:, IDS.shape[1] :].tolist()]
    assert chi_square(dict(Counter(texts)), masked_law(model, WORDS, 4)) > 1e-3
    finished = [t[: t.index(END)] for t in texts if END in t]
    assert finished
    assert all(WORDS.complete(FOUR.join(t)) == 0 for t in finished)
    # the weights make up for it: their mean is the mass of what is possible, here of the texts of up to four tokens
    weights = processor.log_weights.exp()
    exact = sum(share for text, share in joint_law(model, IDS, 4).items() if _possible(text))
    assert abs(float(weights.mean()) - exact) < 4 * float(weights.std()) / rows**0.5


def _possible(text: tuple[int, ...]) -> bool:
    """Counts each text once: what follows the end token is the padding 0, of any probability."""
    if END in text:
        return FOUR.join(text[: text.index(END)]) in WORDS.strings
    return FOUR.join(text) in WORDS.possible


def test_another_temperature_goes_before_the_processor() -> None:
    model, rows = four(), 2000
    processor = AWRSLogitsProcessor(WORDS, FOUR, seed=5, eos_token_id=END)
    warped = [TemperatureLogitsWarper(0.4), processor]
    made = generate(model, IDS.expand(rows, -1), logits_processor=warped, max_new_tokens=1, **PADDED, **SAMPLED)
    p = (_laws(model, [()])[0].log() / 0.4).softmax(0)[[0, 1, 2]]
    law = {(i,): float(share) for i, share in enumerate(p / p.sum())}
    assert chi_square(dict(Counter((t,) for t in made[:, -1].tolist())), law) > 1e-3


def test_the_processor_starts_anew_with_a_new_prompt_and_reads_again_what_changed() -> None:
    model = four()
    processor = AWRSLogitsProcessor(WORDS, FOUR, seed=1, eos_token_id=END)
    for ids in (IDS, IDS, torch.tensor([[2, 2, 1, 0, 1]]), IDS.expand(3, -1)):
        made = generate(model, ids, logits_processor=[processor], max_new_tokens=3, **PADDED, **SAMPLED)
        assert all(_possible(tuple(row)) for row in made[:, ids.shape[1] :].tolist())
        assert processor.log_weights.shape == (ids.shape[0],)
    fixed = AWRSLogitsProcessor(WORDS, FOUR, prompt_length=1, eos_token_id=END)
    scores = torch.zeros(2, 4)
    for first, second in (([3, 0], [3, 1]), ([3, 0, 1], [3, 1, 1]), ([3, 1, 1], [3, 0, 1]), ([3, 1, 2], [3, 0])):
        if len(first) == len(second):
            left = fixed(torch.tensor([first, second]), scores)
            assert (left > -math.inf).sum(1).tolist() == [1, 1]
    assert fixed.log_weights.shape == (2,)
    with pytest.raises(LimitError, match="prompt_length"):
        fixed(torch.tensor([[3, 0, 0], [3, 0, 0]]), scores)  # "aa" is in no word


def test_weights_of_tokens_that_stay_are_kept_when_a_row_changes() -> None:
    some = letters(*(bytes(t) for n in (1, 2, 3, 4) for t in product(b"ab", repeat=n)))  # the empty text is not one
    processor = AWRSLogitsProcessor(some, FOUR, prompt_length=1, seed=2, eos_token_id=END)
    scores = torch.tensor([[0.1, 0.2, -4.0, 0.3]])

    def call(*text: int) -> tuple[int, float, float]:
        """The token, its weight, and what the tokens before it weigh."""
        token = int(processor(torch.tensor([[3, *text]]), scores).argmax())
        drawn = processor._rows[0].drawn
        assert drawn is not None
        return token, drawn[1], float(processor.log_weights[0]) - drawn[1]

    first, weight, before = call()
    assert before == 0.0
    assert weight < 0.0
    second, _, before = call(first)
    assert before == pytest.approx(weight)
    for other in {0, 1, 2} - {second}:
        assert call(first, other)[2] == pytest.approx(weight)  # a token that was not drawn here weighs 1
    assert call(first)[2] == pytest.approx(weight)


def test_beams_are_constrained_too() -> None:
    """Beams change rows' histories at every step."""
    processor = AWRSLogitsProcessor(WORDS, FOUR, seed=1, eos_token_id=END)
    made = generate(four(), IDS, logits_processor=[processor], max_new_tokens=4, num_beams=3, **PADDED, **SAMPLED)
    assert _possible(tuple(made[0, IDS.shape[1] :].tolist()))


def test_a_row_without_valid_token_stops_the_batch_with_all_rows() -> None:
    dead = letters(b"bb", dead_ends=(b"a",))
    processor = AWRSLogitsProcessor(dead, FOUR, prompt_length=4, eos_token_id=END)
    with pytest.raises(NoValidContinuation, match="row 1 has no valid token behind b'a'") as caught:
        processor(torch.tensor([[1, 3, 2, 2, 1], [1, 3, 2, 2, 0]]), torch.zeros(2, 4))
    assert caught.value.partial.texts == [b"b", b"a"]


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"method": "x"}, "method"), ({"prompt_length": -1}, "prompt_length"), ({"seed": -2}, "seed")],
)
def test_the_processors_settings_are_checked(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(LimitError, match=named):
        AWRSLogitsProcessor(everything(), BYTES, **settings)
