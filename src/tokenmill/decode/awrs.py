"""AWRS: any yes-or-no constraint on the text, checked on the few tokens that are proposed and not on the vocabulary.

Lipkin et al., "Fast Controlled Generation from Language Models with Adaptive Weighted Rejection Sampling" (arXiv
2504.05410). Each particle draws tokens from the model and keeps the first that the constraint allows; the same draws
estimate how much of the model's mass was allowed, and with these weights N particles follow the model conditioned on
the whole text satisfying the constraint. Masking the vocabulary follows another law, and walks into dead ends.

Use it for constraints that are programs (a parser, a compiler, a type checker) and cost too much to ask for every
token. Where a grammar engine computes the whole mask at once, and where no dead ends lie ahead, masking is as good.
"""

from __future__ import annotations

import warnings
from dataclasses import KW_ONLY, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import LongTensor, Tensor

from tokenmill import hf
from tokenmill.catalog import Card, Paper
from tokenmill.decode._constrained_logits import AWRSLogitsProcessor
from tokenmill.decode._dfa import DFA
from tokenmill.decode._oracle import Critic, Oracle, check_critic
from tokenmill.decode._particles import Particles
from tokenmill.decode._population import Population, SMCTrace
from tokenmill.decode._potential import as_potential
from tokenmill.decode._rejection import Method, Step, awrs_step
from tokenmill.decode._report import Report, end_tokens
from tokenmill.decode._request import Decoder, Request, Run, check_request, check_seed
from tokenmill.decode._smc import Boundary, LanguageModel, Sampler, SMCSettings, smc
from tokenmill.decode._weights import NoValidContinuation, Resampling, WeightedSequences
from tokenmill.errors import StoppedError, UnsupportedError
from tokenmill.text import TokenBytes
from tokenmill.trace import Trace

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "AWRS",
    "CARD",
    "AWRSLogitsProcessor",
    "LanguageModel",
    "NoValidContinuation",
    "SMCTrace",
    "Step",
    "WeightedSequences",
    "awrs_step",
    "smc",
]

CARD = Card(
    name="AWRS",
    kind="decoder",
    paper=Paper(
        title="Fast Controlled Generation from Language Models with Adaptive Weighted Rejection Sampling",
        date="2025-04-07",
        arxiv="2504.05410",
        code="https://github.com/genlm/genlm-control",
    ),
    summary=(
        "Tokens are proposed by the model and checked one by one until one satisfies the constraint. "
        "Weighted particles follow the model conditioned on the whole text satisfying it."
    ),
    claim=(
        "A handful of constraint checks a token in place of one for every token of the vocabulary, fewer the more the "
        "model agrees with the constraint; posterior estimates that become exact as particles grow in number."
    ),
    api=(
        "AWRS",
        "AWRSLogitsProcessor",
        "smc",
        "awrs_step",
        "WeightedSequences",
        "NoValidContinuation",
        "SMCTrace",
        "LanguageModel",
    ),
    exact=False,
    trains=False,
    task="constrain",
    needs=frozenset({"constraint"}),
    works_with=("llama", "qwen2", "gemma3_text"),
    differs=(
        "tokens are drawn lazily by binary search in cumulative masses; the authors sort Gumbel keys of the vocabulary",
        "what is left of the mass is summed anew and not subtracted, so a walk ends when every token with mass was "
        "rejected; the authors' code gives up at a rejected mass of 1 - 1e-5",
        "particles in one state share the constraint's answers within a step",
        "at the length limit the last token must be an end token, as in the authors' maintained library; "
        "boundary='prefix' keeps unfinished texts, as in the paper's experiments",
    ),
)


