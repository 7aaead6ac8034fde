"""Learn2PD: a tiny network predicts which tokens of a block are final already, and they are revealed together.

"Learning to Parallel: Accelerating Diffusion Large Language Models via Adaptive Parallel Decoding" (arXiv 2509.25188).
An oracle that knew the final text would reveal, in each pass, every place whose prediction is final. Replaying it
(`oracle_replay`) gives rows of confidences and labels, from which `train_filter` makes a `BlockFilter` of about two
thousand weights in minutes. With ``predict_eot`` a row is cut where its text ends, so that later passes are shorter.

Use it where confidences mean different things at different places of a block, or differ from model to model, and where
answers end long before their buffer does. A constant threshold that is tuned on the same data needs no training, and on
tasks of one kind it is as good.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenmill.catalog import Card, Paper, Reported
from tokenmill.diffuse._block_filter import BlockFilter, FilterConfig, FilterReport, FilterRows, train_filter
from tokenmill.diffuse._decoder import Diffusion
from tokenmill.diffuse._proposal import Proposal
from tokenmill.diffuse._rule import Reveal, RevealRule
from tokenmill.diffuse._rules import Quota, top_n
from tokenmill.errors import LimitError, unknown_name

if TYPE_CHECKING:
    from tokenmill.diffuse._canvas import Canvas

__all__ = [
    "CARD",
    "BlockFilter",
    "FilterConfig",
    "FilterReport",
    "FilterRows",
    "Learn2PD",
    "Replay",
    "oracle_replay",
    "train_filter",
]

SCOPES = ("any", "block")

CARD = Card(
    name="Learn2PD",
    kind="rule",
    paper=Paper(
        title="Learning to Parallel: Accelerating Diffusion Large Language Models via Adaptive Parallel Decoding",
        date="2025-09-29",
        arxiv="2509.25188",
        code="https://github.com/ims-kdks/Learning-to-Parallel-Decoding",
    ),
    summary=(
        "A two-layer network reads the confidences of a block and says which predictions are final; those are revealed "
        "together. It learns from an oracle's replay of the model's own answers, and end-of-text prediction cuts what "
        "stands behind them."
    ),
    claim=(
        "LLaDA-8B on GSM8K with a buffer of 1,024: 12 times the tokens a second, 22.6 times with end-of-text "
        "prediction, at equal accuracy."
    ),
    api=(
        "Learn2PD",
        "BlockFilter",
        "FilterConfig",
        "FilterRows",
        "FilterReport",
        "train_filter",
        "oracle_replay",
        "Replay",
    ),
    exact=False,
    trains=True,
    task="diffuse",
    needs=frozenset({"filter"}),
    works_with=("llama", "qwen2", "gemma3_text"),
    differs=(
        "end-of-text prediction cuts each row of a batch at its own place; the authors cut all at the first row's",
        "training rows are split by prompt, not row by row, so that no prompt is on both sides",
        "a block that is shorter than the filter is filled with zeros; the authors' code leaves this open",
    ),
    reported=(
        Reported(table="project page", setting="LLaDA-8B, GSM8K, buffer 1024", metric="speed-up", value=12.21),
        Reported(table="project page", setting="the same with end of text", metric="speed-up", value=22.58),
    ),
)


@dataclass(frozen=True)
class Learn2PD(RevealRule):
    """A trained filter as a rule: ``Diffusion(Learn2PD(filter), block_length=filter.config.block_length)``.

    A pass reveals what the filter accepts, and always the most confident places that the decoder's ``steps`` ask for.

    Attributes:
        filter: a `BlockFilter`, or the folder of a saved one; None accepts nothing.
        threshold: acceptance above which a place is revealed; None takes the filter's own. Choose it on validation
            data: a small filter may never be as sure as the paper's 0.96.
        predict_eot: cut a row where its text ends. At the first end-of-text token that the filter accepts, or else at
            the most confident one among all that are predicted. A cut cannot be undone.
        eot_min_confidence: least confidence of the second kind of cut.
        eot_scope: where the second kind looks: at all masks, or at those of the current block.
        min_reveal: places that are revealed whatever the filter says; None as many as the decoder's ``steps`` ask for.
    """

    filter: BlockFilter | Path | str | None
    _: KW_ONLY
    threshold: float | None = None
    predict_eot: bool = False
    eot_min_confidence: float = 0.0
    eot_scope: Literal["any", "block"] = "any"
    min_reveal: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.filter, Path | str):
            object.__setattr__(self, "filter", BlockFilter.load(self.filter))
        if self.threshold is not None and not self.threshold >= 0:
            raise LimitError("Learn2PD", "threshold", self.threshold, "None or at least 0")
        if not 0 <= self.eot_min_confidence <= 1:
            raise LimitError("Learn2PD", "eot_min_confidence", self.eot_min_confidence, "in [0, 1]")
        if self.eot_scope not in SCOPES:
            raise unknown_name("Learn2PD", "eot_scope", str(self.eot_scope), SCOPES)
        if self.min_reveal is not None and (isinstance(self.min_reveal, bool) or self.min_reveal < 0):
            raise LimitError("Learn2PD", "min_reveal", self.min_reveal, "None or at least 0")

    @classmethod
    def load(cls, folder: str | Path, **settings: Any) -> Learn2PD:
        """A rule with the filter of a folder."""
        return cls(BlockFilter.load(folder), **settings)

    def begin(self, canvas: Canvas) -> Learn2PD:
        """Refuse a decoder that does not fit.

        Raises:
            LimitError: another block length than the filter's, or no end-of-text id to predict.
        """
        if isinstance(self.filter, BlockFilter) and self.filter.config.block_length != canvas.block_length:
            own = self.filter.config.block_length
            mend = f"Pass block_length={own} to Diffusion, or train a filter for {canvas.block_length}."
            raise LimitError("Learn2PD", "block_length", canvas.block_length, f"{own}, the filter's", mend)
        if self.predict_eot and not len(canvas.eot_ids):
            raise LimitError(
                "Learn2PD", "eot_id", None, "given, to predict the end of text", "Pass eot_id to Diffusion."
            )
        return self

    def reveal(self, proposal: Proposal) -> Reveal:
        """What is accepted or forced, and where a row is cut."""
        accepted = self.accepted(proposal) & proposal.eligible
        forced = proposal.canvas.quota if self.min_reveal is None else self.min_reveal
        places = accepted | top_n(proposal.confidence, proposal.eligible, forced)
        return Reveal(places, cut=self._cut(proposal, accepted) if self.predict_eot else None)

    def accepted(self, proposal: Proposal) -> Tensor:
        """(B, S) bool: places of the current block that the filter takes for final."""
        none = torch.zeros_like(proposal.eligible)
        if not isinstance(self.filter, BlockFilter):
            return none
        threshold = self.filter.config.threshold if self.threshold is None else self.threshold
        places, confidence = block_confidence(proposal.canvas)
        with torch.no_grad():
            let = self.filter(confidence).sigmoid() > threshold
        if proposal.canvas.trace is not None:
            proposal.canvas.trace.flops += len(confidence) * self.filter.flops
        return F.pad(none, (0, 1)).scatter(1, places, let)[:, :-1]

    def _cut(self, proposal: Proposal, accepted: Tensor) -> Tensor:
        """(B,) int64: the last place that a row keeps, -1 for all."""
        canvas = proposal.canvas
        ends = torch.isin(canvas.drafts, canvas.eot_ids) & canvas.fresh & canvas.masked
        sure = ends & accepted
        first = sure.to(torch.int8).argmax(1)
        where = ends & (canvas.places >= canvas.prompt) & (canvas.confidence >= self.eot_min_confidence)
        if self.eot_scope == "block":
            where = where & canvas.in_block
        likeliest = canvas.confidence.masked_fill(~where, -1.0).argmax(1)
        return torch.where(sure.any(1), first, torch.where(where.any(1), likeliest, -1))


def block_confidence(canvas: Canvas) -> tuple[Tensor, Tensor]:
    """The current block of each row.

    Returns:
        Its places (B, K) int64, S where the block is shorter than K, and the confidences there (B, K), 0 for those.
    """
    offset = torch.arange(canvas.block_length, device=canvas.x.device)
    places = canvas.start.clamp_min(canvas.prompt)[:, None] + offset
    places = torch.where(places < canvas.stop[:, None], places, canvas.size)
    return places, F.pad(canvas.confidence, (0, 1)).gather(1, places)


@dataclass(frozen=True, slots=True)
class Replay:
    """An oracle's replay of a batch.

    Attributes:
        reference: (B, P + G) int64, prompts with the answers of one-token decoding.
        replayed: (B, P + G) int64, the same by the oracle: equal.
        passes: (B,) int64, passes that the oracle took; no rule that keeps the text can do with fewer by much.
        rows: confidences and labels of every pass.
    """

    reference: Tensor
    replayed: Tensor
    passes: Tensor
    rows: FilterRows


def oracle_replay(
    model: Any,
    input_ids: Tensor,
    *,
    max_new_tokens: int,
    block_length: int,
    attention_mask: Tensor | None = None,
    **decoder: Any,
) -> Replay:
    """Decode one token a pass, then again as an oracle that reveals all that is final; rows for `train_filter`.

    Args:
        model: a bidirectional model, as `Diffusion` takes it.
        input_ids: (B, P), padded on the left.
        max_new_tokens: length G of the answers.
        block_length: K.
        attention_mask: (B, P), or None without padding.
        decoder: other settings of `Diffusion`, without a temperature.

    Raises:
        LimitError: a temperature, under which the replay would meet another text.
    """
    if decoder.get("temperature"):
        raise LimitError("oracle_replay", "temperature", decoder["temperature"], "0", "Drawn tokens have no replay.")
    lengths = {"max_new_tokens": max_new_tokens, "attention_mask": attention_mask}
    reference = Diffusion(Quota(1), block_length=block_length, **decoder).generate(model, input_ids, **lengths)
    oracle = _Oracle(reference)
    again = Diffusion(oracle, block_length=block_length, **decoder)
    replayed = again.generate(model, input_ids, **lengths)
    passes = torch.tensor(again.trace.row_calls, device=input_ids.device)
    return Replay(reference, replayed, passes, oracle.rows())


class _Oracle(RevealRule):
    """Reveals, in the current block, what equals the reference; a block that stands still is filled from it."""

    def __init__(self, reference: Tensor) -> None:
        self.reference = reference
        self.before = reference
        self.seen: list[FilterRows] = []

    def begin(self, canvas: Canvas) -> _Oracle:
        """Forget what was recorded."""
        self.before, self.seen = torch.full_like(canvas.x, -1), []
        return self

    def reveal(self, proposal: Proposal) -> Reveal:
        """Record the block, and reveal what is final."""
        canvas = proposal.canvas
        wanted = self.reference[canvas.row]
        places, confidence = block_confidence(canvas)
        final = canvas.drafts == wanted
        label = F.pad(final, (0, 1)).gather(1, places) & (places < canvas.size)
        block = (canvas.start.clamp_min(canvas.prompt) - canvas.prompt) // canvas.block_length
        self.seen.append(FilterRows(confidence, label, canvas.row, block, canvas.block_passes.clone()))
        changed = ((canvas.drafts != self.before) & canvas.in_block).any(1)
        stuck = (~changed & (canvas.block_passes > 0))[:, None]
        self.before = canvas.drafts
        return Reveal(final | stuck, tokens=torch.where(stuck, wanted, canvas.drafts))

    def select(self, index: Tensor) -> None:
        """Keep the rows that go on."""
        self.before = self.before[index]

    def rows(self) -> FilterRows:
        """All rows that were recorded."""
        names = ("confidence", "label", "prompt", "block", "step")
        return FilterRows(*(torch.cat([getattr(one, name) for one in self.seen]) for name in names))


def small() -> Learn2PD:
    """Without a filter, since the laws decode with block lengths of their own: one token a pass."""
    return Learn2PD(None)
