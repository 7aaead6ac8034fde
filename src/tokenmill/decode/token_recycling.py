"""Token Recycling: draft a tree from the runner-up tokens of earlier steps, verify it in one forward.

Luo et al., "Turning Trash into Treasure: Accelerating Inference of Large Language Models with Token Recycling"
(arXiv 2408.08696). For every token the k likeliest successors are kept from the last time it was any input position;
a tree template is filled from these rows, the target checks all of it at once, and the rows are written anew.

Use it when one sequence is decoded at a time and a forward over a few positions costs little more than over one: no
draft model, no training, the same greedy output. Do not use it for large batches, where no compute is spare, and
measure before you take a large tree on a CPU: ``tree="auto"`` does that.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from tokenmill import hf
from tokenmill.catalog import Card, Paper, Reported
from tokenmill.decode._adjacency import AdjacencyMatrix, last_occurrences, vocabulary
from tokenmill.decode._draft import fill, template_shape
from tokenmill.decode._ngram import longest_match
from tokenmill.decode._plan import LONGEST_MATCH, Floats, agreement, best_paths, candidates, worth_its_ms
from tokenmill.decode._request import Decoder, DecodeTrace, Request, Run, check_seed
from tokenmill.decode._session import Session, decoding
from tokenmill.decode._topk import top_tokens
from tokenmill.decode._tree import Tree, TreeTemplate, verify
from tokenmill.errors import LimitError, unknown_name

if TYPE_CHECKING:
    from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList

    from tokenmill.models import CostProfile

CARD = Card(
    name="Token Recycling",
    kind="decoder",
    paper=Paper(
        title="Turning Trash into Treasure: Accelerating Inference of Large Language Models with Token Recycling",
        date="2024-08-16",
        arxiv="2408.08696",
        code="https://github.com/Luowaterbi/TokenRecycling",
    ),
    summary=(
        "Keeps the runner-up tokens of every step as a table of likely successors and drafts a tree from it. "
        "The model checks the whole tree in one forward, so several tokens come out of one call."
    ),
    claim="The same output as plain decoding, in fewer forwards: about two tokens a call with a hot table.",
    api=("TokenRecycling", "AdjacencyMatrix", "TreeTemplate", "recycling_generate"),
    exact=True,
    trains=False,
    task="generate",
    works_with=("llama", "qwen2", "gemma3_text"),
    differs=(
        "tree='auto' plans each tree from measured cost and running statistics; the paper has one fixed tree",
        "draft='hybrid' merges an n-gram continuation into the tree",
        "rows that were never written are left out of the tree; the paper drafts token 0 from them",
        "sampling is verified by one draw for each node; the authors' code is greedy only",
        "the first new token comes from the prompt's own forward; the authors' code prefills all but one token",
    ),
    reported=Reported(
        table="result table of the authors' repository",
        setting="Vicuna-7B, greedy, fp16, Spec-Bench",
        metric="mean accepted tokens",
        value=2.70,
    ),
)

# The authors' default, 80 nodes in levels of 8, 21, 25, 15, 8 and 3.
_OFFICIAL = (
    "0 1 2 3 4 5 6 7 "
    "00 01 02 03 04 05 06 07 10 11 12 13 20 21 22 30 31 40 50 60 70 "
    "000 001 002 003 004 005 006 007 010 011 012 020 021 030 040 050 060 070 100 101 110 200 300 400 500 "
    "0000 0001 0002 0003 0004 0010 0011 0020 0030 0040 0100 0200 1000 2000 3000 "
    "00000 00001 00002 00010 00020 00100 01000 10000 "
    "000000 000001 000100"
)
TREES = ("0", "5", "7", "15", "32", "2.2.2", "auto")
CHAIN = 10  # n-gram nodes beside a fixed tree, as many as prompt lookup drafts
LONGEST_CHAIN = 24  # n-gram nodes that a planned tree may choose from
PLANNED = 128  # positions that a planned tree may take


def tree_template(name: str, k: int = 8) -> TreeTemplate:
    """A template by name: ``"2.2.2"`` is the paper's with 80 nodes, a number is that many of the likeliest paths.

    Raises:
        LimitError: unknown name, with the nearest ones.
    """
    if name == "2.2.2":
        return TreeTemplate([tuple(int(r) for r in path) for path in _OFFICIAL.split()])
    if name in TREES and name != "auto":
        return TreeTemplate(best_paths(k, int(name)))
    raise unknown_name("TokenRecycling", "tree", name, TREES)


@dataclass(frozen=True)
class TokenRecycling(Decoder[DecodeTrace]):
    """A decoder for ``model.generate(..., custom_generate=decoder)``; greedy and sampling, one sequence at a time.

    Args:
        state: the adjacency matrix. ``None`` starts each call with an empty one (cold); pass one, or use `hot`, to
            carry it from request to request as the paper does.
        k: successors kept for each token when ``state`` is ``None`` (paper: 8).
        tree: ``"2.2.2"`` (paper, 80 nodes), ``"0"``, ``"5"``, ``"7"``, ``"15"``, ``"32"``, a `TreeTemplate`, or
            ``"auto"``: before each forward the tree with the most expected tokens per millisecond.
        draft: ``"adjacency"`` (paper) or ``"hybrid"``: the text's own continuation behind the longest match of its
            end joins the tree as one more path.
        warm_up_from_prompt: fill the matrix from the prompt, at the cost of its logits.
        profile: milliseconds per forward for ``tree="auto"``; ``None`` measures once and keeps it for this model
            and machine.
        seed: of the draws when sampling; ``None`` uses torch's global generator.

    Raises:
        LimitError: a rank of the tree that is not below k, or an unknown name.
    """

    state: AdjacencyMatrix | None = None
    _: KW_ONLY
    k: int = 8
    tree: str | TreeTemplate = "2.2.2"
    draft: Literal["adjacency", "hybrid"] = "adjacency"
    warm_up_from_prompt: bool = False
    profile: CostProfile | None = None
    seed: int | None = None
    _run: Run[DecodeTrace] = field(default_factory=Run, init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        where = "TokenRecycling"
        if isinstance(self.k, bool) or self.k < 1:
            raise LimitError(where, "k", self.k, "at least 1", "The paper has 8.")
        if self.draft not in ("adjacency", "hybrid"):
            raise unknown_name(where, "draft", str(self.draft), ("adjacency", "hybrid"))
        check_seed(where, self.seed)
        if not isinstance(self.tree, str | TreeTemplate):
            raise LimitError(where, "tree", self.tree, f"a TreeTemplate, or one of {', '.join(TREES)} in quotes")
        ranks = self.state.k if self.state is not None else self.k
        template = self._template(ranks)
        if template is not None and template.max_rank >= ranks:
            mend = "Take a smaller tree or a wider matrix."
            raise LimitError(where, "tree", f"rank {template.max_rank}", f"below k={ranks}", mend)

    def hot(self, model: PreTrainedModel) -> TokenRecycling:
        """The same decoder with a matrix of its own that stays from call to call."""
        return replace(self, state=AdjacencyMatrix.for_model(model, self.k))

    def _decode(self, request: Request) -> Any:
        where, model = "TokenRecycling", request.model
        matrix = self.state if self.state is not None else AdjacencyMatrix.for_model(model, self.k)
        with self._run.started(where) as trace, matrix.claimed(where), decoding(where, request, trace) as session:
            if matrix.vocab_size != vocabulary(model):
                limit = f"{vocabulary(model)}, the model's"
                raise LimitError(where, "state.vocab_size", matrix.vocab_size, limit, "Use a matrix for this model.")
            planner = self._planner(model, matrix, session)
            first = self._first(session, matrix)
            with hf.recording(session.cache):
                planner.saw(first)
                while not session.finished:
                    self._step(session, matrix, planner)
            return session.result()

    def _first(self, session: Session, matrix: AdjacencyMatrix) -> Tensor:
        """Prefill, fill the matrix from the prompt if asked for, commit the first new token; the text so far."""
        model, prompt = session.model, session.sequence[0]
        with hf.last_hidden(model) if self.warm_up_from_prompt else nullcontext([]) as captured:
            logits = session.prefill()
        if captured and captured[-1].shape[1] <= prompt.shape[0]:
            warm_up(matrix, model, prompt, captured[-1][0])
        session.check_finite(logits.amax(1))
        root = session.root_tree
        scores = session.process(logits, root, session.root)
        session.start(session.choose(scores), scores, logits)
        return session.sequence[0]

    def _step(self, session: Session, matrix: AdjacencyMatrix, planner: Planner) -> None:
        tokens, tree = planner.next(session.depth_limit)
        device = session.device
        on_device, tree_on_device = tokens.to(device), tree.to(device)
        logits = session.forward(on_device, tree_on_device)
        values, tops = top_tokens(logits, matrix.k)
        session.check_finite(values[:, 0])
        if session.plain_greedy:
            scores, chosen = logits, tops[:, 0]
        else:
            scores = session.process(logits, tree_on_device, on_device)
            chosen = session.choose(scores)
        chosen, tops, values = chosen.cpu(), tops.cpu(), values.cpu()
        nodes = verify(tree, tokens, chosen)
        emitted = chosen[nodes]
        committed = session.commit(nodes.to(device), emitted.to(device), scores, logits)
        kept = emitted[: committed.shape[0]]
        planner.learn(tokens[nodes[: kept.shape[0]]], kept)
        # The accepted path is written last: of equal tokens it wins over rejected branches.
        accepted = torch.zeros(len(tree), dtype=torch.bool)
        accepted[nodes] = True
        order = torch.cat([(~accepted).nonzero().squeeze(1), nodes])
        matrix.write(tokens[order], tops[order], values[order])

    def _template(self, k: int) -> TreeTemplate | None:
        if isinstance(self.tree, TreeTemplate):
            return self.tree
        return None if self.tree == "auto" else tree_template(self.tree, k)

    def _planner(self, model: PreTrainedModel, matrix: AdjacencyMatrix, session: Session) -> Planner:
        template, cost = self._template(matrix.k), np.ones(1)
        if template is None:
            from tokenmill import models

            profile = self.profile if self.profile is not None else models.profile(model)
            cost = np.array([profile.at(n) for n in range(1, PLANNED + 1)])
        return Planner(matrix, template, cost, hybrid=self.draft == "hybrid", room=session.ids.shape[1])


class Planner:
    """Plans one draft after another for one sequence, and counts what came true.

    Args:
        matrix: the state.
        template: the fixed tree, or ``None`` to plan by ``cost``.
        cost: (M,) milliseconds of a forward over 1..M positions.
        hybrid: n-gram continuations join the tree.
        room: tokens that the sequence may reach.
    """

    def __init__(
        self, matrix: AdjacencyMatrix, template: TreeTemplate | None, cost: Floats, *, hybrid: bool, room: int
    ) -> None:
        self.matrix, self.rows, self.cost = matrix, matrix.rows, cost
        self.shape = None if template is None else template_shape(template, CHAIN if hybrid else 0)
        self.chain_length = (CHAIN if template is not None else LONGEST_CHAIN) if hybrid else 0
        self.ids = np.zeros(room, dtype=np.int64)
        self.length = 0
        self.chain, self.matched, self.positions = self.ids[:0], 0, 1

    def saw(self, tokens: Tensor) -> None:
        """Append committed tokens (A,)."""
        self.ids[self.length : self.length + tokens.shape[0]] = tokens.cpu().numpy()
        self.length += tokens.shape[0]

    def next(self, depth_limit: int) -> tuple[Tensor, Tree]:
        """The next draft: tokens (N,) int64 with the root first, and their tree."""
        text = self.ids[: self.length]
        self.chain, self.matched = longest_match(text, length=self.chain_length, longest=LONGEST_MATCH)
        root = int(text[-1])
        if self.shape is not None:
            plan = fill(self.shape, self.rows, root, self.chain, depth_limit)
        else:
            found = candidates(self.rows, self.matrix.statistics, root, self.chain, self.matched, depth_limit)
            # Before anything is known: two tokens from a forward over eight positions.
            pace = self.matrix.statistics.tokens_per_ms(2.0, self.cost[min(8, self.cost.size) - 1])
            plan = worth_its_ms(found, self.cost, pace)
        self.positions = plan.tokens.size
        return torch.from_numpy(plan.tokens), Tree.from_parents(torch.from_numpy(plan.parent))

    def learn(self, before: Tensor, tokens: Tensor) -> None:
        """Count which predictions of the last step were right. Call it before the matrix is written.

        Args:
            before: (A,) the token before each emitted one.
            tokens: (A,) the emitted tokens.
        """
        matrix, statistics, k = self.matrix, self.matrix.statistics, self.matrix.k
        known = torch.arange(k) < matrix.count[before][:, None]
        shares = torch.where(known, matrix.shares[before], -1.0)
        judged, hits = 0, 0
        if self.matched:
            agrees = self.chain[: tokens.shape[0]] == tokens[: self.chain.size].numpy()
            hits = int(np.cumprod(agrees).sum())
            judged = min(hits + 1, agrees.size)
        chain_ranks = matrix.ranks(before[:judged], torch.from_numpy(self.chain[:judged])).tolist()
        statistics.saw(shares.numpy(), matrix.ranks(before, tokens).tolist(), chain_ranks)
        statistics.saw_chain([agreement(rank, k) for rank in chain_ranks], hits, self.matched)
        if self.shape is None:
            statistics.saw_step(tokens.shape[0], self.cost[self.positions - 1])
        self.saw(tokens)


def warm_up(matrix: AdjacencyMatrix, model: PreTrainedModel, prompt: Tensor, hidden: Tensor, *, rows: int = 64) -> None:
    """Fill the matrix from a prompt: the model's own successors, and in front the token that really came.

    Args:
        matrix: the state.
        model: its output layer is called on ``rows`` hidden states at a time.
        prompt: (T,) int64.
        hidden: (N, D) hidden states of the last N tokens of the prompt, N <= T.
    """
    tokens = prompt[-hidden.shape[0] :]
    last = last_occurrences(tokens.cpu())  # only the last of equal tokens would stay
    head = cast("torch.nn.Module", model.get_output_embeddings())
    with torch.no_grad():
        tops = [top_tokens(head(part), matrix.k) for part in hidden[last.to(hidden.device)].split(rows)]
    values, successors = (torch.cat(column) for column in zip(*tops, strict=True))
    matrix.write(tokens.cpu()[last], successors, values)
    if tokens.shape[0] > 1:
        matrix.put_first(tokens[:-1], tokens[1:])


def recycling_generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    recycling: AdjacencyMatrix | None = None,
    tree: str | TreeTemplate = "2.2.2",
    **model_kwargs: Any,
) -> Any:
    """`TokenRecycling` as a function: ``generate(ids, custom_generate=recycling_generate, recycling=matrix)``."""
    decoder = TokenRecycling(recycling, tree=tree)
    return decoder(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs)


def small() -> TokenRecycling:
    """An instance for tiny models, used by the laws."""
    return TokenRecycling(k=4, tree="15")
