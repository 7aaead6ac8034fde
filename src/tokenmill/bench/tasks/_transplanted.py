"""What a transplanted model says about a text, in bits a byte, which tokenizers cannot change."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from tokenmill.bench.task import Item, Outcome


@torch.inference_mode()
def bits_per_byte(model: Any, tokenizer: Any, text: str) -> tuple[float, int]:
    """Bits of a text under a causal model, by byte of its UTF-8, and the number of its tokens.

    The text is one sequence behind the start token (the end token where there is no start token), so that every
    byte of it is predicted.
    """
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    sequence = torch.tensor([[start, *ids]])
    logits = model(sequence).logits[0, :-1, : len(tokenizer)].float()  # fillers are no tokens
    nats = F.cross_entropy(logits, sequence[0, 1:], reduction="sum")
    return float(nats) / math.log(2) / len(text.encode("utf-8")), len(ids)


@dataclass(frozen=True, slots=True)
class Scorer:
    """A model and its tokenizer, made ready."""

    model: Any
    tokenizer: Any
    counts: dict[str, float]

    def run(self, item: Item, /) -> Outcome:
        """Bits a byte of one text."""
        bits, tokens = bits_per_byte(self.model, self.tokenizer, item.content)
        return Outcome(bits, {**self.counts, "tokens": tokens, "model_calls": 1, "positions": tokens})
