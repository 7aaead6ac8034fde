"""SpecTr: several independent drafts from a small model, verified together without changing the target's law.

Sun et al., "SpecTr: Fast Speculative Decoding via Optimal Transport" (arXiv 2310.15141). K drafts of L tokens are
drawn from the drafter; the target scores them in one forward; at each depth k-SEQ emits a token of the target's law
that is one of the living drafts as often as a near-linear-time plan can make it. K = 1 is speculative sampling.

Use it for sampling (temperature above 0) with a drafter much cheaper than the target, where scoring a few more
positions costs little. At temperature 0 all drafts are the same and one is enough.
"""

from __future__ import annotations

import warnings
from dataclasses import KW_ONLY, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from tokenmill import hf
from tokenmill.catalog import Card, Paper, Reported
from tokenmill.decode._adjacency import vocabulary
from tokenmill.decode._drafter import Drafter
from tokenmill.decode._request import Decoder, DecodeTrace, Request, Run, check_seed
from tokenmill.decode._session import Session, decoding
from tokenmill.decode._transport import (
    kseq_plan,
    kseq_select,
    optimal_acceptance,
    solve_rho,
    spectr_verify,
    verify_drafts,
)
from tokenmill.decode._tree import Tree
from tokenmill.errors import LimitError, unknown_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["CARD", "SpecTr", "kseq_plan", "kseq_select", "optimal_acceptance", "solve_rho", "spectr_verify"]

CARD = Card(
    name="SpecTr",
    kind="decoder",
    paper=Paper(
        title="SpecTr: Fast Speculative Decoding via Optimal Transport",
        date="2023-10-23",
        arxiv="2310.15141",
    ),
    summary=(
        "A small model draws several drafts and the large one verifies them together. "
        "Each emitted token follows the large model's law and is one of the drafts as often as possible."
    ),
    claim="The target's law exactly; more tokens for each target call than one draft gives, growing with their number.",
    api=("SpecTr", "spectr_verify", "kseq_plan", "kseq_select", "solve_rho", "optimal_acceptance"),
    exact=True,
    trains=False,
    task="generate",
    needs=frozenset({"draft_model"}),
    works_with=("llama", "qwen2", "gemma3_text"),
    differs=(
        "equal prefixes of drafts are scored once, as a tree; layout='batch' is the paper's K rows",
        "the smallest valid division factor is solved in float64 to the last bit that keeps the law",
    ),
    reported=Reported(
        table="main result",
        setting="PaLM-2 Bison with Gecko, K = 8, L = 8, T = 1",
        metric="block efficiency",
        value=4.0,
    ),
)


def draft_trie(root: Tensor, draft_ids: Tensor) -> tuple[Tensor, Tree, Tensor]:
    """Merge equal prefixes of drafts for the forward; verification still counts every draft.

    Args:
        root: (1,) int64, the last committed token.
        draft_ids: (K, L) int64.

    Returns:
        tokens (N,) int64 root first, their tree, and node_of (K, L + 1): the node behind each prefix.
    """
    k, length = draft_ids.shape
    here = draft_ids.new_zeros(k)
    nodes, parents, tokens, total = [here], [here.new_tensor([-1])], [root], 1
    for depth in range(length):
        pairs, inverse = torch.stack([here, draft_ids[:, depth]], dim=1).unique(dim=0, return_inverse=True)
        parents.append(pairs[:, 0])
        tokens.append(pairs[:, 1])
        here = total + inverse
        total += pairs.shape[0]
        nodes.append(here)
    return torch.cat(tokens), Tree.from_parents(torch.cat(parents)), torch.stack(nodes, dim=1)


