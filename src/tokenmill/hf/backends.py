"""A model's own attention back-end, called by hand, and masks in one form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tokenmill.errors import LimitError, UnsupportedError

from .layout import eager_function


def visible(mask: Tensor | None, query: Tensor, key: Tensor, *, causal: bool = True) -> Tensor:
    """Any attention mask of transformers as a boolean one.

    Args:
        mask: boolean (True = visible), additive float, or ``None`` in the sense of sdpa: one query sees all keys, as
            many keys as queries are causal, and more keys than queries are an empty static cache (causal, and the
            rest of it unwritten).
        query: (B, H, Q, D).
        key: (B, G, K, D).
        causal: for ``None``: False means that everything is visible.

    Returns:
        Boolean, (B or 1, H or 1, Q, K).

    Raises:
        LimitError: a mask that is not 4-D or whose last sizes are not Q and K.
    """
    q, k = query.shape[-2], key.shape[-2]
    if mask is None:
        rows = torch.arange(q, device=key.device)[:, None]
        allowed = rows >= torch.arange(k, device=key.device) if causal and q > 1 else torch.ones_like(rows).bool()
        return allowed.expand(q, k)[None, None]
    if mask.dim() != 4 or mask.shape[-2] not in (1, q) or mask.shape[-1] != k:
        raise LimitError("visible", "mask.shape", tuple(mask.shape), f"(B, 1, Q={q}, K={k})")
    # Additive masks hide with the dtype's minimum or -inf; a bias (ALiBi) is far above both.
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return seen.expand(*mask.shape[:2], q, k)


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask as the additive one of eager attention: 0 where visible, the dtype's minimum elsewhere."""
    zero = torch.zeros((), device=mask.device, dtype=dtype)
    return torch.where(mask, zero, torch.finfo(dtype).min)


@dataclass(frozen=True, slots=True)
class Backend:
    """The attention implementation ``name`` as the model's own modules would use it."""

    name: str | None

    def mask(self, **kwargs: Any) -> Tensor | None:
        """The mask that this back-end's layers receive; a back-end without mask function receives none."""
        make = ALL_MASK_ATTENTION_FUNCTIONS.get(self.name or "eager")
        return None if make is None else make(**kwargs)

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        *,
        own_mask: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Call the back-end; ``own_mask`` says that it made the mask itself, else the mask is put into its form."""
        if not own_mask:
            mask = self._in_form(module, query, key, mask, kwargs.get("is_causal"))
        if self.name in ("eager", "sdpa") and kwargs.get("indices") is not None:
            # Sparse models hand their selection to other back-ends and fold it into the mask for these two.
            mask = _select(visible(mask, query, key) if mask is None else mask, kwargs.pop("indices"), query.dtype)
        return self._function(module)(module, query, key, value, mask, **kwargs)

    def _in_form(
        self, module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, causal: bool | None
    ) -> Tensor | None:
        if self.name not in (None, "eager") or (mask is not None and mask.dtype != torch.bool):
            return mask
        if causal is None:
            causal = bool(getattr(module, "is_causal", True))
        return additive(visible(mask, query, key, causal=causal), query.dtype)

    def _function(self, module: nn.Module) -> Any:
        eager = eager_function(module)
        if self.name in (None, "eager") and eager is None:
            raise UnsupportedError(
                "attached",
                f"the eager attention of {type(module).__name__} cannot be found",
                "Switch the model first: model.set_attn_implementation('sdpa').",
            )
        return eager if self.name is None else ALL_ATTENTION_FUNCTIONS.get_interface(self.name, eager)  # type: ignore[arg-type]


def _select(mask: Tensor, indices: Tensor, dtype: torch.dtype) -> Tensor:
    hidden = torch.ones(*indices.shape[:2], mask.shape[-1], dtype=torch.bool, device=indices.device)
    hidden = hidden.scatter(-1, indices.long(), False).unsqueeze(1)  # (B, 1, Q, K), True = not selected
    return mask & ~hidden if mask.dtype == torch.bool else mask.masked_fill(hidden, torch.finfo(dtype).min)
