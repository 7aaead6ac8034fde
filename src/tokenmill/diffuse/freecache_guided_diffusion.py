"""FreeCache and guided diffusion (FlashDLM, 2025): a prefix that is cached for good, and a causal model that judges.

FreeCache projects keys and values of finished text once and never again. Guided diffusion reveals the longest run of
the diffusion model's own drafts that a small causal model agrees to; the guide decides how many tokens are safe, never
which. Use the cache where prompts are long, the guide where tokens that are revealed together get in each other's way.
Not for answers that are not written from left to right; and a guide that is as good as the model, and smaller, had
better write the text itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from tokenmill.catalog import Card, Paper, Reported
from tokenmill.diffuse._judge import ACCEPTANCES, Acceptance, Judge, check_map
from tokenmill.diffuse._judge import accepts as accepts
from tokenmill.diffuse._judge import token_map_of as token_map_of
from tokenmill.diffuse._policy import KVPolicy, Plan
from tokenmill.diffuse._rule import Reveal, RevealRule
from tokenmill.errors import LimitError, unknown_name

if TYPE_CHECKING:
    from tokenmill.diffuse._canvas import Canvas
    from tokenmill.diffuse._policy import PolicyRun
    from tokenmill.diffuse._proposal import Proposal
    from tokenmill.diffuse._rule import RuleRun

CARD = Card(
    name="FreeCache and guided diffusion",
    kind="rule",
    paper=Paper(
        title="Accelerating Diffusion Language Model Inference via Efficient KV Caching and Guided Diffusion",
        date="2025-05-27",
        arxiv="2505.21467",
        code="https://github.com/ZhanqiuHu/flash-dlm-experimental",
    ),
    summary=(
        "Keys and values of finished text are computed once and kept for good. A small causal model says how many of "
        "the diffusion model's drafts may be revealed together."
    ),
    claim="12.14x faster on average on Dream-7B-Instruct with negligible loss, FreeCache and a guide of 1.5B together.",
    api=("GuidedRule", "FreeCache", "Acceptance", "accepts", "token_map_of"),
    exact=False,
    trains=False,
    task="diffuse",
    needs=frozenset({"guide_model"}),
    works_with=("llama", "qwen2", "gemma3_text"),
    differs=(
        "a place is frozen once it was fed as a clean token; freeze='official' freezes tokens as the masks they were "
        "in the pass that revealed them",
        "batches: every row has its own frozen prefix and its own run of accepted drafts",
        "on_reject='guide' writes the guide's token and ends the pass there",
        "what stands behind an end token is cut instead of filled with end tokens",
        "tokenizers that differ are joined token by token; a draft that the guide has no token for is never accepted",
    ),
    reported=Reported(
        table="abstract of the second version",
        setting="Dream-7B-Instruct, guide Qwen2.5-1.5B-Instruct, mean over tasks",
        metric="speed-up",
        value=12.14,
    ),
)

POLICIES = ("block", "aggressive", "sliding")
FREEZES = ("delayed", "official", "never")


def frozen_prefix(
    first: Tensor, was_first: Tensor, frozen: Tensor, *, prompt: int, policy: str, block: int, window: int, shift: bool
) -> Tensor:
    """Up to where keys and values are kept for good, row by row.

    Args:
        first: (B,) the first mask.
        was_first: (B,) the first place that the last pass did not feed as a clean token.
        frozen: (B,) the same before this pass; it never goes back.
        prompt: where the answer starts.
        policy: "block" keeps what lies in front of the current block, "aggressive" what lies in front of the last clean
            token, "sliding" what lies more than ``window`` in front of it.
        block, window: places.
        shift: predictions are read one place before their token, so that place must be fed.

    Returns:
        (B,) int64, places below it are frozen.
    """
    if policy == "block":
        target = prompt + (first - prompt).div(block, rounding_mode="floor") * block - int(shift)
    elif policy == "aggressive":
        target = first - 1
    else:
        target = first - 1 - window
    return torch.maximum(frozen, torch.minimum(target, was_first)).clamp(min=0)


@dataclass(frozen=True, kw_only=True)
class FreeCache(KVPolicy):
    """Cache policy without refresh: a clean prefix is frozen, the rest is fed.

    Attributes:
        policy: how far the prefix reaches, see `frozen_prefix`; "sliding" also leaves out what lies ``window`` or more
            places behind the last clean token.
        block_size: places of a block, for "block"; the decoder's own blocks are another matter.
        window: places to both sides, for "sliding".
        freeze: "delayed" waits until a token was fed as itself, "official" freezes what the last pass computed,
            "never" freezes nothing.
    """

    policy: Literal["block", "aggressive", "sliding"] = "block"
    block_size: int = 32
    window: int = 128
    freeze: Literal["delayed", "official", "never"] = "delayed"

    def __post_init__(self) -> None:
        where = "FreeCache"
        if self.policy not in POLICIES:
            raise unknown_name(where, "policy", str(self.policy), POLICIES)
        if self.freeze not in FREEZES:
            raise unknown_name(where, "freeze", str(self.freeze), FREEZES)
        for name in ("block_size", "window"):
            value = getattr(self, name)
            if isinstance(value, bool) or value < 1:
                raise LimitError(where, name, value, "at least 1")

    def begin(self, canvas: Canvas) -> PolicyRun:
        """Nothing is frozen yet."""
        return _FreeRun(self, canvas)


class _FreeRun:
    """The frozen prefix of each row."""

    def __init__(self, policy: FreeCache, canvas: Canvas) -> None:
        self.policy = policy
        self.frozen = torch.zeros_like(canvas.passes)  # (B,)
        self.clean = torch.zeros_like(canvas.passes)  # (B,) the last pass fed all places below as clean tokens

    def plan(self, canvas: Canvas) -> Plan:
        policy, first, places = self.policy, canvas.first, canvas.places
        if policy.freeze != "never":
            # Nothing is written yet before the first pass.
            clean = self.clean if policy.freeze == "delayed" else torch.where(canvas.passes > 0, first, 0)
            self.frozen = frozen_prefix(
                first,
                clean,
                self.frozen,
                prompt=canvas.prompt,
                policy=policy.policy,
                block=policy.block_size,
                window=policy.window,
                shift=canvas.shift,
            )
        self.clean = first
        seen = canvas.real
        if policy.policy == "sliding":
            seen = seen & (places < (first - 1 + policy.window).maximum(first + 1)[:, None])
        compute = seen & (places >= self.frozen[:, None])
        return Plan(compute, seen, canvas.passes == 0, frozen=self.frozen)

    def saw(self, canvas: Canvas, plan: Plan) -> None:
        """Nothing to learn; the next plan looks at the text."""

    def select(self, index: Tensor) -> None:
        self.frozen, self.clean = self.frozen[index], self.clean[index]


@dataclass(frozen=True)
class GuidedRule(RevealRule):
    """Reveal the run of drafts that a causal model agrees to, at least one, from the first mask on.

    Args:
        guide: any causal model, with the diffusion model's vocabulary or a ``token_map``.
        acceptance: when the guide agrees, see `accepts`.
        top_k, relative, threshold, floor, top_p: numbers of the acceptance modes.
        verify_chunk: drafts that one pass of the guide judges.
        on_reject: what the first rejected place gets: ``"draft"``: nothing, unless no draft at all was accepted;
            ``"guide"``: the guide's likeliest token; ``"resample"``: a draw of the guide without the draft.
        token_map: (V,) ids of the model as ids of the guide, -1 for none, or a mapping; see `token_map_of`.
        stop_at_eot: cut behind the first end token that is revealed.

    Raises:
        LimitError: a number outside its limit, or (when decoding starts) a guide with another vocabulary and no map.
    """

    guide: Any
    _: KW_ONLY
    acceptance: Literal["argmax", "topk", "topk_relative", "threshold", "sample", "aggressive"] = "argmax"
    top_k: int = 5
    relative: float = 0.5
    threshold: float = 0.1
    floor: float = 0.05
    top_p: float = 0.95
    verify_chunk: int = 32
    on_reject: Literal["draft", "guide", "resample"] = "draft"
    token_map: Tensor | Mapping[int, int] | None = field(default=None, compare=False)
    stop_at_eot: bool = True

    def __post_init__(self) -> None:
        where = "GuidedRule"
        if not callable(self.guide) or not hasattr(self.guide, "config"):
            raise LimitError(where, "guide", self.guide, "a causal model with a config")
        if self.acceptance not in ACCEPTANCES:
            raise unknown_name(where, "acceptance", str(self.acceptance), ACCEPTANCES)
        if self.on_reject not in ("draft", "guide", "resample"):
            raise unknown_name(where, "on_reject", str(self.on_reject), ("draft", "guide", "resample"))
        for name in ("top_k", "verify_chunk"):
            value = getattr(self, name)
            if isinstance(value, bool) or value < 1:
                raise LimitError(where, name, value, "at least 1")
        for name in ("relative", "threshold", "floor", "top_p"):
            if not 0 <= getattr(self, name) <= 1:
                raise LimitError(where, name, getattr(self, name), "in [0, 1]")

    def begin(self, canvas: Canvas) -> RuleRun:
        """The guide beside the rows of ``canvas``."""
        return _Guided(self, canvas)


class _Guided:
    """A guided rule at work: the judge, and what its verdicts reveal."""

    def __init__(self, rule: GuidedRule, canvas: Canvas) -> None:
        self.rule = rule
        how = Acceptance(rule.acceptance, rule.top_k, rule.relative, rule.threshold, rule.floor, rule.top_p)
        special = (canvas.mask_id, *canvas.eot_ids.tolist())
        guide = int(rule.guide.config.vocab_size)
        ids = check_map(rule.token_map, vocabulary=canvas.vocab_size, guide=guide, special=special)
        self.judge = Judge(rule.guide, canvas, ids, rule.verify_chunk, how)
        self.back = torch.full((guide,), -1, device=canvas.x.device)
        known = self.judge.ids >= 0
        self.back[self.judge.ids[known].flip(0)] = known.nonzero()[:, 0].flip(0)

    def reveal(self, proposal: Proposal) -> Reveal:
        canvas, rule = proposal.canvas, self.rule
        first = canvas.first
        behind = canvas.places >= first[:, None]
        run = (proposal.eligible | ~behind).long().cumprod(1).bool() & behind  # (B, S) drafts from the first mask on
        tokens = torch.where(run, proposal.drafts, canvas.x)
        agreed, logq, rejected = self.judge.run(canvas, tokens, run)
        count = agreed.clamp(min=1)
        if rule.on_reject != "draft":
            own = self._instead(logq, tokens, first + agreed, canvas)
            write = rejected & (own >= 0)
            place = (first + agreed).clamp(max=canvas.size - 1)[:, None]
            tokens = torch.where(write[:, None], tokens.scatter(1, place, own.clamp(min=0)[:, None]), tokens)
            count = torch.where(write, agreed + 1, count)
        places = run & (canvas.places < (first + count)[:, None])
        self.judge.committed(first + places.sum(1))
        cut = self._cut(canvas, places, tokens)
        if cut is not None:
            agreed = torch.where(cut >= 0, agreed.minimum(cut + 1 - first), agreed)
        trace = canvas.trace
        trace.accepted += int(agreed.sum())
        trace.accepted_runs.append(agreed.tolist())
        return Reveal(places, cut=cut, tokens=tokens)

    def select(self, index: Tensor) -> None:
        self.judge.select(index)

    def _instead(self, logq: Tensor, tokens: Tensor, place: Tensor, canvas: Canvas) -> Tensor:
        """(B,) the guide's token, an id of the model, for the first rejected place; -1 when the model has none."""
        if self.rule.on_reject == "resample":
            draft = self.judge.ids[tokens.gather(1, place.clamp(max=canvas.size - 1)[:, None])]  # (B, 1)
            logq = logq.scatter(1, draft.clamp(min=0), -torch.inf)
            u = torch.stack([torch.rand(logq.shape[1], generator=g, device=logq.device) for g in canvas.generators])
            logq = logq - (-u.double().clamp(min=1e-300).log()).log()
        found = self.back[logq.argmax(1)]
        return torch.where(found == canvas.mask_id, -1, found)

    def _cut(self, canvas: Canvas, places: Tensor, tokens: Tensor) -> Tensor | None:
        if not self.rule.stop_at_eot:
            return None
        ends = places & torch.isin(tokens, canvas.eot_ids)
        return torch.where(ends.any(1), ends.to(torch.int8).argmax(1), -1)


def small() -> GuidedRule:
    """An instance for tiny models, used by the laws."""
    from tokenmill import models

    return GuidedRule(models.tiny("llama", seed=5), acceptance="topk", top_k=20, verify_chunk=3)
