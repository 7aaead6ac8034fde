"""Small models for unmasking: random ones, tables that know the truth, and the calls of LLaDA and Dream."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tokenmill import models

VOCAB = 32
MASK = VOCAB - 1
END = 3
KINDS = ("llama", "qwen2", "gemma3")


def random_model(kind: str = "llama", *, seed: int = 0, attn: str = "sdpa", layers: int | None = None) -> Any:
    return models.tiny(kind, seed=seed, vocab=VOCAB, attn=attn, layers=layers, bidirectional=True)


def qwen3(seed: int = 0) -> Any:
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
    ids: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None, "mask_token_id": MASK}
    ids["is_causal"] = False
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(Qwen3Config(vocab_size=VOCAB, **sizes, **heads, **ids)).eval()


def encoder(kind: str, seed: int = 0) -> Any:
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "bert":
            settings = BertConfig(vocab_size=VOCAB, num_attention_heads=4, initializer_range=0.5, **sizes)
            return BertForMaskedLM(settings).eval()
        ids: dict[str, Any] = {
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "cls_token_id": 1,
            "sep_token_id": 2,
        }
        made = ModernBertForMaskedLM(ModernBertConfig(vocab_size=VOCAB, num_attention_heads=4, **sizes, **ids))
        for weight in made.parameters():
            if weight.dim() == 2:
                weight.data.mul_(10)
        return made.eval()


def prompts(rows: int = 3, length: int = 9, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Left-padded ids (rows, length) and their mask; row 0 has no padding."""
    ids = torch.randint(END + 1, MASK, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    for row, pads in zip(range(1, rows), itertools.cycle((4, 1)), strict=False):
        mask[row, :pads] = 0
    return ids, mask


def rows_alone(decoder: Any, model: Any, ids: Tensor, mask: Tensor, new: int) -> list[tuple[Tensor, Any]]:
    """Each row's answer without padding, and its trace; decoder(row) makes the decoder."""
    found = []
    for row in range(len(ids)):
        own = decoder(row)
        text = ids[row : row + 1, ids.shape[1] - int(mask[row].sum()) :]
        found.append((own.generate(model, text, max_new_tokens=new)[0, text.shape[1] :], own.trace))
    return found


class Toy(nn.Module):
    """A module with a configuration and a device, and no more of transformers."""

    def __init__(self, vocab_size: int = VOCAB, **config: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(vocab_size=vocab_size, **config)
        self.calls = 0


class Joint(Toy):
    """The true conditionals of a joint law over L symbols of V values; ids 0..V-1, then a start id, then the mask.

    Reads the last L places of what it is fed.
    """

    def __init__(self, joint: Tensor) -> None:
        self.values, self.length = joint.shape[0], joint.dim()
        super().__init__(self.values + 2, mask_token_id=self.values + 1)
        unknown = self.values
        laws = torch.full(((unknown + 1) ** self.length, self.length, self.values + 2), -40.0)
        for number, ids in enumerate(itertools.product(range(unknown + 1), repeat=self.length)):
            for at in range(self.length):
                fixed = [slice(None) if i == at or v == unknown else slice(v, v + 1) for i, v in enumerate(ids)]
                law = joint.double()[tuple(fixed)].sum([i for i in range(self.length) if i != at])
                laws[number, at, : self.values] = (law / law.sum()).clamp(min=1e-30).log().float()
        self.laws = laws

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        self.calls += 1
        ids = input_ids[:, -self.length :].clamp(max=self.values)
        number = (ids * (self.values + 1) ** torch.arange(self.length - 1, -1, -1)).sum(1)
        logits = torch.full((*input_ids.shape, self.values + 2), -40.0)
        logits[:, -self.length :] = self.laws[number]
        return SimpleNamespace(logits=logits)


class Llada(Toy):
    """A model of LLaDA's call: ids, a mask of two axes, no positions. A deaf one ignores the mask, as forks do."""

    def __init__(self, deaf: bool = False) -> None:
        super().__init__(n_layers=1, n_heads=1, d_model=16, mask_token_id=MASK)
        generator = torch.Generator().manual_seed(4)
        self.embed = torch.randn(VOCAB, 16, generator=generator)
        self.key = torch.randn(16, 16, generator=generator)
        self.head = nn.Linear(16, VOCAB, bias=False)
        self.head.weight.data = torch.randn(VOCAB, 16, generator=generator)
        self.deaf = deaf

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, attention_bias: Tensor | None = None
    ) -> Any:
        self.calls += 1
        h = self.embed[input_ids]
        # Positions are relative, so that padding on either side moves nothing.
        place = torch.arange(h.shape[1])
        scores = h @ self.key @ h.mT / 4 - 0.3 * (place[:, None] - place).abs()
        if attention_mask is not None and not self.deaf:
            scores = scores.masked_fill(attention_mask[:, None, :] == 0, -torch.inf)
        return SimpleNamespace(logits=self.head(h + scores.softmax(-1) @ h))


class Dream(Llada):
    """A model of Dream's call: a mask of four axes and positions; it needs the shift."""

    def forward(  # type: ignore[override]
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Any:
        self.calls += 1
        h = self.embed[input_ids]
        place = torch.arange(h.shape[1]).expand(h.shape[:2]) if position_ids is None else position_ids
        scores = h @ self.key @ h.mT / 4 - 0.3 * (place[:, :, None] - place[:, None, :]).abs()
        if attention_mask is not None:
            scores = scores.masked_fill(~attention_mask[:, 0], -torch.inf)
        return SimpleNamespace(logits=self.head(h + scores.softmax(-1) @ h))


class Table(Toy):
    """A causal guide that predicts a fixed text: the logits at place j say ``text[j + 1]``."""

    def __init__(self, text: Tensor, vocab_size: int = VOCAB) -> None:
        super().__init__(vocab_size)
        self.text = text

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        self.calls += 1
        after = self.text[1 : input_ids.shape[1] + 1]
        after = torch.nn.functional.pad(after, (0, input_ids.shape[1] - after.shape[0]))
        logits = 20.0 * torch.nn.functional.one_hot(after, self.config.vocab_size)
        return SimpleNamespace(logits=logits[None].expand(input_ids.shape[0], -1, -1).clone())


def count_calls(model: nn.Module) -> list[int]:
    """A list whose only entry counts forward passes from now on."""
    calls = [0]

    def count(*_: Any) -> None:
        calls[0] += 1

    model.register_forward_pre_hook(count)
    return calls
