from __future__ import annotations

import gc
import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.decode.chance import chi_square
from tokenmill.decode._oracle import Oracle
from tokenmill.decode._population import Particle, Population, SMCTrace
from tokenmill.decode._potential import ContractError
from tokenmill.decode._rejection import Method
from tokenmill.decode._smc import Sampler, SMCSettings, smc
from tokenmill.decode._weights import WAYS, Resampling, WeightedSequences
from tokenmill.errors import LimitError, StoppedError
from tokenmill.text import TokenBytes

A, B, END, CONTROL, STOP = range(5)
LETTERS = TokenBytes.from_list([b"a", b"b", None], {"<end>": END})
MOST = 4  # tokens of a text, end token included
Text = tuple[int, ...]
Law = Callable[[Text], Tensor]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Table:
    """A language model that looks the law up by the text so far; it also counts what it is asked."""

    def __init__(self, law: Law) -> None:
        self.law, self.texts, self.calls, self.rows = law, list[Text](), 0, list[int]()

    def _answer(self) -> Tensor:
        self.calls += 1
        self.rows.append(len(self.texts))
        return torch.stack([self.law(text) for text in self.texts])

    def start(self, n: int) -> Tensor:
        self.texts = [()] * n
        return self._answer()

    def step(self, tokens: Tensor) -> Tensor:
        self.texts = [(*text, token) for text, token in zip(self.texts, tokens.tolist(), strict=True)]
        return self._answer()

    def select(self, rows: Tensor) -> None:
        self.texts = [self.texts[i] for i in rows.tolist()]


class Language:
    """A finite set of strings. Prefixes without a completion may be declared possible: dead ends."""

    def __init__(self, strings: Iterable[bytes], dead_ends: Iterable[bytes] = ()) -> None:
        self.strings = set(strings)
        self.possible = {s[:i] for s in {*self.strings, *dead_ends} for i in range(len(s) + 1)}

    def prefix(self, context: bytes) -> float:
        return 0.0 if context in self.possible else -math.inf

    def complete(self, context: bytes) -> float:
        return 0.0 if context in self.strings else -math.inf


def trap(text: Text) -> Tensor:
    """The model loves "a", and behind it nearly never writes what the constraint wants."""
    if text[:1] == (A,):
        return torch.tensor([0.9, 0.04, 0.06], dtype=torch.float64).log()
    if text == ():
        return torch.tensor([0.8, 0.15, 0.05], dtype=torch.float64).log()
    return torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64).log()


EXACT = Language([b"abb", b"b", b"ba", b"bb", b"bab"])
OPEN = Language([b"abb", b"b", b"ba", b"bb", b"bab"], dead_ends=[b"aaaa", b"bbbb", b"abab"])


@cache
def wild(seed: int, tokens: int = 3) -> Law:
    """A law that differs behind every text."""

    @cache
    def law(text: Text) -> Tensor:
        parameters = np.random.default_rng([seed, *[t + 1 for t in text]]).dirichlet([3.0] * tokens)
        return torch.from_numpy(parameters).log()

    return law


def exact(
    law: Law,
    language: Language,
    *,
    most: int = MOST,
    ends: tuple[int, ...] = (END,),
    tokens: TokenBytes = LETTERS,
    critic: Callable[[bytes], float] = lambda _: 0.0,
) -> dict[bytes, float]:
    """p(text) 1{text in the language} exp(critic), by enumeration of all texts of at most ``most`` tokens."""
    plain = [t for t in range(len(tokens)) if tokens[t] is not None and t not in ends]
    found: dict[bytes, float] = {}
    for length in range(most):
        for text in product(plain, repeat=length):
            data = tokens.join(text)
            if data in language.strings:
                mass = math.exp(critic(data)) * float(law(text)[list(ends)].exp().sum())
                for i, token in enumerate(text):
                    mass *= float(law(text[:i])[token].exp())
                found[data] = found.get(data, 0.0) + mass
    return {text: mass for text, mass in found.items() if mass > 0}


