"""Token Sparse Attention: a prompt's attention runs on a subset of its tokens, another one in each head and layer.

Jo et al., "Token Sparse Attention: Efficient Long-Context Inference with Interleaved Token Selection" (arXiv
2602.03216). In chosen layers each head keeps the tokens that the prompt's last queries look at, gathers query, key AND
value rows of those into short dense tensors, runs any attention on them, and scatters the output back with zeros
elsewhere. The residual stream carries every token on, so the next layer chooses afresh. How many tokens go is decided
by the attention mass that may be lost (``tau``); which layers take part, by how little they change what goes through.

Use it for the prefill of prompts of many thousand tokens whose answer stands at the end. Not where every position's
output counts (scoring a text, training), since tokens that a head leaves out get no attention there, nor in decoding,
which stays dense.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokenmill.attend._drift import choose_layers as choose_layers
from tokenmill.attend._drift import layer_drift as layer_drift
from tokenmill.attend._drift import profile_drift as profile_drift
from tokenmill.attend._gather import sparse_attend, take, top_indices, window_scores
from tokenmill.attend._session import Answer, Reading, SparseAttention
from tokenmill.catalog import Card, Paper, Reported
from tokenmill.errors import LimitError, UnsupportedError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CARD = Card(
    name="Token Sparse Attention",
    kind="attention",
    paper=Paper(
        title="Token Sparse Attention: Efficient Long-Context Inference with Interleaved Token Selection",
        date="2026-02",
        arxiv="2602.03216",
        code="https://github.com/dongwonjo/Token-Sparse-Attention",
    ),
    summary=(
        "In some layers each head runs a prompt's attention on the tokens that the last queries look at, and gives the "
        "others nothing. The choice is made anew in every layer and drops a set share of the attention mass."
    ),
    claim=(
        "Prefill attention of prompts of 128K tokens is up to three times as fast with less than one percent lost, "
        "alone or on top of another sparse attention."
    ),
    api=("TokenSparseAttention", "profile_drift", "choose_layers"),
    exact=False,
    trains=False,
    task="long-context",
    works_with=("llama", "qwen2", "gemma3_text"),
    differs=(
        "batches work: each row counts for itself, and all rows keep as many tokens as the neediest one",
        "padding is hidden before the softmax and before the choice",
        "a prompt that comes in chunks stays dense; so do layers whose mask hides single tokens",
        "force_first keeps first tokens that the smoothing would let go",
    ),
    reported=(
        Reported(table="1", setting="Llama-3.1-8B, RULER 4K-128K, tau 0.005", metric="average", value=87.02),
        Reported(table="1", setting="Llama-3.1-8B, 128K, tau 0.005", metric="attention speed-up", value=1.36),
    ),
)

Inner = Callable[..., Tensor]


def select_tokens(
    query: Tensor,
    key: Tensor,
    *,
    scaling: float,
    tau: float,
    window: int = 128,
    pool_kernel: int = 7,
    min_tokens: int = 1024,
    valid: Tensor | None = None,
    force_first: int = 0,
) -> Tensor | None:
    """The tokens that each head keeps (Algorithm 1).

    Args:
        query: (B, H, L, d).
        key: (B, G, L, d).
        scaling: of the dot products.
        tau: attention mass, averaged over the heads, that may be dropped; in [0, 1).
        window: W, last tokens, which choose and always stay.
        pool_kernel: odd width of the mean over neighbours.
        min_tokens: kept tokens before the window, at least.
        valid: (B, L) bool, false at padding, which stands on the left.
        force_first: first tokens of each row that always stay.

    Returns:
        (B, H, L') int64, ascending, L' equal for all rows and heads; -1, at the front, where a row has too few tokens.
        ``None``: every row keeps everything.

    Raises:
        LimitError: a bad setting, or a window longer than the text.
    """
    _check("select_tokens", tau, window, pool_kernel, min_tokens, force_first)
    batch, count, length, _ = query.shape
    if window > length:
        raise LimitError("select_tokens", "window", window, f"at most the text's L = {length}")
    if valid is None:
        valid = torch.ones(batch, length, dtype=torch.bool, device=key.device)
    score = prefix_scores(query, key, scaling=scaling, window=window, valid=valid)  # (B, H, P)
    score = torch.nn.functional.avg_pool1d(score, pool_kernel, stride=1, padding=pool_kernel // 2)
    prefix = valid[:, : length - window]
    score = score.masked_fill(~prefix[:, None], -torch.inf)
    keep = coverage(score, tau, min_tokens=max(min_tokens, force_first))  # (B,)
    missing, width = torch.stack([(prefix.sum(-1) - keep).max(), keep.max()]).tolist()
    if missing <= 0:
        return None
    rank = prefix.long().cumsum(-1)
    score = score.masked_fill((prefix & (rank <= force_first))[:, None], torch.inf)
    index = top_indices(score, width)
    index = index.masked_fill(~prefix[:, None].expand_as(score).gather(-1, index), -1)
    last = torch.arange(length - window, length, device=key.device)
    last = torch.where(valid[:, length - window :], last, -1)[:, None].expand(-1, count, -1)
    return torch.cat([index, last], -1)


def prefix_scores(query: Tensor, key: Tensor, *, scaling: float, window: int, valid: Tensor) -> Tensor:
    """What the last W queries pay to each token before them: the mean of their softmax rows over all keys.

    Args:
        query: (B, H, L, d).
        key: (B, G, L, d).
        scaling: of the dot products.
        window: W.
        valid: (B, L) bool.

    Returns:
        (B, H, L - W) float32; the rows sum to less than 1, the rest went to the window itself.
    """
    length = key.shape[2]
    causal = torch.ones(window, length, dtype=torch.bool, device=key.device).tril(length - window)
    real = valid[:, None, length - window :, None]  # a padded query looks at nothing
    seen = causal & valid[:, None, None, :] & real
    return window_scores(query[:, :, length - window :], key, seen, scaling=scaling)[..., : length - window]


def coverage(score: Tensor, tau: float, *, min_tokens: int = 1) -> Tensor:
    """How many tokens each row keeps so that those it drops hold a mass of ``tau``, no more than it takes.

    Args:
        score: (B, H, P), -inf where there is no token.
        tau: the mass, of the mean over the heads, normalised to 1.
        min_tokens: at least so many stay.

    Returns:
        (B,) int64.
    """
    real = score[:, 0] > -torch.inf  # (B, P)
    mean = score.clamp_min(0).mean(1)
    total = mean.sum(-1, keepdim=True)
    share = (mean / (total + 1e-8)).masked_fill(~real, torch.inf)
    below = (share.sort(-1).values.cumsum(-1) < tau).sum(-1)
    size = real.sum(-1)
    # The token that crosses tau goes too; a row without any mass to lose has nothing to judge by.
    dropped = torch.where((below > 0) & (total[:, 0] > 0), below + 1, 0)
    return torch.minimum(torch.maximum(size - dropped, torch.full_like(size, min_tokens)), size)


def compress(query: Tensor, key: Tensor, value: Tensor, idx: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of the kept tokens: three (B, H, L', d), from query (B, H, L, d) and key, value (B, G or H, L, d)."""
    at = idx.clamp_min(0)
    return take(query, at), take(key, at), take(value, at)


def decompress(output: Tensor, idx: Tensor, length: int) -> Tensor:
    """Rows back in their places, zeros elsewhere: (B, H, L', d) -> (B, H, L, d)."""
    whole = output.new_zeros(*output.shape[:2], length + 1, output.shape[3])  # the last row takes what is no token
    at = torch.where(idx < 0, length, idx)[..., None].expand_as(output)
    return whole.scatter(2, at, output)[:, :, :length]


def short_attention(
    query: Tensor, key: Tensor, value: Tensor, *, scaling: float, seen: Tensor | None, softcap: float | None = None
) -> Tensor:
    """Dense causal attention over kept tokens, the default of ``inner``.

    Args:
        query: (B, H, L', d), like key and value (B, H, L', d or d_v).
        key: see query.
        value: see query.
        scaling: of the dot products.
        seen: (B, H, L', L') bool; ``None`` is causal.
        softcap: bound of the logits, for models that have one.

    Returns:
        (B, H, L', d_v).
    """
    if softcap is None:
        attention = torch.nn.functional.scaled_dot_product_attention
        return attention(query, key, value, attn_mask=seen, is_causal=seen is None, scale=scaling)
    if seen is None:
        seen = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=key.device).tril()
    return sparse_attend(query, key, value, scaling=scaling, seen=seen, softcap=softcap)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSparseAttention(SparseAttention):
    """Token Sparse Attention on the prefill of a model.

    Attributes:
        tau: attention mass that each layer may drop, in [0, 1); 0 is dense.
        window: last tokens of the prompt, which choose and always stay.
        pool_kernel: odd width of the mean over neighbouring scores.
        min_tokens: tokens before the window that stay at least.
        force_first: first tokens that always stay.
        layers: indices of the layers, see `choose_layers`; None means the upper half of those with full attention.
        inner: attention over the kept tokens, called like `short_attention`; None is that.
    """

    tau: float = 0.005  # Llama-3.1-8B; 0.008 for Mistral-Nemo
    window: int = 128
    pool_kernel: int = 7
    min_tokens: int = 1024
    force_first: int = 0
    layers: tuple[int, ...] | None = None
    inner: Inner | None = None
    by_head = True
    causal = False

    def __post_init__(self) -> None:
        _check("TokenSparseAttention", self.tau, self.window, self.pool_kernel, self.min_tokens, self.force_first)

    def check(self, model: PreTrainedModel) -> tuple[int, ...]:
        """See `SparseAttention.check`."""
        layers = SparseAttention.check(self, model)
        return layers if self.layers is not None else layers[len(layers) // 2 :]

    def read(self, reading: Reading) -> Answer:
        """See `SparseAttention.read`."""
        length, batch = reading.queries, len(reading.query)
        # Decoding and prompts that come in pieces: the rows that would choose are not all here.
        if length == 1 or reading.size != length or length <= self.min_tokens + self.window or self.tau == 0:
            return reading.dense()
        valid, seen = None, None
        if reading.mask is not None:
            seen = reading.seen(0, length, length).expand(batch, -1, -1, -1)
            span = reading.span(seen)
            if span is None:
                return reading.dense()
            if bool((span.stop < length).any()):
                raise UnsupportedError(
                    "TokenSparseAttention",
                    "rows are padded on the right, where the queries that choose stand",
                    "Pad on the left.",
                )
            valid = span.mask(length)
        idx = select_tokens(
            reading.query,
            reading.key,
            scaling=reading.scaling,
            tau=self.tau,
            window=self.window,
            pool_kernel=self.pool_kernel,
            min_tokens=self.min_tokens,
            valid=valid,
            force_first=self.force_first,
        )
        reading.count_scored(reading.key[..., 0].numel(), rows=batch)
        if idx is None:
            return reading.dense()
        query, key, value = compress(reading.query, reading.key, reading.value, idx)
        reading.count_read(idx.numel(), end=length, heads=idx.shape[1])
        out = (self.inner or short_attention)(
            query,
            key,
            value,
            scaling=reading.scaling,
            seen=None if seen is None else _short_mask(seen, idx),
            **({"softcap": reading.options["softcap"]} if reading.options.get("softcap") else {}),
        )
        return decompress(out, idx, length).transpose(1, 2).contiguous(), None


def _short_mask(seen: Tensor, idx: Tensor) -> Tensor:
    """What kept queries see of kept keys: (B, 1 or H, L, L) bool -> (B, H, L', L'); a row that is none sees itself."""
    batch, count, kept = idx.shape
    at = idx.clamp_min(0)
    rows = seen.expand(-1, count, -1, -1).gather(2, at[..., None].expand(-1, -1, -1, seen.shape[-1]))
    # In place of a token that a row does not have stands its first slot, which is padding and hidden already.
    short = rows.gather(3, at[:, :, None].expand(batch, count, kept, kept))
    return short | (torch.eye(kept, dtype=torch.bool, device=idx.device) & (idx < 0)[..., None])


def _check(where: str, tau: float, window: int, pool_kernel: int, min_tokens: int, force_first: int) -> None:
    if isinstance(tau, bool) or not 0.0 <= tau < 1.0:
        raise LimitError(where, "tau", tau, "in [0, 1)")
    given = (("window", window, 1), ("pool_kernel", pool_kernel, 1), ("min_tokens", min_tokens, 1))
    for name, value, least in (*given, ("force_first", force_first, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise LimitError(where, name, value, f"an int of at least {least}")
    if pool_kernel % 2 == 0:
        raise LimitError(where, "pool_kernel", pool_kernel, "odd")


def small() -> TokenSparseAttention:
    """Drops a third of the mass of 24 tokens."""
    return TokenSparseAttention(tau=0.3, window=4, pool_kernel=3, min_tokens=2)
