"""One method of the task `generate` at work: a call of ``model.generate``, with its counts."""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from tokenmill.bench.task import Item, Outcome

_WARM_UP_TOKENS = 4


class Subject:
    """Plain `generate`, one of its own assisted modes, or a decoder on top of it.

    Args:
        model: the target.
        decoder: a ``custom_generate`` callable, or None.
        arguments: more arguments for ``generate``.
        new_tokens: tokens to generate.
        sample: sample from the untouched law instead of taking the likeliest token.
        seed: of sampling; each item has a stream of its own.
    """

    def __init__(
        self, model: Any, decoder: Any, arguments: Mapping[str, Any], *, new_tokens: int, sample: bool, seed: int
    ) -> None:
        self.model, self.decoder, self.arguments = model, decoder, dict(arguments)
        self.new_tokens, self.sample, self.seed = new_tokens, sample, seed

    def run(self, item: Item, /) -> Outcome:
        """Generate from one prompt. The counts of the target's work come from the trace, or from a hook."""
        output, calls, positions = self._generate(item, self.new_tokens)
        n = len(output)
        trace = getattr(self.decoder, "trace", None)
        if trace is None:
            # The prompt's call gives one token, and so does each later one beside what was drafted.
            counts = {"model_calls": calls, "positions": positions, "tokens": n, "accepted": n - calls}
            steps = {"step_calls": calls - 1, "step_tokens": n - 1}
        else:
            counts = {name: float(value) for name, value in trace.counts().items()}
            made = getattr(trace, "steps", None)
            steps = {"step_calls": len(made), "step_tokens": sum(made)} if made else {"step_calls": 0, "step_tokens": 0}
        return Outcome(output, {**counts, **steps})

    def warm_up(self, item: Item, /) -> None:
        """A few tokens, untimed, so that the first timing does not pay for what happens once."""
        self._generate(item, _WARM_UP_TOKENS)

    def _generate(self, item: Item, new_tokens: int) -> tuple[list[int], int, int]:
        ids = torch.tensor([item.content])
        arguments: dict[str, Any] = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "max_new_tokens": new_tokens,
            "do_sample": self.sample,
            **self.arguments,
        }
        if self.sample:
            arguments |= {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
        stream = _stream(self.seed, item.id)
        if self.decoder is not None:
            arguments["custom_generate"] = self.decoder
            if self.sample and "generator" in inspect.signature(self.decoder).parameters:
                arguments["generator"] = torch.Generator().manual_seed(stream)
        with counted(self.model) as seen, torch.random.fork_rng(devices=[]), torch.inference_mode():
            torch.manual_seed(stream)
            output = self.model.generate(**arguments)
        return output[0, len(item.content) :].tolist(), seen[0], seen[1]


def log_likelihood(model: Any, prompt: Sequence[int], output: Sequence[int]) -> float:
    """Mean log-likelihood of the output's tokens after the prompt, in nats."""
    ids = torch.tensor([[*prompt, *output]])
    with torch.inference_mode():
        logits = model(input_ids=ids, logits_to_keep=len(output) + 1).logits[0, :-1].float()
    return float(logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None]).mean())


def _stream(seed: int, item: str) -> int:
    """A seed of its own for each item, the same in every process."""
    return zlib.crc32(f"{seed} {item}".encode())


@contextmanager
def counted(model: Any) -> Generator[list[int], None, None]:
    """Yield ``[calls, positions]`` of the model's forward passes inside the block."""
    seen = [0, 0]

    def count(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        seen[0] += 1
        seen[1] += ids.shape[-1] if ids is not None else kwargs["inputs_embeds"].shape[-2]

    handle = model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()
