"""What a transplanted model says about a text, in bits a byte, which tokenizers cannot change; a few steps before."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from tokenmill.bench.task import Item, Outcome
from tokenmill.errors import LimitError


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


def train_rows(
    model: Any, tokenizer: Any, texts: list[str], *, steps: int, tokens: int, rate: float, seed: int
) -> list[float]:
    """Train the embedding rows (and the output rows of an untied model) and nothing else; the loss of every step.

    Each step is one piece of `tokens` tokens of one text, drawn with the seed; shorter texts are left out.

    Raises:
        LimitError: all texts are shorter.
    """
    rng = random.Random(seed)
    encoded = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    encoded = [ids for ids in encoded if len(ids) >= tokens]
    if not encoded:
        raise LimitError("bench transplant", "train_tokens", tokens, "at most the tokens of the longest training text")
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    asked = [p.requires_grad for p in model.parameters()]
    model.requires_grad_(False)
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    rows = list({id(module.weight): module.weight for module in modules}.values())  # tied rows are one parameter
    for weight in rows:
        weight.requires_grad_(True)
    optimiser = torch.optim.Adam(rows, lr=rate)
    losses: list[float] = []
    for step in range(steps):
        ids = rng.choice(encoded)
        at = rng.randrange(len(ids) - tokens + 1)
        sequence = torch.tensor([[start, *ids[at : at + tokens]]])
        for group in optimiser.param_groups:
            group["lr"] = rate * (1 - step / steps)
        logits = model(sequence[:, :-1]).logits[0, :, : len(tokenizer)].float()
        loss = F.cross_entropy(logits, sequence[0, 1:])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    for parameter, wanted in zip(model.parameters(), asked, strict=True):
        parameter.requires_grad_(wanted)
    return losses


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
