"""The loop of unmasking: plan, feed, propose, reveal, cut, until no row has a mask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokenmill.diffuse._draws import sample
from tokenmill.diffuse._proposal import Proposal, put
from tokenmill.diffuse._request import Chance
from tokenmill.diffuse._rule import Reveal
from tokenmill.diffuse._schedule import even_quota, linear_quota
from tokenmill.diffuse._trace import DiffusionTrace, Snapshot
from tokenmill.errors import NonFiniteError, StoppedError

if TYPE_CHECKING:
    from tokenmill import hf
    from tokenmill.diffuse._canvas import Canvas
    from tokenmill.diffuse._denoiser import Batch, Denoiser
    from tokenmill.diffuse._policy import KVPolicy, Plan
    from tokenmill.diffuse._rule import RevealRule

_PATIENCE = 4  # passes for each token of the answer after which a rule is taken to stand still


@dataclass(frozen=True, slots=True)
class Settings:
    """What of the decoder's settings the loop needs."""

    steps: int | None
    schedule: str
    chance: Chance
    early_stop: int
    filler: int
    history: bool
    watch: Callable[[Snapshot], None] | None
    streamer: Any


def unmask(
    canvas: Canvas,
    denoiser: Denoiser,
    rule: RevealRule,
    policy: KVPolicy,
    settings: Settings,
    trace: DiffusionTrace,
) -> Tensor:
    """Fill the canvas; returns (B, T) int64, rows that were cut padded to the longest.

    Raises:
        NonFiniteError: the model's logits are not finite.
        StoppedError: the rule makes no headway, or leaves masks although it does not say that it may.
    """
    sheet = _Sheet(canvas, trace, settings)
    cache = denoiser.new_cache(len(canvas), canvas.size) if policy.caches else None
    policy_run, rule_run = policy.begin(canvas), rule.begin(canvas)
    limit = _PATIENCE * max(canvas.size, settings.steps or 0) + 16
    while True:
        going = canvas.masked.any(1)
        if not bool(going.all()):
            sheet.leave(canvas, ~going)
            index = going.nonzero().squeeze(1)
            canvas.select(index)
            policy_run.select(index)
            rule_run.select(index)
            if cache is not None and index.numel() and cache.get_seq_length():
                cache.batch_select_indices(index)
        if not len(canvas):
            break
        _set_quota(canvas, settings)
        plan = policy_run.plan(canvas)
        proposal = _pass(canvas, denoiser, plan, cache, settings, trace)
        decided = rule_run.reveal(proposal)
        revealed = _write(canvas, proposal, decided, settings)
        policy_run.saw(canvas, plan)
        canvas.find_block()
        sheet.after_pass(canvas, revealed)
        if int(canvas.passes.max()) > limit:
            raise StoppedError(f"Diffusion: {type(rule).__name__} has not finished after {limit} passes.")
    return sheet.finish(rule)


def _pass(
    canvas: Canvas,
    denoiser: Denoiser,
    plan: Plan,
    cache: hf.IndexedCache | None,
    settings: Settings,
    trace: DiffusionTrace,
) -> Proposal:
    """Feed the planned places and enter what the model predicts into the canvas."""
    batch = denoiser.logits(
        canvas.x,
        real=canvas.real,
        positions=canvas.positions,
        compute=plan.compute,
        read=plan.read,
        cache=cache,
        frozen=plan.frozen,
    )
    _count(canvas, denoiser, plan, batch, trace)
    best, drafts = batch.logits.max(-1)  # (B, Q)
    _check_finite(best, batch, trace)
    masked = canvas.masked
    if settings.chance.temperature > 0:
        drawn = batch.valid & masked.gather(1, batch.targets)
        chosen = sample(
            batch.logits,
            drawn,
            canvas.generators,
            temperature=settings.chance.temperature,
            top_k=settings.chance.top_k,
            top_p=settings.chance.top_p,
        )
        drafts = drafts.masked_scatter(drawn, chosen)
        best = batch.logits.gather(-1, drafts[..., None])[..., 0]
    confidence = (best - batch.logits.logsumexp(-1)).exp()
    canvas.drafts = put(canvas.drafts, batch.targets, batch.valid, drafts)
    canvas.confidence = put(canvas.confidence, batch.targets, batch.valid, confidence)
    canvas.fresh = put(torch.zeros_like(canvas.real), batch.targets, batch.valid, batch.valid)
    canvas.refreshed = plan.refresh
    eligible = masked & canvas.fresh & (canvas.places < canvas.stop[:, None])
    if plan.allow is not None:
        eligible = eligible & plan.allow
    return Proposal(canvas, batch.logits, batch.targets, batch.valid, eligible)


def _write(canvas: Canvas, proposal: Proposal, decided: Reveal | Tensor, settings: Settings) -> Tensor:
    """Write what was decided, cut, count the pass; returns (B, S) bool, the places revealed."""
    reveal = decided if isinstance(decided, Reveal) else Reveal(decided)
    places = reveal.places & proposal.eligible
    tokens = canvas.drafts if reveal.tokens is None else reveal.tokens
    canvas.x = torch.where(places, tokens, canvas.x)
    if reveal.cut is not None:
        canvas.cut(reveal.cut, settings.filler)
    if settings.early_stop:
        canvas.cut(_end_of_text(canvas, settings.early_stop), settings.filler)
    if reveal.leave is not None:
        canvas.left = canvas.left | (reveal.leave[:, None] & canvas.in_block & canvas.masked)
    canvas.revealed = places & canvas.real
    canvas.passes = canvas.passes + 1
    canvas.block_passes = canvas.block_passes + 1
    return canvas.revealed