def assert_unbiased(runs: list[WeightedSequences], masses: dict[bytes, float], errors: float = 4.0) -> None:
    """Means over runs equal the exact masses: of all texts together, and of each that is not rare.

    A rare text has a mean too skewed for a test by standard errors. No run may have seen a text outside.
    """
    whole = math.fsum(masses.values())
    groups = [set(masses), *({t} for t, mass in masses.items() if mass > 0.04 * whole)]
    totals = [[math.exp(run.log_ml) * sum(run.posterior().get(t, 0.0) for t in g) for g in groups] for run in runs]
    found = torch.tensor(totals, dtype=torch.float64)  # (runs, groups)
    expected = torch.tensor([math.fsum(masses[t] for t in g) for g in groups], dtype=torch.float64)
    error = found.std(0) / len(runs) ** 0.5
    off = (found.mean(0) - expected).abs()
    assert bool((off <= errors * error + 1e-12).all()), (off / error).tolist()
    assert {text for run in runs for text in run.posterior()} <= set(masses)


def many(runs: int, law: Law, language: Any, **settings: Any) -> list[WeightedSequences]:
    tokens = settings.pop("tokens", LETTERS)
    settings = {"n_particles": 4, "max_tokens": MOST, "eos_ids": [END]} | settings
    seeded = generator(settings.pop("seed", 1))
    return [smc(Table(law), language, tokens, generator=seeded, **settings) for _ in range(runs)]


@pytest.mark.prop("awrs", 6)
@pytest.mark.parametrize("language", [EXACT, OPEN], ids=["exact prefixes", "dead ends"])
@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
def test_the_mean_weight_of_small_populations_is_the_valid_mass(language: Language, threshold: float) -> None:
    runs, masses = (
        many(500 if threshold == 0.5 else 250, trap, language, ess_threshold=threshold),
        exact(trap, language),
    )
    total = torch.tensor([math.exp(run.log_ml) for run in runs])
    error = float(total.std()) / len(runs) ** 0.5
    assert abs(float(total.mean()) - math.fsum(masses.values())) < 3 * error
    assert_unbiased(runs, masses)


@pytest.mark.prop("awrs", 6)
@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_a_large_population_has_the_posterior_law(threshold: float) -> None:
    masses = exact(trap, OPEN)
    posterior = torch.tensor(list(masses.values()), dtype=torch.float64) / math.fsum(masses.values())
    runs = [many(1, trap, OPEN, n_particles=2000, ess_threshold=threshold, seed=seed)[0] for seed in range(6)]
    found = torch.tensor([[run.posterior().get(t, 0.0) for t in masses] for run in runs], dtype=torch.float64)
    error, off = found.std(0), (found - posterior).abs()  # of one population
    assert bool((off < 3 * error).all())
    common = posterior > 0.01
    assert bool(((found.mean(0) - posterior).abs() < 3 * error / len(runs) ** 0.5)[common].all())
    assert float(off.max()) < 0.12


def masked(law: Law, language: Language) -> dict[bytes, float]:
    """The law of masking the invalid tokens one by one, by enumeration (no dead ends)."""
    found: dict[bytes, float] = {}

    def walk(text: Text, share: float) -> None:
        data = LETTERS.join(text)
        p = law(text).exp()
        forced = len(text) == MOST - 1
        valid = [] if forced else [t for t in (A, B) if data + LETTERS.join([t]) in language.possible]
        if data in language.strings:
            valid.append(END)
        mass = float(p[valid].sum())
        for t in valid:
            if t == END:
                found[data] = share * float(p[t]) / mass
            else:
                walk((*text, t), share * float(p[t]) / mass)

    walk((), 1.0)
    return found


@pytest.mark.prop("awrs", 6)
def test_masking_token_by_token_falls_into_the_trap(capsys: pytest.CaptureFixture[str]) -> None:
    masses = exact(trap, EXACT)
    whole = math.fsum(masses.values())
    posterior, lcd = {t: m / whole for t, m in masses.items()}, masked(trap, EXACT)
    print({t: (round(lcd[t], 3), round(posterior[t], 3)) for t in posterior})
    assert "abb" in capsys.readouterr().out
    assert lcd[b"abb"] > 0.8 > 0.05 > posterior[b"abb"]
    runs = many(1500, trap, EXACT, n_particles=1, method="lcd")
    assert all(run.log_ml == 0 for run in runs)
    seen = Counter((i,) for run in runs for i, text in enumerate(lcd) if run.texts == [text])
    assert chi_square(dict(seen), {(i,): share for i, share in enumerate(lcd.values())}) > 1e-3
    # and draws from weighted populations do not: the better, the larger
    apart = []
    for n in (1, 4, 32):
        seeded = generator(n)
        drawn = Counter(run.sample(seeded) for run in many(200, trap, OPEN, n_particles=n) if run.alive)
        apart.append(sum(abs(drawn[t] / drawn.total() - share) for t, share in posterior.items()))
    assert apart[0] > apart[1] > apart[2]
    assert apart[2] < 0.2


