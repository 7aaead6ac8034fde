"""k-SEQ and the optimum it approaches: choosing one of k drafts without changing the target's law.

Notation follows the roles, never letters: ``draft_probs`` is the small model's law, ``target_probs`` the large one's.
(The SpecTr paper writes p for the draft and q for the target, most other papers the reverse.)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tokenmill.errors import LimitError

HALVINGS = 60


def check_law(where: str, name: str, law: Tensor) -> None:
    """Refuse what is no law over the last axis: NaN, negative mass, a sum that is not 1 within 1e-3."""
    if not law.is_floating_point() or law.dim() < 1 or law.shape[-1] < 1:
        raise LimitError(where, name, f"{law.dtype} {tuple(law.shape)}", "float probabilities (..., V)", "Use softmax.")
    low, total = law.min(), law.sum(-1, dtype=torch.float64)
    if not bool(low >= 0):
        raise LimitError(
            where, name, f"an entry of {low.item()}", "at least 0 everywhere", "Use softmax, check for NaN."
        )
    off = (total - 1).abs().max()
    if not bool(off <= 1e-3):
        raise LimitError(where, name, f"a sum that is off by {off.item():.3g}", "1 within 1e-3", "Normalise it.")


def _check(where: str, draft_probs: Tensor, target_probs: Tensor, k: int) -> tuple[Tensor, Tensor]:
    if isinstance(k, bool) or k < 1:
        raise LimitError(where, "k", k, "at least 1", "k drafts are compared.")
    if draft_probs.shape[-1] != target_probs.shape[-1]:
        widths = f"draft {draft_probs.shape[-1]} and target {target_probs.shape[-1]}"
        raise LimitError(where, "vocabulary", widths, "the same for both", "Cut both to the common tokenizer's length.")
    check_law(where, "draft_probs", draft_probs)
    check_law(where, "target_probs", target_probs)
    return torch.broadcast_tensors(draft_probs.double(), target_probs.double())


def solve_rho(draft_probs: Tensor, target_probs: Tensor, k: int) -> Tensor:
    """The smallest division factor for which k-SEQ keeps the target's law.

    That is the smallest rho in [1, k] with 1 - (1 - beta)^k <= rho * beta, where beta = sum min(p, q / rho) is the
    chance that one draft is accepted. Found by bisection in float64; the upper end is returned, since a smaller rho
    would bend the law.

    Args:
        draft_probs, target_probs: (..., V), any float dtype.
        k: number of drafts.

    Returns:
        (...,) float64 in [1, k].

    Raises:
        LimitError: k < 1, different vocabularies, or no probabilities.
    """
    p, q = _check("solve_rho", draft_probs, target_probs, k)
    low = torch.ones(p.shape[:-1], dtype=torch.float64, device=p.device)
    high = torch.full_like(low, float(k))
    high = torch.where(_valid(p, q, low, k), low, high)
    for _ in range(HALVINGS if k > 1 else 0):
        middle = (low + high) / 2
        valid = _valid(p, q, middle, k)
        low, high = torch.where(valid, low, middle), torch.where(valid, middle, high)
    return high


def _acceptance(p: Tensor, q: Tensor, rho: Tensor) -> Tensor:
    return torch.minimum(p, q / rho[..., None]).sum(-1).clamp(0.0, 1.0)


def _some(beta: Tensor, k: int) -> Tensor:
    """1 - (1 - beta)^k without cancellation."""
    return -torch.expm1(k * torch.log1p(-beta))


def _valid(p: Tensor, q: Tensor, rho: Tensor, k: int) -> Tensor:
    beta = _acceptance(p, q, rho)
    # One ulp of room at equality (k = 1, equal laws), where rounding alone would decide.
    return _some(beta, k) <= rho * beta * (1 + 1e-15)


def kseq_plan(
    draft_probs: Tensor, target_probs: Tensor, k: int, rho: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What k-SEQ will do: its factor, its chances and the law of the token when no draft is accepted.

    Args:
        draft_probs, target_probs: (..., V).
        k: number of drafts.
        rho: (...,) a factor of one's own, at least `solve_rho`'s to keep the law.

    Returns:
        rho (...,), beta (...,) chance that one draft is accepted, p_acc (...,) that some draft is, residual (..., V)
        normalised. All float64. A rho below the smallest valid one gives a residual with negative entries.

    Raises:
        LimitError: see `solve_rho`.
    """
    p, q = _check("kseq_plan", draft_probs, target_probs, k)
    exact = rho is None
    factor = solve_rho(p, q, k) if rho is None else rho.to(device=p.device, dtype=torch.float64)
    beta = _acceptance(p, q, factor)
    p_acc = _some(beta, k)
    if exact:
        # At the smallest valid rho, p_acc = rho * beta: the residual is what the target has above rho times the draft.
        residual = (q - factor[..., None] * p).clamp(min=0.0)
    else:
        scale = torch.where(beta > 0, p_acc / beta.clamp(min=1e-300), torch.ones_like(beta))
        residual = q - torch.minimum(p, q / factor[..., None]) * scale[..., None]
    total = residual.sum(-1, keepdim=True)
    # Nothing is left over when some draft is always accepted: any law will do, since it is never drawn from.
    residual = torch.where(total.abs() > 1e-15, residual / total.where(total.abs() > 1e-15, torch.ones_like(total)), q)
    return factor, beta, p_acc, residual


