"""How the heads of a layer vote for keys, and how far a query may turn before its vote changes."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tokenmill.attend._gather import grouped, top_indices
from tokenmill.errors import LimitError, unknown_name

Vote = Literal["soft", "hard", "topk"]
VOTES = ("soft", "hard", "topk")


def mean_query(query: Tensor, real: Tensor | None = None) -> Tensor:
    """The query that votes for a chunk: (B, H, c, d) -> (B, H, d) float32, the mean over the real ones (B, c) bool."""
    if real is None:
        return query.float().mean(2)
    weight = real[:, None, :, None].float()  # (B, 1, c, 1)
    return (query.float() * weight).sum(2) / weight.sum(2).clamp_min(1)


def vote(
    query: Tensor,
    keys: Tensor,
    kind: Vote = "soft",
    *,
    scale: float = 1.0,
    valid: Tensor | None = None,
    k: int | None = None,
    pool: int = 1,
    pairing: Literal["group", "modulo"] = "group",
) -> Tensor:
    """How much the heads want each key.

    Args:
        query: (B, H, d), see `mean_query`.
        keys: (B, G, S, d).
        kind: ``"soft"``: the sum of the heads' softmaxes; ``"hard"``: in how many heads' top k a key is; ``"topk"``:
            the sum of the heads' dot products.
        scale: of the dot products, before the softmax.
        valid: (B, S) bool, the candidates; the softmax is over them.
        k: for ``"hard"``.
        pool: width of a maximum over neighbours, odd; 1 is none.
        pairing: ``"modulo"`` lets head h read KV head h % G, as the authors' kernel does, which is wrong for groups.

    Returns:
        (B, S) float32; -inf at keys that are no candidates.

    Raises:
        LimitError: an unknown kind or pairing, an even pool, or a hard vote without k.
    """
    if kind not in VOTES:
        raise unknown_name("vote", "kind", kind, VOTES)
    if pairing not in ("group", "modulo"):
        raise unknown_name("vote", "pairing", pairing, ("group", "modulo"))
    if pool < 1 or pool % 2 == 0:
        raise LimitError("vote", "pool", pool, "odd and at least 1")
    if kind == "hard" and k is None:
        raise LimitError("vote", "k", k, "given for a hard vote")
    b, h, d = query.shape
    g = keys.shape[1]
    if pairing == "modulo":
        query = query.view(b, h // g, g, d).transpose(1, 2).reshape(b, h, d)
    logits = grouped(query[:, :, None], keys)[:, :, 0] * scale  # (B, H, S)
    if valid is not None:
        logits = logits.masked_fill(~valid[:, None], -torch.inf)
    if kind == "soft":
        score = logits.softmax(-1).sum(1)
    elif kind == "hard":
        top = top_indices(logits.nan_to_num(nan=-torch.inf, neginf=-torch.inf), min(k or 0, keys.shape[2]))
        score = torch.zeros_like(logits).scatter(-1, top, 1.0).sum(1)
    else:
        score = logits.sum(1)
    if pool > 1:
        score = torch.nn.functional.max_pool1d(score[:, None], pool, stride=1, padding=pool // 2)[:, 0]
    return score if valid is None else score.masked_fill(~valid, -torch.inf)


def select(score: Tensor, k: int) -> Tensor:
    """The k slots of the highest score (B, S): (B, k) int64, ascending; ties go to the lower slot, NaN loses.

    Raises:
        LimitError: k outside [0, S].
    """
    return top_indices(score.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf), k)


def safe_cosine(query: Tensor, keys: Tensor, k: int) -> float:
    """The cosine from which on any query of one head has the same top k as this one (the lemma of appendix C).

    Args:
        query: (d,).
        keys: (S, d).
        k: in [1, S).

    Returns:
        A cosine in (0, 1]; 1 when the k-th and the next score are equal.

    Raises:
        LimitError: k outside its limits.
    """
    if not 1 <= k < len(keys):
        raise LimitError("safe_cosine", "k", k, f"in [1, S={len(keys)})")
    q, rows = query.double(), keys.double()
    score = (rows @ q).topk(k + 1).values
    gap = float(score[k - 1] - score[k]) / float(q.norm())
    return (1 + (gap / (2 * float(rows.norm(dim=-1).max()))) ** 2) ** -0.5
