"""Methods of the task `bytes` at work: the law of the next byte behind a cut, or the rest of the line."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tokenmill.bench.task import Item, Outcome
from tokenmill.bench.tasks._generation import counted
from tokenmill.decode import ByteLM
from tokenmill.decode._byte_text import generate_bytes
from tokenmill.decode._byte_vocabulary import Law
from tokenmill.decode._covers import Covers, Machine
from tokenmill.decode._token_tree import TokenTree


@dataclass(frozen=True, slots=True)
class Cut:
    """A text that was cut: what stands before, and the rest of the line."""

    before: bytes
    rest: bytes


def healed(lm: ByteLM, x: bytes) -> Covers:
    """Token healing as a law: the last token is taken back, and the next one must begin with its bytes.

    Of all covers of x only those that share all tokens but the last with the tokenizer's encoding are left.
    """
    ids = lm.view.encode(x)
    if not ids:
        return lm.start(x)
    last = lm.view.token_bytes[ids[-1]] or b""
    machine = Machine(TokenTree("healing", lm.model, lm.trace), None, lm.vocabulary, trace=lm.trace)
    node, row = machine.contexts.prefill([*lm.head, *ids[:-1]])
    start = len(x) - len(last)
    law: Law = machine.law(ids[:-1], row)
    found = [machine.context(tuple(ids[:-1]), node, start, 0.0, law, last)]
    (whole,), rows = machine.contexts.extend([node], [ids[-1]])
    logp = float(law.by_id[ids[-1]])
    found.append(machine.whole(tuple(ids), whole, len(x), logp, machine.law(ids, rows[0])))
    return Covers(machine, len(x), tuple(c for c in found if c is not None))


@dataclass(slots=True)
class NextByte:
    """A method that gives a law of the next byte.

    Args:
        law: bytes -> (258,) log-probabilities.
        traces: of the models that are asked.
    """

    law: Callable[[bytes], Tensor]
    traces: Sequence[Any]

    def run(self, item: Item, /) -> Outcome:
        """The log-law at the cut, as bits of the true byte and whether it is the likeliest one."""
        before = [trace.counts() for trace in self.traces]
        law = self.law(item.content.before)
        true = item.content.rest[0]
        output = {"bits": -float(law[true]) / math.log(2), "top1": float(int(law[:256].argmax()) == true)}
        after = [trace.counts() for trace in self.traces]
        return Outcome(output, _grown(before, after) | {"bytes": 1.0})


@dataclass(slots=True)
class ByteCompletion:
    """The rest of the line, byte by byte."""

    model: Any
    traces: Sequence[Any]
    new_bytes: int

    def run(self, item: Item, /) -> Outcome:
        """Generate greedily to the end of the line."""
        before = [trace.counts() for trace in self.traces]
        state = self.model.start(item.content.before)
        begun = [trace.counts() for trace in self.traces]
        text = generate_bytes(state, max_new_bytes=self.new_bytes, temperature=0.0, top_p=1.0, stop=[b"\n"])
        after = [trace.counts() for trace in self.traces]
        # The line break that ends a text is chosen, and not read.
        counts = {"bytes": float(max(len(text.data), 1)), "rows": _grown(begun, after)["positions"]}
        return Outcome(text.data, _grown(before, after) | counts)


@dataclass(slots=True)
class TokenCompletion:
    """The rest of the line by plain `generate`.

    Args:
        lm: gives model, tokenizer and the bytes of tokens.
        new_bytes: at most.
        healing: ``""`` for the prompt's tokens as they are, ``"ours"`` to take the last token back and constrain the
            next one, ``"transformers"`` for ``generate(token_healing=True)``.
        tokenizer: for transformers' own healing.
    """

    lm: ByteLM
    new_bytes: int
    healing: str
    tokenizer: Any

    def run(self, item: Item, /) -> Outcome:
        """Generate greedily to the end of the line."""
        x, view = item.content.before, self.lm.view
        ids = view.encode(x)
        arguments: dict[str, Any] = {}
        start = x
        if self.healing == "ours" and ids:
            last = view.token_bytes[ids[-1]] or b""
            ids, start = ids[:-1], x[: len(x) - len(last)]
            arguments["logits_processor"] = [_BeginsWith(view, last, len(ids) + len(self.lm.head))]
        elif self.healing == "transformers":
            arguments |= {"token_healing": True, "tokenizer": self.tokenizer}
        prompt = torch.tensor([[*self.lm.head, *ids]], device=self.lm.model.device)
        done = _LineDone(view, prompt.shape[1] - (self.healing == "transformers"), len(x) - len(start), self.new_bytes)
        failed = 0.0
        with counted(self.lm.model) as seen:
            try:
                out = self._generate(prompt, done, arguments)
            except KeyError:
                if self.healing != "transformers":
                    raise
                # It looks the last token up among those that it weighs, and does not always find it.
                out, failed = [], 1.0
        if self.healing == "transformers":
            spelled = _spelled(view, out)
            # It decodes the prompt, strips it and encodes it again; what it made stands behind the common part.
            data = spelled[len(x.strip()) :] if spelled.startswith(x.strip()) else b""
        else:
            data = (start + _spelled(view, out[prompt.shape[1] :]))[len(x) :]
        text = data.split(b"\n")[0][: self.new_bytes]
        counts = {"model_calls": float(seen[0]), "positions": float(seen[1]), "bytes": float(max(len(text), 1))}
        return Outcome(text, counts | {"failed": failed})

    def _generate(self, prompt: Tensor, done: Any, arguments: Mapping[str, Any]) -> list[int]:
        """All tokens, the prompt's included."""
        with torch.inference_mode():
            out = self.lm.model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=False,
                max_new_tokens=self.new_bytes + 1,
                stopping_criteria=[done],
                **arguments,
            )
        return out[0].tolist()


class _BeginsWith:
    """Lets only tokens through that begin with some bytes, for the first new token."""

    def __init__(self, view: Any, data: bytes, length: int) -> None:
        lo, hi = view.trie.range(data)
        self.allowed, self.length = view.trie.order[lo:hi], length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] != self.length:
            return scores
        kept = torch.full_like(scores, -torch.inf)
        kept[:, self.allowed] = scores[:, self.allowed]
        return kept


class _LineDone:
    """Stops once the new text holds a line break behind the cut, or is long enough."""

    def __init__(self, view: Any, prompt: int, given: int, limit: int) -> None:
        self.view, self.prompt, self.given, self.limit = view, prompt, given, limit

    def __call__(self, input_ids: Tensor, *_: Any, **__: Any) -> Tensor:
        made = _spelled(self.view, input_ids[0, self.prompt :].tolist())[self.given :]
        return torch.tensor([b"\n" in made or len(made) >= self.limit], device=input_ids.device)


def _spelled(view: Any, ids: Sequence[int]) -> bytes:
    return b"".join(view.token_bytes[i] or b"" for i in ids)


def _grown(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What the counters of one or more models grew by, added up."""
    names = ("model_calls", "positions", "laws", "leaked")
    return {name: float(sum(b[name] - a[name] for a, b in zip(before, after, strict=True))) for name in names}


def tokens_as_they_are(lm: ByteLM) -> ByteLM:
    """The same model, conditioned on the tokenizer's encoding of the prompt and nothing else."""
    return replace(lm, mode="all", beam=None, lookback=0)
