"""A model's vocabulary laid out for sums over bytes, and the law of the next token under a target."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenmill.decode._byte_view import ByteTokenizerView
from tokenmill.errors import LimitError
from tokenmill.text import ByteTrie

SLOTS = 258  # 256 bytes, the end of the text, and any other control token
END, OTHER = 256, 257


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The vocabulary of a model, laid out for sums over bytes on the model's device.

    Attributes:
        trie: of the tokens that spell bytes, M of them.
        order: (M,) int64, their ids in the trie's order.
        first: (M,) int64, first byte of each.
        lengths: bytes of each, in the trie's order.
        end: (E,) int64, ids that end a text.
        other: ids that spell nothing and do not end a text, up to the width of the model's output.
        width: of the model's output.
    """

    trie: ByteTrie
    order: Tensor
    first: Tensor
    lengths: list[int]
    end: Tensor
    other: Tensor
    width: int

    @classmethod
    def of(cls, view: ByteTokenizerView, width: int, end: Sequence[int], device: torch.device) -> Vocabulary:
        """Lay out a tokenizer's tokens for a model with ``width`` logits.

        Raises:
            LimitError: the tokenizer has ids that the model has not, or an end id outside the model's output.
        """
        trie = view.trie
        for name, top in (("tokenizer ids", int(trie.order.max())), ("end token", max(end, default=0))):
            if top >= width:
                raise LimitError("ByteLM", name, top, f"below {width}, the model's output", "Use the model's own one.")
        spelled = torch.zeros(width, dtype=torch.bool)
        spelled[trie.order] = True
        spelled[list(end)] = True
        lengths = trie.offsets.diff()
        order = trie.order.to(device)
        ending = torch.tensor(sorted(set(end)), dtype=torch.long, device=device)
        # A token that ends the text does not spell anything, whatever its content says.
        return cls(
            trie,
            order,
            trie.byte_at(0, len(trie.order), 0).to(device),
            lengths.tolist(),
            ending,
            (~spelled).nonzero().squeeze(1).to(device),
            width,
        )


@dataclass(frozen=True, slots=True)
class Law:
    """Next-token law of one context, in float64 and log space.

    Attributes:
        by_id: (V,) log-probabilities; -inf where the target excludes a token.
        leak: share of the model's own mass that the target excludes.
    """

    by_id: Tensor
    leak: float


def token_law(logits: Tensor, mask: Tensor | None, end: Tensor, temperature: float = 1.0) -> Law:
    """The law of the next token under a target.

    Args:
        logits: (V,) of any dtype.
        mask: (V',) bool with V' <= V, tokens that stay valid; the rest is excluded and what is left renormalised.
            ``None`` keeps the model's own law.
        end: (E,) int64, ids that may always come.
        temperature: of tokens.

    Raises:
        LimitError: nothing is left.
    """
    law = (logits.double() / temperature).log_softmax(0)
    if mask is None:
        return Law(law, 0.0)
    keep = torch.nn.functional.pad(mask, (0, law.shape[0] - mask.shape[0]))
    if end.numel():
        keep = keep.index_fill(0, end, True)
    law = law.masked_fill(~keep, -math.inf)
    total = law.logsumexp(0)
    mass = float(total)
    if mass == -math.inf:
        raise LimitError("ByteLM", "valid tokens", 0, "at least one in every context", "Check the tokenizer.")
    return Law(law - total, max(0.0, -math.expm1(min(mass, 0.0))))
