"""Methods of the task `constrain` at work: particles, masks of the whole vocabulary, samples that are checked late."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenmill.bench.task import Item, Outcome
from tokenmill.bench.tasks import _tasks_under_constraints as asked
from tokenmill.decode import AWRS, NoValidContinuation
from tokenmill.errors import UnsupportedError
from tokenmill.text import TokenBytes


@dataclass(frozen=True, slots=True)
class Setting:
    """What all methods share.

    Attributes:
        model, tokenizer: the model.
        ends: ids that end a line or a text.
        new_tokens: at most.
        seed: of sampling; each item has a stream of its own.
    """

    model: Any
    tokenizer: Any
    ends: list[int]
    new_tokens: int
    seed: int

    def generate(self, item: Item, *, rows: int = 1, new_tokens: int | None = None, **arguments: Any) -> Any:
        """Sample from the model's own law at temperature 1; returns the new ids (rows, n)."""
        ids = torch.tensor([self.tokenizer(item.content.prompt)["input_ids"]], device=self.model.device)
        with torch.random.fork_rng(devices=[]), torch.inference_mode():
            torch.manual_seed(zlib.crc32(f"{self.seed} {item.id}".encode()))
            out = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=new_tokens or self.new_tokens,
                eos_token_id=self.ends,
                pad_token_id=self.ends[0],
                num_return_sequences=rows,
                **arguments,
            )
        return out[:, ids.shape[1] :]

    def text(self, ids: Tensor) -> bytes:
        """The line of a row: its tokens up to the first that ends it."""
        tokens, data = TokenBytes.of(self.tokenizer), b""
        for i in ids.tolist():
            if i in self.ends:
                break
            data += tokens[i] or b""
        return data


class Timed:
    """A constraint, or one of its states, that takes down how long its answers take. The answers are its own."""

    def __init__(self, asked_one: Any, spent: list[float]) -> None:
        self.asked_one, self.spent = asked_one, spent

    def prefix(self, context: bytes, /) -> float:
        return self._take(self.asked_one.prefix, context)

    def complete(self, context: bytes, /) -> float:
        return self._take(self.asked_one.complete, context)

    def start(self) -> Timed:
        return Timed(self._take(self.asked_one.start), self.spent)

    def allows(self, data: bytes, /) -> bool:
        return self._take(self.asked_one.allows, data)

    def advance(self, data: bytes, /) -> Timed:
        return Timed(self._take(self.asked_one.advance, data), self.spent)

    def accepting(self) -> bool:
        return self._take(self.asked_one.accepting)

    def _take(self, question: Callable[..., Any], *about: bytes) -> Any:
        first = time.perf_counter()
        try:
            return question(*about)
        finally:
            self.spent[0] += (time.perf_counter() - first) * 1e3


@dataclass(slots=True)
class Sampled:
    """Plain samples; those that satisfy the constraint count, or the only one whatever it is.

    Args:
        setting: see `Setting`.
        rows: samples.
        check: drop samples that do not satisfy the constraint (the "rerank" baseline).
    """

    setting: Setting
    rows: int
    check: bool

    def run(self, item: Item, /) -> Outcome:
        """Sample, then check."""
        constraint = Timed(asked.build(*item.content.constraint), checking := [0.0])
        with clock(self.setting.model) as spent:
            rows = self.setting.generate(item, rows=self.rows)
            texts = [self.setting.text(row) for row in rows]
            good = [not self.check or constraint.complete(text) == 0 for text in texts]
            kept = [text for text, ok in zip(texts, good, strict=True) if ok]
        posterior: dict[bytes, float] = {}
        for text in kept:
            posterior[text] = posterior.get(text, 0.0) + 1 / len(kept)
        lengths = [len(row) for row in rows]
        spent.append(checking[0])
        return _outcome(posterior, constraint, spent, steps=max(lengths), drawn=sum(lengths),
                        checks=self.rows * self.check)  # fmt: skip


@dataclass(slots=True)
class Particles:
    """AWRS, or one particle of it without weights.

    Args:
        setting: see `Setting`.
        params: settings of the method.
    """

    setting: Setting
    params: Mapping[str, Any]

    def run(self, item: Item, /) -> Outcome:
        """Generate; when all particles die there is no text."""
        boundary = "prefix" if item.content.open else "eos"
        seed = zlib.crc32(f"{self.setting.seed} {item.id}".encode())
        constraint = Timed(asked.build(*item.content.constraint), checking := [0.0])
        params = {"boundary": boundary, "seed": seed, **self.params}
        decoder = AWRS(constraint, self.setting.tokenizer, **params)
        # No living particle is an answer of the method: nothing was found.
        with clock(self.setting.model) as spent, suppress(NoValidContinuation):
            self.setting.generate(item, custom_generate=decoder)
        spent.append(checking[0])
        found, trace = decoder.sequences, decoder.trace
        extra = {"ess": found.ess} | ({"log_ml": found.log_ml} if found.alive else {})
        outcome = _outcome(found.posterior(), constraint, spent, steps=trace.model_calls, drawn=trace.particle_tokens,
                           checks=trace.checks)  # fmt: skip
        asks = trace.checks_per_token
        more = {"checks_median": float(median(asks)) if asks else 0.0, "asked": float(sum(asks)), **extra}
        return Outcome(outcome.output, {**outcome.counts, **more})


