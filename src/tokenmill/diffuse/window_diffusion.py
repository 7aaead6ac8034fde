"""Window-Diffusion: feed a window that walks through the masks, and drop what lies far behind it (2026).

What to decode next stands among the left-most masks, masks far to the right hardly matter to it, and a token's keys
and values settle soon after it was revealed. So time is cut into phases: a phase starts with a pass that writes keys
and values for prompt, text and the first masks; the passes behind it feed only the next few masks and what the phase
has revealed. Use it for long answers that are written roughly from left to right. Not for tasks that want their last
tokens first, and not for short answers, which a window holds whole.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from tokenmill.catalog import Card, Paper, Reported
from tokenmill.diffuse._decoder import Diffusion
from tokenmill.diffuse._policy import KVPolicy, Plan
from tokenmill.diffuse._rule import Reveal, RevealRule
from tokenmill.diffuse._rules import top_n
from tokenmill.errors import LimitError, UnsupportedError, unknown_name

if TYPE_CHECKING:
    from tokenmill.diffuse._canvas import Canvas
    from tokenmill.diffuse._policy import PolicyRun
    from tokenmill.diffuse._proposal import Proposal

CARD = Card(
    name="Window-Diffusion",
    kind="rule",
    paper=Paper(
        title="Window-Diffusion: Accelerating Diffusion Language Model Inference with Windowed Token Pruning and "
        "Caching",
        date="2026-01-28",
        arxiv="2601.20332",
        code="https://github.com/vhicrgit/Window-Diffusion",
    ),
    summary=(
        "Each pass feeds only the next masks and the freshly revealed tokens; the rest is cached or, far to the right, "
        "absent. A phase of passes starts with one that writes the cache anew."
    ),
    claim="Up to 99x faster on LLaDA and Dream under matched compute budgets, largely preserving quality.",
    api=("WindowDiffusion", "WindowCache", "WindowRule", "ranks", "window_positions"),
    exact=False,
    trains=False,
    task="diffuse",
    works_with=("llama", "qwen2", "gemma3_text"),
    differs=(
        "sets of places instead of prefixes and spans, so that text to the right of masks and rows of a batch work",
        "the window's size is the number of masks kept in both variants; the authors' Dream path keeps one fewer",
        "attention always reads what it feeds; in the authors' LLaDA path a pass can outrun its window",
        "the end token of early stopping is looked for in the answer only",
        "a pass with nothing to reveal in its window starts a phase",
    ),
    reported=Reported(
        table="README of the authors' repository",
        setting="LLaDA-8B-Base, GSM8K 4-shot, strict, windows 64 / 16, cycle 32",
        metric="accuracy",
        value=68.46,
    ),
)

VARIANTS = ("llada", "dream")
ALGORITHMS = ("low_confidence", "maskgit_plus", "entropy", "topk_margin")


def ranks(masked: Tensor) -> Tensor:
    """Number of each mask from the left, 1 for the first: (B, S) bool to (B, S) int64; 0 where there is none.

    >>> ranks(torch.tensor([[False, True, False, True]])).tolist()
    [[0, 1, 0, 2]]
    """
    return masked.long().cumsum(1) * masked


def window_positions(prompt: int, answer: int, external: int, internal: int, cycle: int, *, far_field: bool) -> int:
    """Places that the LLaDA variant feeds over a whole answer, one token a pass, nothing revealed out of the window.

    A refresh feeds everything, or without the far field prompt, text and ``external`` masks. The passes behind it feed
    ``internal`` masks and what they have revealed; the token of the refresh itself is fed once more.
    """
    total = 0
    for step in range(answer):
        phase, left = step % cycle, answer - step
        if phase == 0:
            total += prompt + (answer if far_field else step + min(external, left))
        else:
            total += min(internal, left) + max(phase - 1, 1)
    return total


@dataclass(frozen=True, kw_only=True)
class WindowCache(KVPolicy):
    """The policy: a refresh over the window, then passes over the active places.

    Attributes:
        external: masks that the window holds; those behind it are absent.
        internal: masks that a pass between refreshes feeds.
        refresh: passes from one refresh to the next, the phase.
        far_field: a refresh feeds all masks, and may reveal any of them (the authors' LLaDA path).
        forced: a refresh may reveal the first mask only, which is then fed to the phase's end (their Dream path).
        slide: the active masks move on inside a phase; otherwise they are those that it started with.
        end_refreshes: once the answer holds an end token, every pass is a refresh.
    """

    external: int = 64
    internal: int = 16
    refresh: int = 32
    far_field: bool = False
    forced: bool = False
    slide: bool = True
    end_refreshes: bool = False

    def __post_init__(self) -> None:
        _check("WindowCache", self.external, self.internal, self.refresh, ("external", "internal", "refresh"))

    def begin(self, canvas: Canvas) -> PolicyRun:
        """The window at the start of the answer.

        Warns when a phase reveals more than the window holds beyond the active masks, and there are such masks.
        """
        most = int(canvas.masked.sum(1).max()) if len(canvas) else 0
        if self.refresh > 1 and self.external < min(self.internal + self.refresh, most):
            needed = f"internal + refresh = {self.internal + self.refresh}"
            warnings.warn(
                f"WindowCache: external = {self.external} is less than {needed}: when a phase reveals a token a pass, "
                "its last passes reach masks that the window does not hold.",
                stacklevel=2,
            )
        return _Window(self, canvas)


class _Window:
    """Phases of each row."""

    def __init__(self, policy: WindowCache, canvas: Canvas) -> None:
        self.policy = policy
        self.phase = canvas.passes.clone()  # (B,) passes since the refresh
        self.base = torch.zeros_like(canvas.real)  # (B, S) rows that the refresh wrote and later passes read
        self.done = torch.zeros_like(canvas.real)  # (B, S) what the phase has revealed
        self.span = torch.zeros_like(canvas.real)  # (B, S) masks that a window which does not slide may feed

    def plan(self, canvas: Canvas) -> Plan:
        policy, masked = self.policy, canvas.masked
        rank = ranks(masked)
        active = masked & (rank <= policy.internal)
        if not policy.slide:
            active = active & self.span
        refresh = (self.phase % policy.refresh == 0) | ~active.any(1)
        if policy.end_refreshes:
            refresh = refresh | self._ended(canvas)
        window = canvas.real & (policy.far_field | ~masked | (rank <= policy.external))
        few = (active | self.done | canvas.sources(active)) & canvas.real
        at_refresh = masked & (rank == 1) if policy.forced else masked & window
        fresh = refresh[:, None]
        self.phase = torch.where(refresh, 0, self.phase)
        self.done = self.done & ~fresh
        return Plan(
            compute=torch.where(fresh, window, few),
            read=torch.where(fresh, window, (self.base & canvas.real) | few),
            refresh=refresh,
            allow=torch.where(fresh, at_refresh, active),
        )

    def saw(self, canvas: Canvas, plan: Plan) -> None:
        policy, fresh = self.policy, plan.refresh[:, None]
        masked = canvas.masked
        rank = ranks(masked)
        # Rows of a far field are written, so the window may be that of the text after the pass.
        window = canvas.real & (~masked | (rank <= policy.external))
        self.base = torch.where(fresh, window & plan.compute, self.base)
        self.span = torch.where(fresh, masked & (rank <= policy.internal), self.span)
        # What a refresh reveals is fed once more, and what comes later until the phase ends.
        second = (self.phase == 1)[:, None]
        keep = self.done if policy.forced else self.done & ~second
        self.done = torch.where(fresh, canvas.revealed, keep | canvas.revealed)
        self.phase = self.phase + 1

    def select(self, index: Tensor) -> None:
        for name in ("phase", "base", "done", "span"):
            setattr(self, name, getattr(self, name)[index])

    @staticmethod
    def _ended(canvas: Canvas) -> Tensor:
        answer = canvas.places >= canvas.prompt
        return (torch.isin(canvas.x, canvas.eot_ids) & answer & canvas.real).any(1)


@dataclass(frozen=True, kw_only=True)
class WindowRule(RevealRule):
    """The rule: as many of the surest candidates as the decoder's steps ask for.

    Attributes:
        alg: what makes a place sure, the probability of its token ("low_confidence", "maskgit_plus"), low entropy or
            the lead over the second token ("topk_margin").
        forced: exactly one token at a refresh.
        early_stop: cut behind the first end token that was revealed, and reveal one token a pass.
    """

    alg: Literal["low_confidence", "maskgit_plus", "entropy", "topk_margin"] = "low_confidence"
    forced: bool = False
    early_stop: bool = False

    def __post_init__(self) -> None:
        if self.alg not in ALGORITHMS:
            raise unknown_name("WindowRule", "alg", str(self.alg), ALGORITHMS)

    def reveal(self, proposal: Proposal) -> Reveal:
        """The surest ones, and the cut."""
        canvas = proposal.canvas
        score = proposal.confidence
        if self.alg == "entropy":
            score = -proposal.entropy()
        elif self.alg == "topk_margin":
            score = proposal.margin()
        n = torch.ones_like(canvas.quota) if self.early_stop else canvas.quota
        if self.forced:
            n = torch.where(canvas.refreshed, 1, n)
        places = top_n(score, proposal.eligible, n)
        if not self.early_stop:
            return Reveal(places)
        ends = places & torch.isin(proposal.drafts, canvas.eot_ids)
        first = ends.to(torch.int8).argmax(1)
        return Reveal(places, cut=torch.where(ends.any(1), first, -1))


@dataclass(frozen=True, kw_only=True)
class WindowDiffusion:
    """The method with the paper's settings: a policy, its rule, and the decoder made of them.

    ``Diffusion(method.rule, method.cache, steps=...)`` and ``method.decoder()`` are the same; each part goes with
    other rules and policies as well.

    Attributes:
        external_window: W_ex, masks that the window holds (64 for LLaDA, 128 for Dream).
        internal_window: W_in, masks that a pass between refreshes feeds.
        refresh_cycle: R, passes from one refresh to the next.
        variant: "llada" (no shift, quota by steps, refreshes over all places) or "dream" (logits shifted by one, the
            linear time grid, refreshes over the window which reveal the first mask).
        steps: passes; None: as many as the answer has tokens.
        alg: what makes a place sure, see `WindowRule`; None: "low_confidence" for LLaDA, "entropy" for Dream.
        far_field: refreshes feed the far field; None: as the variant says.
        slide_window: the active masks move on inside a phase.
        early_stop: stop at the first end token.
        temperature, top_p, top_k: of the draws.
        cfg_scale: classifier-free guidance; only 0, none, works with a window.
        seed: of the draws.
    """

    external_window: int = 64
    internal_window: int = 16
    refresh_cycle: int = 32
    variant: Literal["llada", "dream"] = "llada"
    steps: int | None = None
    alg: Literal["low_confidence", "maskgit_plus", "entropy", "topk_margin"] | None = None
    far_field: bool | None = None
    slide_window: bool = True
    early_stop: bool = False
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    cfg_scale: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        where = "WindowDiffusion"
        names = ("external_window", "internal_window", "refresh_cycle")
        _check(where, self.external_window, self.internal_window, self.refresh_cycle, names)
        if self.variant not in VARIANTS:
            raise unknown_name(where, "variant", str(self.variant), VARIANTS)
        if self.alg is not None and self.alg not in ALGORITHMS:
            raise unknown_name(where, "alg", str(self.alg), ALGORITHMS)
        if self.cfg_scale != 0:
            mend = "Set it to 0."
            raise UnsupportedError(
                where, f"classifier-free guidance with a window (cfg_scale = {self.cfg_scale})", mend
            )
        self.decoder()  # refuses what is wrong with the rest

    @property
    def cache(self) -> WindowCache:
        """The policy."""
        dream = self.variant == "dream"
        return WindowCache(
            external=self.external_window,
            internal=self.internal_window,
            refresh=self.refresh_cycle,
            far_field=not dream if self.far_field is None else self.far_field,
            forced=dream,
            slide=self.slide_window,
            end_refreshes=self.early_stop,
        )

    @property
    def rule(self) -> WindowRule:
        """The rule."""
        alg = self.alg if self.alg is not None else ("entropy" if self.variant == "dream" else "low_confidence")
        return WindowRule(alg=alg, forced=self.variant == "dream", early_stop=self.early_stop)

    def decoder(self, **settings: Any) -> Diffusion:
        """The decoder; ``settings`` are those of `Diffusion`, such as ``mask_token_id``."""
        dream = self.variant == "dream"
        own: dict[str, Any] = {
            "steps": self.steps,
            "schedule": "linear" if dream else "even",
            "logits_shift": True if dream else None,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "seed": self.seed,
        }
        return Diffusion(self.rule, self.cache, **(own | settings))


def _check(where: str, external: int, internal: int, cycle: int, names: tuple[str, str, str]) -> None:
    for name, value in zip(names, (external, internal, cycle), strict=True):
        if isinstance(value, bool) or value < 1:
            raise LimitError(where, name, value, "at least 1")
    if internal > external:
        raise LimitError(where, names[1], internal, f"at most {names[0]} = {external}")


def small() -> WindowDiffusion:
    """An instance for tiny models, used by the laws."""
    return WindowDiffusion(external_window=8, internal_window=3, refresh_cycle=4)
