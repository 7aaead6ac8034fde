"""Choosing and gathering keys: the highest scores with ties settled, rows of keys, attention over what is left."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenmill.errors import LimitError


def top_indices(score: Tensor, k: int) -> Tensor:
    """The k highest of the last axis; equal scores go to the lower index, so that runs repeat on every device.

    Args:
        score: (..., S), without NaN.
        k: in [0, S].

    Returns:
        (..., k) int64, ascending.

    Raises:
        LimitError: k outside its limits.
    """
    size = score.shape[-1]
    if isinstance(k, bool) or not 0 <= k <= size:
        raise LimitError("top_indices", "k", k, f"in [0, S={size}]")
    if k == 0:
        return score.new_empty(*score.shape[:-1], 0, dtype=torch.long)
    # A stable sort of all S would settle ties as well, but costs many times a selection.
    least = score.topk(k, dim=-1).values[..., -1:]
    above, level = score > least, score == least
    room = k - above.sum(-1, keepdim=True)
    # 32 bits count as far as any cache is long, with half of the memory of 64.
    chosen = above | (level & (level.cumsum(-1, dtype=torch.int32) <= room))
    return chosen.nonzero()[:, -1].view(*score.shape[:-1], k)


def take(rows: Tensor, index: Tensor) -> Tensor:
    """Rows of keys or values.

    Args:
        rows: (B, G, S, D).
        index: (B, n) int64, one set for all heads, or (B, H, n) with H a multiple of G, one for each query head.

    Returns:
        (B, G, n, D), or (B, H, n, D).
    """
    b, g, _, d = rows.shape
    if index.dim() == 2:
        return rows.gather(2, index[:, None, :, None].expand(b, g, -1, d))
    # Head by head of a group, so that only rows that are chosen are copied.
    h, n = index.shape[1:]
    wide = index.reshape(b, g, h // g * n, 1).expand(-1, -1, -1, d)
    return rows.gather(2, wide).view(b, h, n, d)


def heads(rows: Tensor, count: int) -> Tensor:
    """(B, G, S, D) -> (B, H, S, D): query head h reads KV head h // (H // G)."""
    b, g, s, d = rows.shape
    return rows if g == count else rows[:, :, None].expand(b, g, count // g, s, d).reshape(b, count, s, d)


def grouped(query: Tensor, keys: Tensor) -> Tensor:
    """Dot products with every key, without scale, in float32.

    Args:
        query: (B, H, Q, D).
        keys: (B, G, S, D).

    Returns:
        (B, H, Q, S).
    """
    b, h, q, d = query.shape
    g = keys.shape[1]
    rows = query.float().reshape(b, g, h // g * q, d)
    return (rows @ keys.float().mT).reshape(b, h, q, keys.shape[2])


def sparse_attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scaling: float,
    index: Tensor | None = None,
    seen: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention over chosen keys, by their indices, by a mask, or both; softmax in float32.

    Args:
        query: (B, H, Q, D).
        key: (B, G, S, D).
        value: (B, G, S, D_v).
        scaling: of the dot products.
        index: (B, n) or (B, H, n), which keys; ``None`` means all.
        seen: bool, (B or 1, 1 or H, Q, n), with n = S without an index: which of them a query sees. A query that sees
            none gets zeros.
        softcap: bound of the logits, for models that have one.

    Returns:
        (B, H, Q, D_v) in the dtype of ``value``.
    """
    if index is not None:
        key, value = take(key, index), take(value, index)
    logits = grouped(query, key) * scaling
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    if seen is not None:
        logits = logits.masked_fill(~seen, -torch.inf)
    weights = logits.softmax(-1).nan_to_num(0.0).to(value.dtype)  # a row of -inf gives NaN
    b, h, q, n = weights.shape
    g = value.shape[1]
    return (weights.reshape(b, g, h // g * q, n) @ value).reshape(b, h, q, value.shape[-1])


def window_scores(query: Tensor, key: Tensor, seen: Tensor, *, scaling: float) -> Tensor:
    """How much attention the last queries pay to each key.

    Args:
        query: (B, H, W, D), the last queries of a prompt.
        key: (B, G, S, D).
        seen: (B or 1, 1 or H, W, S) bool.
        scaling: of the dot products.

    Returns:
        (B, H, S) float32, the mean of the softmaxes over the queries that see something.
    """
    b, h, w, d = query.shape
    g = key.shape[1]
    parts = []
    # One KV head at a time: the matrix of all heads would be the largest tensor of the layer.
    for one in range(g):
        rows = query.reshape(b, g, h // g, w, d)[:, one]
        mask = seen if seen.shape[1] == 1 else seen.reshape(seen.shape[0], g, h // g, w, -1)[:, one]
        logits = (grouped(rows, key[:, one : one + 1]) * scaling).masked_fill(~mask, -torch.inf)
        weights = logits.softmax(-1).nan_to_num(0.0)
        parts.append(weights.sum(2) / mask.any(-1).sum(-1, keepdim=True).clamp_min(1))
    return torch.cat(parts, 1)


def assemble(
    n_init: int,
    idx: Tensor,
    n_local: int,
    S: int | Tensor,
    *,
    start: int | Tensor = 0,
    since: Tensor | None = None,
    strict: bool = False,
) -> Tensor:
    """Sinks, chosen slots and local window as one list for each row.

    Args:
        n_init: sinks, the first tokens of a row.
        idx: (B, k) ascending slots, see `select`.
        n_local: the last tokens of a row.
        S: one past a row's last slot, for all rows or (B,).
        start: a row's first slot that is no padding, for all rows or (B,).
        since: (B,) what ``S`` was when ``idx`` was chosen, if that was earlier. The window then begins where it began
            at that time, so that no token falls between it and ``idx``.
        strict: the window has ``n_local`` tokens all the same, and tokens that have left it since are not read.

    Returns:
        (B, n_init + k + n_local) int64, ascending without repeats, with -1 in place of slots that a short row does
        not have. With ``since`` the window is wider by the largest number of slots that have come since.
    """
    device = idx.device
    stop, begin = (torch.as_tensor(x, device=device).expand(len(idx))[:, None] for x in (S, start))
    chosen_at = stop if since is None else since[:, None]
    late = 0 if since is None or strict else int((stop - chosen_at).max())
    sinks = begin + torch.arange(n_init, device=device)  # (B, n_init)
    local = stop - n_local - late + torch.arange(n_local + late, device=device)  # (B, n_local + late)
    opens = stop if strict else chosen_at
    ok = [
        sinks < stop,
        # Rows with too few candidates were filled up with slots that are none.
        (idx >= begin + n_init) & (idx < chosen_at - n_local),
        local >= torch.maximum(begin + n_init, opens - n_local),
    ]
    return torch.cat([sinks, idx, local], 1).masked_fill(~torch.cat(ok, 1), -1)