class Masked:
    """Sampling from a mask over the whole vocabulary, as far as `new_tokens`.

    Args:
        setting: see `Setting`.
        engine: ``"naive"`` asks the constraint about every token, ``"llguidance"`` computes the mask at once and knows
            regular expressions, schemas and grammars only.
    """

    def __init__(self, setting: Setting, engine: str) -> None:
        self.setting, self.engine = setting, engine
        self.tokens = TokenBytes.of(setting.tokenizer)

    def run(self, item: Item, /) -> Outcome:
        """Generate under the masks."""
        constraint = asked.build(*item.content.constraint)
        processor: Any = _Naive(self, constraint) if self.engine == "naive" else self._guided(item)
        with clock(self.setting.model) as spent:
            row = self.setting.generate(item, logits_processor=[processor])[0]
        spent.append(processor.spent[0])
        text = self.setting.text(row)
        made = _outcome({text: 1.0}, constraint, spent, steps=len(row), drawn=len(row), checks=processor.checks)
        # The naive mask has a limit of its own, so that most of its lines are beginnings.
        cut = self.engine == "naive" and int(row[-1]) not in self.setting.ends
        return Outcome({**made.output, "cut": cut}, made.counts)

    def _guided(self, item: Item) -> _Guided:
        import llguidance

        kind, source = item.content.constraint
        matcher: Any = llguidance.LLMatcher
        if kind == "json_schema":
            spaced = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
            grammar = matcher.grammar_from_json_schema(source, overrides=spaced)
        elif kind in ("regex", "grammar"):
            grammar = matcher.grammar_from_regex(source) if kind == "regex" else matcher.grammar_from_lark(source)
        else:
            raise UnsupportedError("llguidance", f"has no masks for constraints of kind {kind}", "Use awrs.")
        return _Guided(matcher(_guide(self.setting.tokenizer), grammar), self.setting.ends)


@cache
def _guide(tokenizer: Any) -> Any:
    """llguidance's view of a tokenizer; it takes half a minute for a large one."""
    import llguidance.hf

    return llguidance.hf.from_tokenizer(tokenizer)


class _Naive:
    """A mask made by asking about one token after another."""

    def __init__(self, masked: Masked, constraint: Any) -> None:
        self.tokens, self.ends, self.state = masked.tokens, set(masked.setting.ends), constraint.start()
        self.seen: int | None = None
        self.checks, self.spent = 0, [0.0]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        first = time.perf_counter()
        if self.seen is not None:
            last = self.tokens[int(input_ids[0, -1])]
            self.state = self.state.advance(last) if last else self.state
        self.seen = input_ids.shape[1]
        allows, keep = self.state.allows, []
        for i, data in enumerate(self.tokens.tokens):
            if data and i not in self.ends and allows(data):
                keep.append(i)
        self.checks += len(self.tokens)
        if self.state.accepting():
            keep += self.ends
        self.spent[0] += (time.perf_counter() - first) * 1e3
        masked = torch.full_like(scores, -torch.inf)
        masked[:, keep] = scores[:, keep]
        return masked


class _Guided:
    """A mask of llguidance."""

    def __init__(self, matcher: Any, ends: list[int]) -> None:
        self.matcher, self.ends = matcher, ends
        self.seen: int | None = None
        self.checks, self.spent = 0, [0.0]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        first = time.perf_counter()
        if self.seen is not None:
            self.matcher.consume_token(int(input_ids[0, -1]))
        self.seen = input_ids.shape[1]
        # llguidance's own kernel would be compiled at its first call, for which not every machine has what it takes.
        bits = np.frombuffer(self.matcher.compute_bitmask(), dtype=np.uint8)
        self.spent[0] += (time.perf_counter() - first) * 1e3
        allowed = np.unpackbits(bits, bitorder="little")[: scores.shape[1]].astype(bool)  # (V,)
        masked = torch.full_like(scores, -torch.inf)
        masked[0, : len(allowed)] = scores[0, : len(allowed)].masked_fill(~torch.from_numpy(allowed), -torch.inf)
        # A line break ends the text, wherever the end token may come.
        masked[:, self.ends] = scores[:, self.ends] if self.matcher.is_accepting() else -torch.inf
        return masked


def _outcome(
    posterior: Mapping[bytes, float], constraint: Any, spent: list[float], *, steps: int, drawn: int, checks: int
) -> Outcome:
    """What came out; the time that was not the model's is the method's own, and the constraint's is a part of that."""
    texts: dict[str, float] = {}
    valid = 0.0
    for data, share in posterior.items():
        text = data.decode("utf-8", errors="replace")
        texts[text] = texts.get(text, 0.0) + share
        valid += share * (constraint.complete(data) == 0)
    whole, model, checking = spent
    counts = {
        "tokens": float(steps),
        "particle_tokens": float(drawn),
        "checks": float(checks),
        "asked": float(checks),
        "model_ms": model,
        "own_ms": whole - model,
        "constraint_ms": checking,
    }
    return Outcome({"posterior": texts, "valid": valid, "cut": False}, counts)


@contextmanager
def clock(model: Any) -> Generator[list[float], None, None]:
    """Yield ``[ms of the block, ms of the model's forwards inside it]``, filled at the end."""
    spent, began = [0.0, 0.0], [0.0]

    def start(*_: Any) -> None:
        began[0] = time.perf_counter()

    def stop(*_: Any) -> None:
        spent[1] += (time.perf_counter() - began[0]) * 1e3

    hooks = [model.register_forward_pre_hook(start), model.register_forward_hook(stop)]
    first = time.perf_counter()
    try:
        yield spent
    finally:
        spent[0] = (time.perf_counter() - first) * 1e3
        for hook in hooks:
            hook.remove()
