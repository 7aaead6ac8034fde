"""HISA: the keys that DeepSeek sparse attention would choose, found by blocks first and by tokens within them.

Xu, Meng et al., "HISA: Efficient Hierarchical Indexing for Fine-Grained Sparse Attention" (arXiv 2603.28458). DSA's
indexer scores every key of the prefix for every query. HISA scores one mean key a block of B tokens with the same query
heads and gates, takes the m best blocks (the first and the newest always), and runs the unchanged indexer on their
tokens alone: O(L / B + m B) instead of O(L) a query, the same number of chosen keys, no training.

With ``score_fn="dot"`` the query heads of an ordinary model play indexer: each head chooses among its KV head's keys.

Use it on DeepSeek-V3.2 and GLM-5 beyond m B tokens. Shorter prompts get exactly DSA's keys and no gain, and where
neighbouring index keys are unlike each other a block's mean hides the one key that matters.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tokenmill.attend._block_index import (
    POOLS,
    SCORES,
    BlockKeys,
    Forced,
    Pool,
    ScoreFn,
    check_budget,
    select,
)
from tokenmill.catalog import Card, Paper, Reported
from tokenmill.errors import LimitError, unknown_name
from tokenmill.trace import Trace

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CARD = Card(
    name="HISA",
    kind="attention",
    paper=Paper(
        title="HISA: Efficient Hierarchical Indexing for Fine-Grained Sparse Attention",
        date="2026-03-30",
        arxiv="2603.28458",
    ),
    summary=(
        "The indexer of DeepSeek sparse attention looks at mean keys of blocks first and at tokens of the best blocks "
        "alone. It returns the same number of keys and needs no training."
    ),
    claim=(
        "At 64K tokens the indexer's kernel is 3.75 times as fast with 8K candidates, and LongBench stays within a "
        "third of a point of the flat indexer's."
    ),
    api=("HISA", "hisa_select", "BlockKeys"),
    exact=False,
    trains=False,
    task="long-context",
    needs=frozenset({"index_keys"}),
    works_with=("deepseek_v32", "glm_moe_dsa"),
    differs=(
        "the first and the newest block count among the m; forced='extra' is the reading of Algorithm 1, and does "
        "not rank the newest block, since its mean knows tokens that come after the query",
        "score_fn='dot' chooses keys in the full attention of ordinary models",
        "blocks begin at each row's first real token, so left padding changes nothing",
    ),
    reported=Reported(
        table="", setting="DeepSeek-V3.2, k = 2048, B = 128, m = 64", metric="LongBench mean", value=50.78
    ),
)


def hisa_select(
    q: Tensor,
    k: Tensor,
    w: Tensor | None,
    valid: Tensor | None = None,
    *,
    block_size: int = 128,
    top_blocks: int = 64,
    top_k: int = 2048,
    pool: Pool = "mean",
    forced: Forced = "inside",
    score_fn: ScoreFn = "dsa",
    first: Tensor | None = None,
    index: BlockKeys | None = None,
    tile: int | None = None,
) -> Tensor:
    """The keys of each query (equations 4 to 9 of the paper), a tile of queries at a time.

    Args:
        q: (B, Sq, H, d), rotated; the last Sq tokens of the sequence.
        k: (B, Sk, d), rotated.
        w: (B, Sq, H) gates with all constant factors; ``None`` counts each head as 1.
        valid: (B or 1, Sq, Sk) bool, keys that a query may see; ``None``: all up to its own.
        block_size: B, tokens of a block.
        top_blocks: m, blocks whose tokens are scored.
        top_k: keys of each query.
        pool: ``"mean"``, or ``"max"`` (not in the paper).
        forced: see `HISA`.
        score_fn: ``"dsa"``, or ``"dot"``, without the relu, for the heads of ordinary attention.
        first: (B,) int64, the first real token of each row; ``None``: from ``valid``, else 0.
        index: the pooled keys of k, when they are there already.
        tile: queries of a tile; ``None``: as many as gather sixteen million numbers.

    Returns:
        (B, Sq, min(top_k, Sk)) int32. A query with fewer keys to choose from names its own token in their place.

    Raises:
        LimitError: shapes that do not fit, budgets that cannot be met.
    """
    check_budget("hisa_select", block_size, top_blocks, top_k, forced)
    for name, value, known in (("pool", pool, POOLS), ("score_fn", score_fn, SCORES)):
        if value not in known:
            raise unknown_name("hisa_select", name, value, known)
    if q.dim() != 4 or k.dim() != 3 or q.shape[0] != k.shape[0] or q.shape[-1] != k.shape[-1]:
        shapes = f"{tuple(q.shape)} and {tuple(k.shape)}"
        raise LimitError("hisa_select", "q and k", shapes, "(B, Sq, H, d) and (B, Sk, d)")
    if q.shape[1] > k.shape[1]:
        raise LimitError("hisa_select", "Sq", q.shape[1], f"at most Sk={k.shape[1]}", "Queries are the last tokens.")
    if not q.shape[1]:
        return torch.empty(len(q), 0, min(top_k, k.shape[1]), dtype=torch.int32, device=q.device)
    if index is None:
        begin = first
        if begin is None:
            begin = first_real(valid, len(k)) if valid is not None else torch.zeros(len(k), dtype=torch.long)
        index = BlockKeys.empty(begin.to(k.device), k.shape[-1], block_size, pool)
        index.append(k)
    parts = select(
        q,
        k,
        w,
        index,
        valid=valid,
        top_blocks=top_blocks,
        top_k=top_k,
        forced=forced,
        score_fn=score_fn,
        tile=tile,
    )
    return torch.cat([chosen for chosen, _, _ in parts], 1).to(torch.int32)


def first_real(valid: Tensor, batch: int) -> Tensor:
    """(B,) int64: the first key that the last query of each row sees, Sk for none, from (B or 1, Sq, Sk) bool."""
    last = valid[:, -1]
    return torch.where(last.any(-1), last.to(torch.uint8).argmax(-1), last.shape[-1]).expand(batch)


@dataclass(slots=True)
class HISATrace(Trace):
    """Counts of a run.

    Attributes:
        keys_scored: keys and pooled keys that indexers scored.
        keys_flat: keys that flat indexers would have scored.
    """

    keys_scored: int = 0
    keys_flat: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class HISA:
    """Hierarchical indexing in a model with DeepSeek sparse attention, or in any other one's full attention.

    Attributes:
        keep: keys of each query; None: as many as the model's own indexer chooses (``"dsa"`` only).
        block_size: B, tokens of a block.
        top_blocks: m, blocks whose tokens are scored.
        compression: scores one of so many blocks instead of m of them (the paper's 4:1); None: m blocks.
        forced: "inside": the first and the newest block count among the m; "extra": they join them.
        pool: "mean", or "max" (not in the paper).
        score_fn: "dsa" replaces the model's indexers; "dot" lets each query head choose by its own dot products, in
            models without indexers (not in the paper). A prompt's attention is masked then, only decoding reads less.
        layers: indices of the layers, for "dot"; None means all with full attention.
    """

    keep: int | None = None
    block_size: int = 128  # section 4
    top_blocks: int = 64
    compression: float | None = None
    forced: Forced = "inside"
    pool: Pool = "mean"
    score_fn: ScoreFn = "dsa"
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.score_fn not in SCORES:
            raise unknown_name("HISA", "score_fn", self.score_fn, SCORES)
        if self.score_fn == "dot" and self.keep is None:
            raise LimitError("HISA", "keep", self.keep, "given for score_fn='dot', which has no indexer to ask")
        if self.score_fn == "dsa" and self.layers is not None:
            raise LimitError("HISA", "layers", self.layers, "None for score_fn='dsa'", "Every indexer is replaced.")
        if self.keep is not None and (isinstance(self.keep, bool) or not isinstance(self.keep, int) or self.keep < 1):
            raise LimitError("HISA", "keep", self.keep, "an int of at least 1, or None")
        check_budget("HISA", self.block_size, self.top_blocks, self.keep or 1, self.forced)
        if self.pool not in POOLS:
            raise unknown_name("HISA", "pool", self.pool, POOLS)
        if self.compression is not None and not self.compression >= 1:
            raise LimitError("HISA", "compression", self.compression, "at least 1")

    def blocks(self, tokens: int, keep: int) -> int:
        """m for a prefix of so many tokens: never too few for ``keep`` keys."""
        if self.compression is None:
            return self.top_blocks
        asked = math.ceil(math.ceil(tokens / self.block_size) / self.compression)
        return max(2, asked, math.ceil(keep / self.block_size))

    @contextmanager
    def attach(self, model: PreTrainedModel) -> Generator[Any, None, None]:
        """Replace every indexer inside the ``with``, or choose in ordinary attention.

        Yields:
            The trace; a `HISATrace` has its counts when the ``with`` ends.

        Raises:
            LimitError: fewer candidates than the model's indexer chooses.
            UnsupportedError: a model without index keys; inside the ``with``, a static cache.
        """
        if self.score_fn == "dot":
            from tokenmill.attend._block_attention import BlockAttention

            with BlockAttention(how=self, keep=self.keep or 0, layers=self.layers).attach(model) as counts:
                yield counts
            return
        from tokenmill.hf.indexer import index_layers

        layers = index_layers("HISA", model)
        trace = HISATrace()
        made = [HierarchicalIndexer(indexer, self) for _, indexer in layers]
        with ExitStack() as undo:
            for (attention, indexer), mine in zip(layers, made, strict=True):
                undo.callback(setattr, attention, "indexer", indexer)
                attention.indexer = mine
            try:
                yield trace
            finally:
                trace.model_calls = max((one.calls for one in made), default=0)
                trace.keys_scored = sum(int(one.scored) for one in made)
                trace.keys_flat = sum(one.flat for one in made)


class HierarchicalIndexer(nn.Module):
    """Stands in for an indexer of transformers: the same arguments, the same result, its weights.

    Args:
        indexer: the one that it stands in for.
        how: the settings.

    Raises:
        LimitError: fewer candidates than it chooses.
    """

    def __init__(self, indexer: Any, how: HISA) -> None:
        super().__init__()
        self.indexer, self.how = indexer, how
        self.keep = indexer.index_topk if how.keep is None else how.keep
        if how.compression is None:
            check_budget("HISA", how.block_size, how.top_blocks, self.keep, how.forced)
        self.calls, self.flat = 0, 0
        self.scored: Tensor | int = 0

    @torch.no_grad()
    def forward(
        self,
        hidden_states: Tensor,
        q_resid: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
    ) -> Tensor:
        """(B, S, K) int32, see the indexer of transformers."""
        del position_ids
        from tokenmill.hf.indexer import index_parts

        q, k, w = index_parts(self.indexer, hidden_states, q_resid, position_embeddings)
        valid = attention_mask if attention_mask.dtype == torch.bool else attention_mask >= 0
        new = k.shape[1]
        k, index = self._indexed(k, valid, past_key_values)
        blocks = self.how.blocks(k.shape[1], self.keep)
        chosen = []
        for part, _, scored in select(
            q,
            k,
            w,
            index,
            valid=valid,
            top_blocks=blocks,
            top_k=self.keep,
            forced=self.how.forced,
            score_fn="dsa",
        ):
            chosen.append(part)
            self.scored = self.scored + scored.sum()
        self.calls += 1
        self.flat += len(q) * new * k.shape[1]
        return torch.cat(chosen, 1).to(torch.int32)

    def _indexed(self, k: Tensor, valid: Tensor, cache: Any) -> tuple[Tensor, BlockKeys]:
        """All keys so far and their pooled keys, which live in the cache when there is one."""
        from tokenmill.hf.indexer import pooled_layer

        fresh = BlockKeys.empty(first_real(valid, len(k)), k.shape[-1], self.how.block_size, self.how.pool)
        if cache is None:
            fresh.append(k)
            return k, fresh
        layer = pooled_layer("HISA", cache, self.indexer.layer_idx)
        whole = cache.update_indexer(k, self.indexer.layer_idx)
        known: BlockKeys | None = layer.pooled
        fits = known is not None and (known.size, known.pool) == (fresh.size, fresh.pool)
        if known is None or not fits or known.length + k.shape[1] != whole.shape[1]:
            # A cache that was filled before, or with other settings.
            layer.pooled = known = fresh
            known.append(whole)
        else:
            known.begin(fresh.first)
            known.append(k)
        return whole, known


def small() -> HISA:
    """Blocks of 4 tokens, three of them."""
    return HISA(keep=6, block_size=4, top_blocks=3)