def _end_of_text(canvas: Canvas, count: int) -> Tensor:
    """(B,) int64: the last of the first ``count`` revealed end tokens in a row in the answer, -1 without them."""
    ends = torch.isin(canvas.x, canvas.eot_ids) & canvas.real & (canvas.places >= canvas.prompt)
    runs = ends.clone()
    for back in range(1, count):
        runs &= torch.nn.functional.pad(ends[:, :-back], (back, 0))
    place = runs.to(torch.int8).argmax(1)
    return torch.where(runs.any(1), place, -1)


def _set_quota(canvas: Canvas, settings: Settings) -> None:
    steps = settings.steps
    if settings.schedule == "linear":
        steps = steps if steps is not None else max(canvas.size - canvas.prompt, 1)
        canvas.quota = linear_quota(canvas.masked.sum(1), steps, canvas.passes)
        return
    if steps is None:
        return
    blocks = max(-(-(canvas.size - canvas.prompt) // canvas.block_length), 1)
    block = ((canvas.start - canvas.prompt) // canvas.block_length).clamp(min=0)
    share = steps // blocks + (block < steps % blocks).long()
    canvas.quota = even_quota(canvas.block_masks, share.clamp(min=1), canvas.block_passes)


def _count(canvas: Canvas, denoiser: Denoiser, plan: Plan, batch: Batch, trace: DiffusionTrace) -> None:
    trace.model_calls += 1
    refreshes = plan.refresh.tolist()
    for row, queries, keys, new in zip(
        canvas.row.tolist(), batch.queries.tolist(), batch.keys.tolist(), refreshes, strict=True
    ):
        trace.row_calls[row] += 1
        trace.row_positions[row] += queries
        trace.positions += queries
        trace.refreshes += new
        trace.flops += denoiser.flops(queries, keys)


def _check_finite(best: Tensor, batch: Batch, trace: DiffusionTrace) -> None:
    bad = ~best.isfinite() & batch.valid
    if bool(bad.any()):
        row, at = bad.nonzero()[0].tolist()
        raise NonFiniteError(
            f"Diffusion: the model's logits hold {best[row, at].item()} at call {trace.model_calls} (place "
            f"{int(batch.targets[row, at])}), but every place must have a finite maximum. The answers so far are in "
            ".partial.",
        )


class _Sheet:
    """The whole batch, finished rows and live ones: output, history, counts by row, the stream."""

    def __init__(self, canvas: Canvas, trace: DiffusionTrace, settings: Settings) -> None:
        rows = len(canvas)
        self.ids, self.real = canvas.x.clone(), canvas.real.clone()
        self.settings, self.trace, self.prompt, self.mask_id = settings, trace, canvas.prompt, canvas.mask_id
        trace.row_calls, trace.row_positions, trace.row_tokens = [0] * rows, [0] * rows, [0] * rows
        trace.lengths, trace.still_masked = [canvas.size - canvas.prompt] * rows, [False] * rows
        trace.prompt, trace.mask_id, trace.sequences = canvas.prompt, canvas.mask_id, self.ids
        self.streamed = canvas.prompt
        if settings.streamer is not None:
            settings.streamer.put(canvas.x[:, : canvas.prompt].cpu())

    def after_pass(self, canvas: Canvas, revealed: Tensor) -> None:
        """Enter the live rows."""
        trace, settings = self.trace, self.settings
        self.ids[canvas.row], self.real[canvas.row] = canvas.x, canvas.real
        counts = revealed.sum(1).tolist()
        for row, count in zip(canvas.row.tolist(), counts, strict=True):
            trace.row_tokens[row] += count
        trace.revealed.append(sum(counts))
        trace.tokens += sum(counts)
        if settings.history:
            trace.history.append(self.ids[:, self.prompt :].cpu().clone())
        if settings.watch is not None:
            whole = torch.zeros_like(self.real)
            whole[canvas.row] = revealed
            settings.watch(Snapshot(self.ids.clone(), self.prompt, trace.model_calls, whole, self.mask_id))
        self._stream()

    def leave(self, canvas: Canvas, done: Tensor) -> None:
        """Rows ``done`` (B,) bool are finished."""
        rows = canvas.row[done]
        self.ids[rows], self.real[rows] = canvas.x[done], canvas.real[done]
        lengths = (canvas.length - canvas.prompt)[done]
        masks = ((canvas.x == canvas.mask_id) & canvas.real).any(1)[done]
        for row, length, masked in zip(rows.tolist(), lengths.tolist(), masks.tolist(), strict=True):
            self.trace.lengths[row], self.trace.still_masked[row] = max(length, 0), masked

    def finish(self, rule: RevealRule) -> Tensor:
        """The output (B, T). Masks that a rule left become padding, and ``trace.still_masked`` says so."""
        self._stream()
        trace = self.trace
        trace.tokens_so_far = self.ids[0, self.prompt : self.prompt + trace.lengths[0]].tolist()
        if any(trace.still_masked) and not rule.leaves_masks:
            row = trace.still_masked.index(True)
            raise StoppedError(f"Diffusion: {type(rule).__name__} gave up masks of row {row}.")
        out = self.ids[:, : self.prompt + max(trace.lengths)]
        return torch.where((out == self.mask_id) & self.real[:, : out.shape[1]], self.settings.filler, out)

    def _stream(self) -> None:
        """Pass on what is final from the left on; of one row only, since rows do not keep step."""
        if self.settings.streamer is None or self.ids.shape[0] > 1:
            return
        rest = (self.ids[0, self.streamed :] != self.mask_id) & self.real[0, self.streamed :]
        ready = int(rest.long().cumprod(0).sum())
        if ready:
            self.settings.streamer.put(self.ids[0, self.streamed : self.streamed + ready].cpu())
            self.streamed += ready