@dataclass(frozen=True)
class SpecTr(Decoder[DecodeTrace]):
    """A decoder for ``model.generate(..., do_sample=True, custom_generate=decoder)``, one sequence at a time.

    Args:
        draft_model: a smaller causal language model with the target's vocabulary.
        num_drafts: K (paper: 8); 1 is speculative sampling.
        draft_len: L (paper: 8).
        layout: ``"tree"`` scores equal prefixes once and needs sdpa or eager attention; ``"batch"`` scores K rows
            with any attention, and keeps K copies of the cache for that forward.
        vocab_size: where the output layers have different widths (padding), the tokens that both share.
        seed: of the draws; ``None`` uses torch's global generator.

    Raises:
        LimitError: K or L below 1, an unknown layout.
    """

    draft_model: PreTrainedModel
    _: KW_ONLY
    num_drafts: int = 8
    draft_len: int = 8
    layout: Literal["tree", "batch"] = "tree"
    vocab_size: int | None = None
    seed: int | None = None
    _run: Run[DecodeTrace] = field(default_factory=Run, init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("num_drafts", "draft_len", "vocab_size"):
            value = getattr(self, name)
            if (value is not None or name != "vocab_size") and (not isinstance(value, int) or isinstance(value, bool)):
                raise LimitError("SpecTr", name, value, "an integer", "The paper has 8.")
            if value is not None and value < 1:
                raise LimitError("SpecTr", name, value, "at least 1", "The paper has 8 drafts of 8 tokens.")
        if self.layout not in ("tree", "batch"):
            raise unknown_name("SpecTr", "layout", str(self.layout), ("tree", "batch"))
        check_seed("SpecTr", self.seed)

    def _decode(self, request: Request) -> Any:
        where, model = "SpecTr", request.model
        if not request.generation_config.do_sample and self.num_drafts > 1:
            warnings.warn(
                "SpecTr: without sampling all drafts are the same, so num_drafts > 1 gains nothing.", stacklevel=3
            )
        with self._run.started(where) as trace, decoding(where, request, trace, self.layout == "tree") as session:
            width, known = self._widths(model)
            drafter = Drafter(where, self.draft_model, request, width=width, known=known, trace=trace)
            logits = session.prefill()
            session.check_finite(logits.amax(1))
            scores = session.process(logits, session.root_tree, session.root)
            session.start(session.choose(scores), scores, logits)
            with hf.recording(session.cache):
                while not session.finished:
                    self._round(session, drafter)
            return session.result()

    def _round(self, session: Session, drafter: Drafter) -> None:
        """Draft a block, score it, verify it, keep what stands."""
        length = min(self.draft_len, session.depth_limit, drafter.length_limit(session.length))
        if length < 1:
            self._plain(session)
            return
        greedy = not session.request.generation_config.do_sample
        drafts, laws = drafter.propose(session.sequence, 1 if greedy else self.num_drafts, length)
        tokens, tree, node_of = draft_trie(session.root, drafts)
        logits = self._score(session, drafts, tokens, tree, node_of)
        session.check_finite(logits.amax(1))
        scores = session.process(logits, tree, tokens)
        target = session.laws(scores)  # (N, V)
        emitted, survivor = verify_drafts(
            drafts,
            lambda j, i: laws[i][j if i else 0],
            lambda j, i: target[node_of[j, i]],
            generator=session.request.generator,
        )
        nodes = node_of[survivor, : emitted.shape[0]]
        row = (survivor, length + 1) if self.layout == "batch" else None
        session.commit(nodes, emitted, scores, logits, row)
        drafter.keep(survivor, emitted.shape[0] - 1)

    def _score(self, session: Session, drafts: Tensor, tokens: Tensor, tree: Tree, node_of: Tensor) -> Tensor:
        """The target's logits (N, V) behind each prefix."""
        if self.layout == "tree":
            return session.forward(tokens, tree)
        rows = session.forward_rows(torch.cat([session.root.expand(drafts.shape[0], 1), drafts], dim=1))
        order = torch.arange(node_of.numel(), device=node_of.device)
        # One of the rows that share a prefix speaks for its node; which one makes no difference.
        source = order.new_empty(len(tree)).scatter_(0, node_of.flatten(), order)
        return rows.flatten(0, 1)[source]

    def _plain(self, session: Session) -> None:
        """One token without a draft: the last of the sequence, or beyond the drafter's positions."""
        tree = session.root_tree
        logits = session.forward(session.root, tree)
        session.check_finite(logits.amax(1))
        scores = session.process(logits, tree, session.root)
        session.commit(tree.depth, session.choose(scores), scores, logits)

    def _widths(self, model: PreTrainedModel) -> tuple[int, int]:
        target, draft = vocabulary(model), vocabulary(self.draft_model)
        if target != draft and self.vocab_size is None:
            raise LimitError(
                "SpecTr",
                "vocabulary of draft_model",
                draft,
                f"{target}, the target's",
                "Use a pair that shares a vocabulary; if only padding differs, pass vocab_size=len(tokenizer).",
            )
        known = min(target, draft) if self.vocab_size is None else self.vocab_size
        if known > min(target, draft):
            raise LimitError("SpecTr", "vocab_size", known, f"at most {min(target, draft)}", "Pass len(tokenizer).")
        return target, known


def small() -> SpecTr:
    """An instance for tiny models, used by the laws."""
    from tokenmill.models import tiny

    return SpecTr(tiny("llama", seed=1, layers=1), num_drafts=3, draft_len=3)