def optimal_acceptance(draft_probs: Tensor, target_probs: Tensor, k: int) -> Tensor:
    """The highest chance with which any exact method can emit one of k independent drafts.

    min over j of Q_j + 1 - P_j^k with the tokens sorted by target / draft ascending and P_j, Q_j the sums of the
    first j (max-flow min-cut; Hu et al., arXiv 2502.18779). O(V log V).

    Args:
        draft_probs, target_probs: (..., V).
        k: number of drafts.

    Returns:
        (...,) float64.

    Raises:
        LimitError: see `solve_rho`.
    """
    p, q = _check("optimal_acceptance", draft_probs, target_probs, k)
    ratio = torch.where(p > 0, q / p.clamp(min=1e-300), torch.inf)
    order = ratio.argsort(-1)
    below_p, below_q = p.gather(-1, order).cumsum(-1), q.gather(-1, order).cumsum(-1)
    cuts = below_q + 1 - below_p.clamp(max=1.0) ** k
    return torch.minimum(cuts.min(-1).values, torch.ones_like(cuts[..., 0])).clamp(min=0.0)  # j = 0 cuts at 1


def kseq_select(
    draft_tokens: Tensor, draft_probs: Tensor, target_probs: Tensor, generator: torch.Generator | None = None
) -> tuple[int, int]:
    """Emit one token of the target's law, one of the drafts where possible (SpecTr, algorithm k-SEQ).

    Args:
        draft_tokens: (k,) int64, independent draws from ``draft_probs``; repeats count.
        draft_probs, target_probs: (V,).
        generator: of the coins; on the device of the laws.

    Returns:
        The token, and the index of the draft that was accepted or -1.

    Raises:
        LimitError: no drafts, or a draft that its own law cannot have produced.
    """
    k = int(draft_tokens.shape[0])
    rho, _, _, residual = kseq_plan(draft_probs, target_probs, k)
    p, q = draft_probs.double()[draft_tokens], target_probs.double()[draft_tokens]
    if not bool((p > 0).all()):
        token = int(draft_tokens[int((p <= 0).nonzero()[0])])
        raise LimitError(
            "kseq_select",
            "draft_probs",
            f"0 at the drafted token {token}",
            "above 0 at every draft",
            "Pass the law that the drafts were sampled from, after temperature, top-k and penalties.",
        )
    coins = torch.rand(k, generator=generator, dtype=torch.float64, device=p.device)
    accepted = coins * rho * p <= q
    if bool(accepted.any()):
        index = int(accepted.to(torch.int8).argmax())
        return int(draft_tokens[index]), index
    return int(torch.multinomial(residual, 1, generator=generator)), -1


def spectr_verify(
    draft_ids: Tensor, draft_probs: Tensor, target_probs: Tensor, generator: torch.Generator | None = None
) -> tuple[Tensor, int]:
    """k-SEQ at each depth on the drafts that are still alive (SpecTr, recursive verification).

    Args:
        draft_ids: (K, L) int64, K independent continuations drawn from the drafter.
        draft_probs: (K, L, V), row (j, i) the drafter's law behind the prefix and ``draft_ids[j, :i]``.
        target_probs: (K, L + 1, V), the target's laws behind the same prefixes. Drafts that share a prefix share
            the rows there.
        generator: of the coins.

    Returns:
        tokens (n,) int64, 1 <= n <= L + 1, and the index of a draft that agrees with the first n - 1 of them.

    Raises:
        LimitError: shapes that do not fit, no probabilities, a draft outside its law.
    """
    where = "spectr_verify"
    if draft_ids.dim() != 2 or 0 in draft_ids.shape:
        raise LimitError(where, "draft_ids.shape", tuple(draft_ids.shape), "(K, L) with K, L >= 1", "Draft something.")
    k, length = draft_ids.shape
    if draft_probs.shape[:2] != (k, length):
        raise LimitError(
            where, "draft_probs.shape", tuple(draft_probs.shape), f"({k}, {length}, V)", "One row a token."
        )
    if target_probs.shape[:2] != (k, length + 1):
        limit = f"({k}, {length + 1}, V)"
        raise LimitError(where, "target_probs.shape", tuple(target_probs.shape), limit, "One row a prefix.")
    return verify_drafts(
        draft_ids, lambda j, i: draft_probs[j, i], lambda j, i: target_probs[j, i], generator=generator
    )


def verify_drafts(
    draft_ids: Tensor,
    draft_law: Callable[[int, int], Tensor],
    target_law: Callable[[int, int], Tensor],
    *,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, int]:
    """`spectr_verify` on laws that are looked up by draft and depth, so that equal prefixes are stored once.

    Args:
        draft_ids: (K, L) int64.
        draft_law: draft j and depth i < L to the drafter's law (V,) behind ``draft_ids[j, :i]``.
        target_law: the same for the target, i <= L.
        generator: of the coins.
    """
    k, length = draft_ids.shape
    alive = torch.arange(k, device=draft_ids.device)
    out: list[int] = []
    for depth in range(length):
        survivor = int(alive[0])
        drafts = draft_ids[alive, depth]
        token, _ = kseq_select(drafts, draft_law(survivor, depth), target_law(survivor, depth), generator)
        out.append(token)
        # Membership decides, not whose coin it was: what the others go on with is independent of the coins.
        alive = alive[drafts == token]
        if alive.shape[0] == 0:
            return torch.tensor(out, device=draft_ids.device), survivor
    survivor = int(alive[0])
    bonus = target_law(survivor, length)
    check_law("spectr_verify", "target_probs", bonus)
    out.append(int(torch.multinomial(bonus.double(), 1, generator=generator)))
    return torch.tensor(out, device=draft_ids.device), survivor