@dataclass(frozen=True)
class AWRS(Decoder[SMCTrace]):
    """A decoder for ``model.generate(..., do_sample=True, custom_generate=decoder)``, one prompt at a time.

    The result is one text, drawn from the particles by weight; all of them are in ``sequences``. Without sampling
    there is one particle, which takes the likeliest valid token each time, with weight 1.

    Args:
        constraint: what the text behind the prompt must satisfy: `regex`, `json_schema`, `grammar`, `predicate`,
            `DFA`, or an object with ``prefix`` and ``complete`` on bytes.
        tokenizer: the model's tokenizer, or its `TokenBytes`.
        n_particles: N (paper: 5).
        ess_threshold: the population is renewed when its effective size is below this share of N (paper: 0.5).
        resampling: how it is renewed.
        method: which estimator, see `awrs_step`; ``"lcd"`` is masked sampling, without weights.
        max_accepts: valid tokens that the geometric estimator counts.
        max_rejects: a particle dies after as many rejected tokens in one step; a bound on the cost of a step.
        boundary: what becomes of texts that reach the length limit: ``"eos"`` lets only whole texts live, ``"prefix"``
            keeps them as they are. Models without end token always have ``"prefix"``.
        critic: soft scores, an object with ``prefix`` and ``complete`` on bytes in log space.
        proposal: a smaller causal language model with the same vocabulary that draws the tokens.
        seed: of the draws; ``None`` uses torch's global generator.

    Raises:
        LimitError: a value outside its limits, named.
    """

    constraint: Any
    tokenizer: Any
    _: KW_ONLY
    n_particles: int = 5
    ess_threshold: float = 0.5
    resampling: Resampling = "stratified"
    method: Method = "auto"
    max_accepts: int = 2
    max_rejects: int | None = None
    boundary: Boundary = "eos"
    critic: Critic | None = None
    proposal: PreTrainedModel | None = None
    seed: int | None = None
    _run: Run[SMCTrace] = field(default_factory=lambda: Run(SMCTrace), init=False, compare=False, repr=False)
    _population: list[Population] = field(default_factory=list, init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        self._settings().check("AWRS")
        as_potential(self.constraint)
        check_critic("AWRS", self.critic)
        check_seed("AWRS", self.seed)

    @property
    def sequences(self) -> WeightedSequences:
        """The particles of the last call, also while it runs and after it failed.

        Raises:
            StoppedError: nothing has been generated.
        """
        if not self._population:
            raise StoppedError("AWRS: there are no sequences before the first call.")
        return self._population[-1].sequences()

    def _decode(self, request: Request) -> Any:
        with self._run.started("AWRS") as trace:
            self._population.clear()
            return self._generate(request, trace)

    def _generate(self, request: Request, trace: SMCTrace) -> Any:
        check_request("AWRS", request)
        config, ids = request.generation_config, request.input_ids
        if config.return_dict_in_generate and (config.output_scores or config.output_logits):
            raise UnsupportedError("AWRS", "cannot return scores or logits of a weighted draw", "Read .sequences.")
        _warn_of_cuts(request)
        if request.token_streamer is not None:
            request.token_streamer.put(ids.cpu())
        room = int(config.max_length or 0) - ids.shape[1]
        chosen: list[int] = []
        if room > 0:
            ends = end_tokens(request, self.tokenizer)
            report = Report(request, trace, ends)
            sampler = self._sampler(request, trace, report, ends)
            self._population.append(sampler.population)
            found = sampler.run(room)
            self._check_alive(found, trace, room)
            chosen = found.sequences[found.draw(request.generator)]
            report.choose(chosen)
        text = torch.cat([ids, torch.tensor([chosen], dtype=ids.dtype, device=ids.device)], dim=1)
        return _result(request, text)

    def _settings(self) -> SMCSettings:
        return SMCSettings(**{f.name: getattr(self, f.name) for f in fields(SMCSettings)})

    def _sampler(self, request: Request, trace: SMCTrace, report: Report, ends: list[int]) -> Sampler:
        greedy = not request.generation_config.do_sample
        settings = self._settings()
        if greedy:
            settings = SMCSettings(n_particles=1, max_rejects=self.max_rejects, boundary=self.boundary)
        tokens = TokenBytes.of(self.tokenizer)
        oracle = Oracle("AWRS", self.constraint, tokens, ends, trace, critic=self.critic)
        proposal = None
        if self.proposal is not None and not greedy:
            report.proposal = Trace()
            proposal = Particles("AWRS", _proposal_request(request, self.proposal), report.proposal)
        return Sampler(
            "AWRS",
            settings,
            Particles("AWRS", request, trace),
            oracle,
            proposal=proposal,
            generator=request.generator,
            greedy=greedy,
            stop=report.stops if report.criteria else None,
            on_step=report.step,
        )

    def _check_alive(self, found: WeightedSequences, trace: SMCTrace, room: int) -> None:
        if found.alive:
            return
        n, step = len(found), trace.died_at
        mend = "raise n_particles or check prefix()"
        if step >= room:
            mend = f"{mend}; {room} tokens were the limit, so raise max_new_tokens or use boundary='prefix'"
        raise NoValidContinuation(f"AWRS: all {n} particles died at step {step}; {mend}.", partial=found)


def _warn_of_cuts(request: Request) -> None:
    """Warpers that take tokens away may take all the valid ones."""
    from transformers.generation import logits_process

    names = ("TopK", "TopP", "TopH", "MinP", "Typical", "EpsilonLogits", "EtaLogits")
    cuts = tuple(kind for name, kind in vars(logits_process).items() if name.startswith(names))
    active = sorted({type(one).__name__ for one in request.logits_processor if isinstance(one, cuts)})
    if active:
        text = f"AWRS: {', '.join(active)} may take away the valid tokens. Pass top_k=0 and top_p=1.0 to generate."
        warnings.warn(text, stacklevel=2)


def _proposal_request(request: Request, proposal: PreTrainedModel) -> Request:
    """The same prompt for the proposal model, with a cache of its own."""
    from transformers.cache_utils import DynamicCache

    kwargs = {
        "attention_mask": request.model_kwargs.get("attention_mask"),
        "past_key_values": DynamicCache(config=hf.text_config(proposal)),
        "use_cache": True,
    }
    return replace(request, model=proposal, model_kwargs=kwargs)


def _result(request: Request, text: Tensor) -> Any:
    """What `generate` returns: (1, T) int64, or a GenerateDecoderOnlyOutput whose cache holds the prompt."""
    from transformers.generation.utils import GenerateDecoderOnlyOutput

    if not request.generation_config.return_dict_in_generate:
        return text
    cache = request.model_kwargs.get("past_key_values")
    return GenerateDecoderOnlyOutput(sequences=cast("LongTensor", text), past_key_values=cache)


def small() -> AWRS:
    """An instance for tiny models, used by the laws: everything is allowed."""
    everything = DFA([[0] * 256], [True])
    return AWRS(everything, TokenBytes.from_list([bytes([i]) for i in range(64)]))