@pytest.mark.parametrize("how", WAYS)
def test_every_way_to_resample_keeps_the_estimates_unbiased(how: Resampling) -> None:
    runs = many(300, wild(3), OPEN, resampling=how, ess_threshold=1.0, n_particles=3)
    assert_unbiased(runs, exact(wild(3), OPEN))


@pytest.mark.parametrize(
    ("method", "settings"),
    [("paper", {}), ("recursive", {}), ("geometric", {"max_accepts": 4}), ("auto", {"max_rejects": 2})],
)
def test_every_estimator_keeps_the_estimates_unbiased(method: Method, settings: dict[str, Any]) -> None:
    runs = many(300, wild(4), OPEN, method=method, **settings)
    assert_unbiased(runs, exact(wild(4), OPEN))


def test_a_wrong_weight_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: resampled particles that keep the sum of the weights instead of their mean."""
    renew = Population.renew

    def wrong(self: Population, *args: Any) -> bool:
        done = renew(self, *args)
        for particle in self.particles if done else ():
            particle.logw += 0.2
        return done

    monkeypatch.setattr(Population, "renew", wrong)
    runs = many(400, wild(3), OPEN, ess_threshold=1.0, n_particles=3)
    with pytest.raises(AssertionError):
        assert_unbiased(runs, exact(wild(3), OPEN))


class Likes:
    """A critic that likes some strings, and says so early or not at all."""

    def __init__(self, scores: dict[bytes, float], early: float) -> None:
        self.scores, self.early, self.asked = scores, early, list[bytes]()

    def prefix(self, context: bytes) -> float:
        self.asked.append(context)
        return self.early * context.count(b"b")

    def complete(self, context: bytes) -> float:
        self.asked.append(context)
        return self.scores.get(context, 0.0)


@pytest.mark.parametrize("threshold", [0.0, 0.7])
@pytest.mark.parametrize("early", [0.0, 0.8])
def test_a_critic_multiplies_the_target(threshold: float, early: float) -> None:
    scores = {b"b": 1.0, b"ba": -0.5, b"bb": -math.inf, b"abb": 2.0}
    critic = Likes(scores, early)
    runs = many(300, wild(5), OPEN, critic=critic, ess_threshold=threshold)
    masses = exact(wild(5), OPEN, critic=lambda text: scores.get(text, 0.0))
    assert_unbiased(runs, masses)
    assert b"bb" not in masses
    dead = [run.finished[i] for run in runs for i, text in enumerate(run.texts) if text == b"bb" and not run.weights[i]]
    assert dead
    assert not any(dead)
    assert b"b" in critic.asked
    assert (threshold > 0) == (b"a" in critic.asked)


def test_a_proposal_draws_and_the_weights_make_up_for_it() -> None:
    runs = many(400, wild(6), OPEN, proposal=Table(wild(7)))
    assert_unbiased(runs, exact(wild(6), OPEN))


MORE = TokenBytes.from_list([b"a", b"b", None, None, None, b"ab"], {"<end>": END, "<control>": CONTROL, "<stop>": STOP})


def test_end_tokens_count_as_one_and_control_tokens_are_never_drawn() -> None:
    """The model has two end tokens, one control token, one token that the tokenizer lacks, and two ways to "ab"."""
    law = wild(8, 7)
    settings: dict[str, Any] = {"tokens": MORE, "eos_ids": [END, STOP, END], "n_particles": 3}
    masses = exact(law, OPEN, ends=(END, STOP), tokens=MORE)
    runs = many(400, law, OPEN, **settings)
    assert_unbiased(runs, masses)
    assert {i for run in runs for ids in run.sequences for i in ids} == {A, B, END, STOP, 5}
    (none,) = many(1, law, OPEN, **settings | {"max_tokens": 1})
    assert none.log_ml == -math.inf  # the empty text is not in the language


def test_which_end_token_follows_their_shares() -> None:
    law = wild(8, 7)
    language = Language([b""])
    runs = many(1500, law, language, tokens=MORE, eos_ids=[STOP, END], n_particles=1, method="recursive")
    seen = Counter((run.sequences[0][-1],) for run in runs)
    p = law(())[[END, STOP]].softmax(0).tolist()
    assert chi_square(dict(seen), {(END,): p[0], (STOP,): p[1]}) > 1e-3
    assert all(run.log_ml == pytest.approx(float(law(())[[END, STOP]].logsumexp(0))) for run in runs)


def test_all_end_tokens_weigh_together_also_where_they_are_forced_or_proposed() -> None:
    law, language = wild(8, 7), Language([b""])
    both = float(law(())[[END, STOP]].logsumexp(0))
    settings: dict[str, Any] = {"tokens": MORE, "eos_ids": [STOP, END], "method": "recursive"}
    for extra in ({"max_tokens": 1}, {"max_tokens": 2}, {"proposal": Table(wild(9, 7))}):
        (run,) = many(1, law, language, **settings, **extra)
        assert run.log_weights.tolist() == pytest.approx([both] * 4)


def test_an_unfinished_text_has_the_critics_score_of_a_prefix() -> None:
    everything = Language([bytes(t) for n in range(4) for t in product(b"ab", repeat=n)])
    for threshold in (0.0, 0.1):
        critic = Likes(dict.fromkeys(everything.strings, 100.0), 0.25)
        settings: dict[str, Any] = {"eos_ids": [], "max_tokens": 2, "ess_threshold": threshold, "critic": critic}
        (run,) = many(1, lambda text: wild(2)(text)[:2].log_softmax(0), everything, method="recursive", **settings)
        assert run.log_weights.tolist() == pytest.approx([0.25 * text.count(b"b") for text in run.texts])


def test_answers_are_remembered_within_a_step_and_their_states_with_them() -> None:
    """A state that nobody else holds must not make room for another with its address."""

    class Fresh:
        def allows(self, data: bytes) -> bool:
            return data == b"a"

        def advance(self, data: bytes) -> Fresh:
            return Fresh()

        def accepting(self) -> bool:
            return False

    trace = SMCTrace()
    oracle, particle = Oracle("test", EXACT, LETTERS, [END], trace), Particle(Fresh(), 0)
    held = weakref.ref(particle.state)
    for _ in range(3):
        assert (oracle.accepts(particle, A), oracle.accepts(particle, B), oracle.accepts(particle, END)) == (1, 0, 0)
    assert trace.checks == 3
    left = Particle(Fresh(), 1)
    asked = weakref.ref(left.state)
    oracle.accepts(left, A)
    del left
    gc.collect()
    assert asked() is not None
    first, second = particle.copy(), particle.copy()
    oracle.advance(first, A)
    oracle.advance(second, A)
    assert first.state is second.state
    particle.state = first.state
    del first, second
    gc.collect()
    assert held() is not None
    oracle.forget()
    assert held() is None
    oracle.accepts(particle, A)
    oracle.forget()
    oracle.accepts(particle, A)
    assert trace.checks == 6


@pytest.mark.parametrize("most", [1, 2, 3, 4])
def test_the_last_token_must_end_the_text(most: int) -> None:
    everything = Language([bytes(t) for n in range(5) for t in product(b"ab", repeat=n)])
    runs = many(200, wild(9), everything, max_tokens=most)
    assert_unbiased(runs, exact(wild(9), everything, most=most))
    assert all(len(ids) <= most and ids[-1] == END for run in runs for ids in run.sequences)
    assert all(all(run.finished) for run in runs)


@pytest.mark.parametrize("ends", [[], [END]])
def test_texts_may_also_stay_unfinished(ends: list[int]) -> None:
    """Without end tokens, or by choice; whole strings among them are marked."""
    language = Language([b"aa", b"abb", b"bab"])
    model = Table(wild(10))
    trace = SMCTrace()
    run = smc(model, language, LETTERS, ends, max_tokens=2, boundary="prefix", generator=generator(), trace=trace)
    assert run.alive
    alive = [i for i, w in enumerate(run.weights) if w > 0]
    assert {len(run.texts[i]) for i in alive} == {2}
    assert [run.finished[i] for i in alive] == [run.texts[i] == b"aa" for i in alive]
    assert model.calls == 2
    assert trace.finished == sum(run.finished)


def test_dead_and_finished_rows_leave_the_models_batch() -> None:
    model, trace = Table(trap), SMCTrace()
    run = smc(model, OPEN, LETTERS, [END], n_particles=64, ess_threshold=0.3, max_tokens=MOST, trace=trace)
    assert model.rows[0] == 64
    assert model.rows == sorted(model.rows, reverse=True)
    assert model.rows[-1] < 64
    assert len(trace.checks_per_token) <= sum(model.rows)
    assert trace.median_checks <= 3
    assert trace.checks < sum(trace.checks_per_token)  # particles in one state share answers
    assert (trace.log_ml, trace.ess) == (run.log_ml, run.ess)


@pytest.mark.prop("awrs", 7)
def test_renewal_keeps_the_mean_weight_and_makes_weights_equal() -> None:
    seeded = generator(2)
    for n in (1, 2, 5, 40):
        population = Population([object()] * n)  # pyright: ignore[reportArgumentType]
        for i, particle in enumerate(population.particles):
            particle.weigh(-float(i) - 500)
            particle.ids.append(i)
        before = float(population.log_weights.logsumexp(0))
        renewed = population.renew(1.0, "stratified", seeded)
        assert renewed == (n > 1)
        logs = population.log_weights
        assert float(logs.logsumexp(0)) == pytest.approx(before, abs=1e-12)
        assert float(logs.max() - logs.min()) == 0
        assert not population.renew(1.0, "stratified", seeded)  # equal weights
        copies = [p.ids for p in population.particles]
        assert len({id(ids) for ids in copies}) == n  # nobody shares a list


def test_a_population_without_weight_is_left_alone() -> None:
    population = Population([object()] * 3)  # pyright: ignore[reportArgumentType]
    for particle in population.particles:
        particle.weigh(-math.inf)
    assert not population.renew(1.0, "stratified", generator())
    assert {p.status for p in population.particles} == {"dead"}


@pytest.mark.prop("awrs", 3)
def test_when_all_particles_die_the_result_is_empty() -> None:
    language = Language([b"aaab"])  # one token too long
    trace = SMCTrace()
    run = smc(Table(wild(1)), language, LETTERS, [END], max_tokens=MOST, generator=generator(), trace=trace)
    assert (run.log_ml, run.ess, run.posterior(), run.finished) == (-math.inf, 0.0, {}, [False] * 5)
    assert all(b"aaab".startswith(text) for text in run.texts)
    assert max(map(len, run.texts)) > 0
    assert 0 < trace.died_at <= MOST
    assert trace.log_ml == -math.inf


@pytest.mark.prop("awrs", 8)
def test_every_finished_text_is_whole() -> None:
    runs = many(50, wild(11), OPEN, n_particles=6)
    finished = [text for run in runs for text, done in zip(run.texts, run.finished, strict=True) if done]
    assert finished
    assert all(OPEN.complete(text) == 0 for text in finished)
    alive = [text for run in runs for text, w in zip(run.texts, run.weights, strict=True) if w > 0]
    assert set(alive) <= set(finished)


@pytest.mark.prop("awrs", 9)
def test_the_same_seed_gives_the_same_population() -> None:
    first, again, other = (many(5, wild(12), OPEN, n_particles=8, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_the_models_rows_are_the_active_particles() -> None:
    """After every step the model has read exactly what the active particles have written."""
    seen: list[tuple[list[Text], list[Text]]] = []

    class Watched(Table):
        def step(self, tokens: Tensor) -> Tensor:
            answer = super().step(tokens)
            seen.append((list(self.texts), [tuple(p.ids) for p in run.population.active]))
            return answer

    oracle = Oracle("test", OPEN, LETTERS, [END], SMCTrace())
    settings = SMCSettings(n_particles=30, ess_threshold=0.9)
    run = Sampler("test", settings, Watched(wild(13)), oracle, generator=generator())
    run.run(MOST)
    assert len(seen) == MOST - 1
    assert all(texts == particles for texts, particles in seen)


class Breaks(Language):
    def prefix(self, context: bytes) -> float:
        if context == b"ba":
            raise ZeroDivisionError("inside")
        return super().prefix(context)


def test_an_error_of_the_constraint_keeps_the_particles() -> None:
    with pytest.raises(StoppedError, match=r"ZeroDivisionError: inside at b'b'") as caught:
        many(20, trap, Breaks([b"bbb", b"abb"]))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert isinstance(caught.value.partial, WeightedSequences)
    assert b"b" in caught.value.partial.texts


def test_a_constraint_that_contradicts_itself_keeps_the_particles() -> None:
    class Contrary(Language):
        def prefix(self, context: bytes) -> float:
            if context == b"b":
                self.times = getattr(self, "times", 0) + 1
            return -math.inf if context == b"b" and self.times > 1 else super().prefix(context)

    with pytest.raises(ContractError) as caught:
        smc(Table(trap), Contrary([b"b"]), LETTERS, [END], generator=generator(3))
    assert b"b" in caught.value.partial.texts


def test_soft_scores_are_sent_to_the_critic() -> None:
    class Soft(Language):
        def prefix(self, context: bytes) -> float:
            return -0.5 if len(context) == 2 else super().prefix(context)

    with pytest.raises(LimitError, match="Boolean") as caught:
        many(5, trap, Soft([b"bbb"]))
    assert isinstance(caught.value.partial, WeightedSequences)


@pytest.mark.parametrize("score", [math.nan, math.inf])
def test_a_critic_without_a_number_is_refused(score: float) -> None:
    with pytest.raises(LimitError, match="critic") as caught:
        many(1, wild(2), OPEN, critic=Likes(dict.fromkeys(OPEN.strings, score), 0.0))
    assert isinstance(caught.value.partial, WeightedSequences)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"n_particles": 0}, "n_particles"),
        ({"n_particles": True}, "n_particles"),
        ({"ess_threshold": -0.1}, "ess_threshold"),
        ({"ess_threshold": 1.1}, "ess_threshold"),
        ({"ess_threshold": math.nan}, "ess_threshold"),
        ({"resampling": "stratifed"}, "stratified"),
        ({"boundary": "end"}, "boundary"),
        ({"method": "papr"}, "paper"),
        ({"max_accepts": 1}, "max_accepts"),
        ({"max_rejects": 1}, "max_rejects"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"critic": len}, "critic"),
        ({"eos_ids": [-1]}, "eos_ids"),
    ],
)
def test_settings_outside_their_limits_are_refused_before_work(settings: dict[str, Any], named: str) -> None:
    model = Table(trap)
    given: dict[str, Any] = {"eos_ids": [END]} | settings
    with pytest.raises(LimitError, match=named):
        smc(model, OPEN, LETTERS, given.pop("eos_ids"), **given)
    assert model.calls == 0


def test_an_end_token_that_the_model_lacks_is_refused() -> None:
    with pytest.raises(LimitError, match=r"eos_ids.*vocabulary 3"):
        smc(Table(trap), OPEN, LETTERS, [7])


def test_a_constraint_without_strings_is_refused() -> None:
    with pytest.raises(LimitError, match="no string satisfies"):
        smc(Table(trap), Language([]), LETTERS, [END])


def test_models_of_different_vocabularies_are_refused() -> None:
    with pytest.raises(LimitError, match="one vocabulary"):
        smc(Table(trap), OPEN, LETTERS, [END], proposal=Table(wild(1, 4)))


def test_log_probabilities_that_are_nan_are_refused_with_the_particles() -> None:
    def law(text: Text) -> Tensor:
        return trap(text) * (math.nan if len(text) == 2 else 1.0)

    with pytest.raises(LimitError, match="NaN") as caught:
        smc(Table(law), OPEN, LETTERS, [END], generator=generator())
    assert any(len(text) == 2 for text in caught.value.partial.texts)
