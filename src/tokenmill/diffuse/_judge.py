"""A causal model as judge of drafts: which run of them it agrees to, with its own KV cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokenmill.diffuse._denoiser import Denoiser
from tokenmill.diffuse._draws import uniform
from tokenmill.errors import LimitError, NonFiniteError

if TYPE_CHECKING:
    from tokenmill.diffuse._canvas import Canvas

ACCEPTANCES = ("argmax", "topk", "topk_relative", "threshold", "sample", "aggressive")


@dataclass(frozen=True, slots=True)
class Acceptance:
    """When a judge with distribution q accepts a draft d; see `accepts`."""

    mode: str = "argmax"
    top_k: int = 5
    relative: float = 0.5
    threshold: float = 0.1
    floor: float = 0.05
    top_p: float = 0.95


def accepts(logq: Tensor, drafts: Tensor, how: Acceptance, u: Tensor | None = None) -> Tensor:
    """Which drafts the judge accepts.

    ``argmax``: no token is likelier than d. ``topk``: fewer than ``top_k`` are. ``topk_relative``: fewer than two are,
    and q(d) is at least ``relative`` of the largest q. ``threshold``: q(d) > ``threshold``. ``sample``: with a
    probability of q(d). ``aggressive``: among the ``top_k``, or q(d) > ``floor``, or in the nucleus of mass ``top_p``.

    Args:
        logq: (N, V) log-probabilities.
        drafts: (N,) int64; -1 for a token that the judge does not have, which is never accepted.
        how: the mode and its numbers.
        u: (N,) uniform numbers for ``sample``.

    Returns:
        (N,) bool.

    Raises:
        LimitError: ``sample`` without ``u``.
    """
    own = logq.gather(1, drafts.clamp(min=0)[:, None])  # (N, 1)
    above = logq > own
    rank, p = above.sum(1), own[:, 0].exp()
    if how.mode == "argmax":
        good = rank == 0
    elif how.mode == "topk":
        good = rank < how.top_k
    elif how.mode == "topk_relative":
        good = (rank < 2) & (own[:, 0] >= logq.amax(1) + torch.tensor(how.relative).log())
    elif how.mode == "threshold":
        good = p > how.threshold
    elif how.mode == "sample":
        if u is None:
            raise LimitError("accepts", "u", None, "a uniform number for each draft, for how.mode = 'sample'")
        good = u < p
    else:
        nucleus = (logq.exp() * above).sum(1) < how.top_p
        good = (rank < how.top_k) | (p > how.floor) | nucleus
    return good & (drafts >= 0)


def check_map(
    token_map: Tensor | Mapping[int, int] | None, *, vocabulary: int, guide: int, special: tuple[int, ...]
) -> Tensor:
    """Ids of the diffusion model as ids of the guide: (V,) int64, -1 where the guide has no such token.

    Args:
        token_map: (V,) ids, or a mapping (ids that it does not name are missing); ``None`` when both models have one
            vocabulary, from which only the mask may be missing at the guide's end.
        vocabulary, guide: sizes of the two vocabularies.
        special: ids of the diffusion model that the guide need not have.

    Raises:
        LimitError: another size and no map, or a map that does not fit.
    """
    where = "GuidedRule"
    if token_map is None:
        missing = [i for i in range(guide, vocabulary) if i not in special]
        if missing or guide > vocabulary:
            mend = "Pass token_map= (see token_map_of), or a guide with the model's tokenizer."
            raise LimitError(where, "guide.vocab_size", guide, f"the model's {vocabulary}, mask aside", mend)
        ids = torch.arange(vocabulary)
        return torch.where(ids < guide, ids, -1)
    if isinstance(token_map, Mapping):
        ids = torch.full((vocabulary,), -1, dtype=torch.long)
        for own, theirs in token_map.items():
            if not 0 <= own < vocabulary:
                raise LimitError(where, "token_map", own, f"ids in [0, {vocabulary})")
            ids[own] = theirs
    else:
        ids = token_map.long().cpu()
    if ids.shape != (vocabulary,):
        raise LimitError(where, "token_map.shape", tuple(ids.shape), f"({vocabulary},), one entry an id of the model")
    if int(ids.max()) >= guide or int(ids.min()) < -1:
        raise LimitError(where, "token_map", int(ids.max()), f"ids of the guide in [-1, {guide})")
    return ids


def token_map_of(tokenizer: Any, guide: Any, vocab_size: int) -> Tensor:
    """Ids by the tokens' own names: (vocab_size,) int64, -1 for what the guide's tokenizer does not have.

    End tokens count as one token whatever their names.
    """
    theirs: dict[str, int] = guide.get_vocab()
    ids = torch.full((vocab_size,), -1, dtype=torch.long)
    for token, own in tokenizer.get_vocab().items():
        if own < vocab_size:
            ids[own] = theirs.get(token, -1)
    if tokenizer.eos_token_id is not None and guide.eos_token_id is not None:
        ids[tokenizer.eos_token_id] = guide.eos_token_id
    return ids


class Judge:
    """A guide beside a canvas: it keeps keys and values of the text so far, row by row.

    Args:
        guide: a causal model; one whose class takes no cache of transformers is fed the whole text each time.
        canvas: the rows to judge.
        ids: (V,) the model's ids as the guide's, see `check_map`.
        chunk: drafts that one forward pass judges.
        how: when a draft is accepted.

    Raises:
        LimitError: the guide has fewer positions than the canvas has places.
    """

    def __init__(self, guide: Any, canvas: Canvas, ids: Tensor, chunk: int, how: Acceptance) -> None:
        limit = getattr(guide.config, "max_position_embeddings", None)
        if limit and limit < canvas.size:
            raise LimitError("GuidedRule", "guide positions", limit, f"at least the text's {canvas.size}")
        self.denoiser = Denoiser(guide, mask_token_id=None, logits_shift=True, causal=True)
        self.ids, self.chunk, self.how = ids.to(canvas.x.device), chunk, how
        ends = self.ids[canvas.eot_ids]
        self.ends = ends[ends >= 0].unique()
        own = self.denoiser.kind == "decoder"
        self.cache = self.denoiser.new_cache(len(canvas), canvas.size) if own else None
        self.cached = canvas.x.new_zeros(len(canvas))  # (B,) places whose keys and values are the text's

    def run(self, canvas: Canvas, text: Tensor, drafted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """How many drafts of each row the guide agrees to, from the first one on.

        Args:
            canvas: the live rows.
            text: (B, S) ids of the model, drafts in their places.
            drafted: (B, S) bool, a run of drafts in each row, behind text without masks.

        Returns:
            (B,) int64 lengths of the accepted runs; (B, V) log-probabilities of the guide at the first rejected draft;
            (B,) bool, whether one was rejected.
        """
        mapped = self.ids[text]
        total = drafted.sum(1)
        first = torch.where(total > 0, drafted.to(torch.int8).argmax(1), canvas.size)
        # Nobody can judge the first token of an empty text.
        total = total * (canvas.real & (canvas.places < first[:, None])).any(1)
        u = uniform(drafted, canvas.generators) if self.how.mode == "sample" else None
        agreed, alive = torch.zeros_like(total), total > 0
        rejected, at_rejection = torch.zeros_like(alive), None
        while bool(alive.any()):
            start = first + agreed
            stop = torch.where(alive, (start + self.chunk).minimum(first + total), 0)
            logits, wanted, targets = self._feed(canvas, mapped, start, stop)
            rows = wanted.nonzero()[:, 0]
            logq = self._log_probabilities(logits[wanted])
            place = targets[wanted]
            chosen = None if u is None else u[rows, place]
            good = torch.zeros_like(wanted).masked_scatter(wanted, accepts(logq, mapped[rows, place], self.how, chosen))
            # The wanted columns of a row stand together, so those in front count as accepted.
            before = torch.arange(wanted.shape[1], device=wanted.device) < wanted.to(torch.int8).argmax(1)[:, None]
            run = ((good | before).long().cumprod(1) * wanted).sum(1)
            agreed = agreed + run
            stopped = alive & (run < wanted.sum(1))
            if at_rejection is None:
                at_rejection = logq.new_zeros(len(canvas), logq.shape[1])
            column = (before.sum(1) + run).clamp(max=wanted.shape[1] - 1)
            here = logits[torch.arange(len(canvas), device=column.device), column]
            at_rejection = torch.where(stopped[:, None], self._log_probabilities(here), at_rejection)
            rejected = rejected | stopped
            alive = alive & ~stopped & (agreed < total)
        if at_rejection is None:
            at_rejection = torch.zeros(len(canvas), 1, device=text.device)
        return agreed, at_rejection, rejected

    def _feed(self, canvas: Canvas, mapped: Tensor, start: Tensor, stop: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One pass that predicts the places [start, stop) of each row; (B, Q, V) logits, which count, their places."""
        low = self.cached if self.cache is not None else torch.zeros_like(start)
        places = canvas.places
        compute = canvas.real & (places >= low[:, None]) & (places < stop[:, None] - 1)
        read = canvas.real & (places < torch.maximum(stop - 1, low)[:, None]) if self.cache is not None else None
        batch = self.denoiser.logits(
            mapped.clamp(min=0),
            real=canvas.real,
            positions=canvas.positions,
            compute=compute,
            read=read,
            cache=self.cache,
        )
        self.cached = torch.maximum(self.cached, stop - 1)
        trace = canvas.trace
        trace.guide_calls += 1
        for queries, keys in zip(batch.queries.tolist(), batch.keys.tolist(), strict=True):
            trace.guide_positions += queries
            trace.flops += self.denoiser.flops(queries, keys) if queries else 0.0
        wanted = batch.valid & (batch.targets >= start[:, None]) & (batch.targets < stop[:, None])
        if not bool(batch.logits[wanted].amax(-1).isfinite().all()):
            raise NonFiniteError("GuidedRule: the guide's logits are not finite. The answers so far are in .partial.")
        return batch.logits, wanted, batch.targets

    def _log_probabilities(self, logits: Tensor) -> Tensor:
        """(N, V) float32; all end tokens share the probability of any of them."""
        logq = logits.log_softmax(-1)
        if self.ends.numel() > 1:
            shared = logq[:, self.ends].logsumexp(1, keepdim=True)
            logq = logq.index_copy(1, self.ends, shared.expand(-1, self.ends.numel()))
        return logq

    def committed(self, last: Tensor) -> None:
        """The text now ends in front of place ``last`` (B,): forget what was rejected, and keep one token to feed."""
        self.cached = torch.minimum(self.cached, last - 1)

    def select(self, index: Tensor) -> None:
        """Keep the rows ``index``."""
        self.cached = self.cached[index]
        if self.cache is not None and index.numel() and self.cache.get_seq_length():
            self.cache.batch_select_indices(index)
