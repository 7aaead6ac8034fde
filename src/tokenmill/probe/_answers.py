"""Asking: any model, endpoint or function from text to text; each answer is kept on disk as soon as it is there."""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Protocol, cast

from tokenmill.errors import LimitError, StoppedError, TokenmillError
from tokenmill.probe._example import TASKS, Example
from tokenmill.probe._scores import score

Progress = Callable[[int, int | None], None]
_SINGLE_TOKENS = 100
_TOKENS_PER_VALUE = 48  # a value with quotes and comma is 40 characters, and a token is one character at least


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back for one prompt: a text, or the reason that there is none."""

    text: str = ""
    error: str = ""
    prompt_tokens: int | None = None
    tokens: int | None = None
    cut: bool = False


class Answerer(Protocol):
    """Whoever can be asked: `name` tells models apart in files, `at_once` prompts are given together.

    An error that leaves some prompts answered may hold the replies in ``.partial``, with None for the others.
    """

    @property
    def name(self) -> str: ...
    @property
    def at_once(self) -> int: ...
    def answer(self, prompts: Sequence[str], max_new_tokens: int, /) -> list[Reply]: ...


@dataclass(frozen=True, slots=True)
class Answer:
    """One example and what a model made of it; a line of the file of answers.

    Attributes:
        key: digest of model, prompt and length of the answer; two lines with one key are the same question.
        model: whoever answered.
        id: of the example.
        task: of the example.
        context: characters of its haystack.
        meta: its columns.
        text: the answer.
        parsed: values read out of it.
        correct: share of them that is right.
        wrong: values that nobody asked for.
        error: why there is no answer, or an empty string.
        prompt_tokens: tokens of the whole prompt as the model counts them; None when nobody said.
        tokens: of the answer.
        cut: the answer reached the limit of its length.
        seconds: for the batch that it was in, divided by the batch's size.
    """

    key: str
    model: str
    id: int
    task: str
    context: int
    meta: Mapping[str, Any]
    text: str
    parsed: list[str]
    correct: float
    wrong: int
    error: str = ""
    prompt_tokens: int | None = None
    tokens: int | None = None
    cut: bool = False
    seconds: float = 0.0


@dataclass(slots=True)
class _Function:
    """A function from text to text."""

    function: Callable[[str], str]
    name: str = field(init=False)
    at_once: int = field(default=1, init=False)

    def __post_init__(self) -> None:
        self.name = getattr(self.function, "__name__", type(self.function).__name__)

    def answer(self, prompts: Sequence[str], max_new_tokens: int) -> list[Reply]:  # noqa: ARG002
        return [Reply(str(self.function(prompt))) for prompt in prompts]


def answerer(model: Any, tokenizer: Any = None, *, batch_size: int = 1) -> Answerer:
    """Whoever is asked, from a transformers model with its tokenizer, an `Endpoint`, or a function.

    Raises:
        LimitError: none of these, a model without a tokenizer, a batch below one.
    """
    if hasattr(model, "answer"):
        return model
    if hasattr(model, "generate"):
        from tokenmill.probe._local import Local

        if tokenizer is None:
            raise LimitError("needle-threading", "tokenizer", None, "given together with a model")
        return Local(model, tokenizer, batch_size=batch_size)
    if callable(model):
        return _Function(cast(Callable[[str], str], model))
    limit = "a model with generate, an Endpoint, or a function"
    raise LimitError("needle-threading", "model", type(model).__name__, limit)


def room(example: Example) -> int:
    """Tokens that an answer may have: 100 as published, and enough for every value that is asked."""
    return max(_SINGLE_TOKENS, _TOKENS_PER_VALUE * len(example.values))


def run(
    model: Any,
    tokenizer: Any,
    examples: Iterable[Example],
    *,
    out: str | Path | None = None,
    max_new_tokens: int | None = None,
    batch_size: int = 1,
    progress: Progress | None = None,
) -> list[Answer]:
    """Ask every example, greedily and without examples of how to answer, and score the answers.

    Args:
        model: a transformers model, an `Endpoint`, a `Local`, or a function from text to text.
        tokenizer: the model's; None for the others.
        examples: of `build_suite` or a file.
        out: a file of JSON lines that answers are added to; what it holds of the same model, prompts and lengths of
            answers is not asked again.
        max_new_tokens: of an answer; None is 100, or 48 for each value that is asked if that is more.
        batch_size: prompts that a transformers model gets at once, padded on the left.
        progress: called with how many examples are done, and of how many if that is known.

    Returns:
        The answers in the order of the examples, those that were there before included.

    Raises:
        LimitError: bad arguments, before anything is asked.
        StoppedError: whoever is asked does not answer any more; `.partial` holds the answers so far, `out` as well.
    """
    if max_new_tokens is not None and (isinstance(max_new_tokens, bool) or max_new_tokens < 1):
        raise LimitError("needle-threading", "max_new_tokens", max_new_tokens, "at least 1, or None")
    asked = answerer(model, tokenizer, batch_size=batch_size)
    file = Path(out) if out is not None else None
    known = {a.key: a for a in read_answers(file)} if file is not None and file.exists() else {}
    total = len(examples) if isinstance(examples, Sequence) else None
    found: list[Answer] = []
    for batch in _batches(examples, asked.at_once, max_new_tokens):
        keys = [key_of(asked.name, example, _limit(example, max_new_tokens)) for example in batch]
        new = {key: example for key, example in zip(keys, batch, strict=True) if key not in known}
        if new:
            made, fault = _ask(asked, new, _limit(batch[0], max_new_tokens))
            for answer in made:
                known[answer.key] = answer
                if file is not None:
                    _append(file, answer)
            if fault is not None:
                found += [_told(known[key], e) for key, e in zip(keys, batch, strict=True) if key in known]
                said = str(fault) if isinstance(fault, TokenmillError) else f"{type(fault).__name__}: {fault}"
                message = f"needle-threading: stopped after {len(found)} examples: {said}"
                raise StoppedError(message, partial=found) from fault
        found += [_told(known[key], example) for key, example in zip(keys, batch, strict=True)]
        if progress is not None:
            progress(len(found), total)
    return found


def _limit(example: Example, given: int | None) -> int:
    return room(example) if given is None else given


def _batches(examples: Iterable[Example], size: int, given: int | None) -> Iterator[list[Example]]:
    """Neighbours of about one length (a factor of two) and one length of answers, at most `size` together."""
    for _, group in itertools.groupby(examples, key=lambda e: (_limit(e, given), len(e.prompt).bit_length())):
        while batch := list(itertools.islice(group, size)):
            yield batch


def _told(answer: Answer, example: Example) -> Answer:
    """The answer under the example's own number and columns: examples may ask the same, and suites be put together."""
    return replace(answer, id=example.id, meta=dict(example.meta))


def _ask(asked: Answerer, new: Mapping[str, Example], limit: int) -> tuple[list[Answer], Exception | None]:
    """The answers that came, and what stopped the others."""
    began, fault = time.perf_counter(), None
    try:
        replies: Sequence[Reply | None] = asked.answer([example.prompt for example in new.values()], limit)
    except Exception as error:  # noqa: BLE001 - whatever stops it, what has been answered is kept
        fault = error
        replies = getattr(error, "partial", None) or [None] * len(new)
    seconds = (time.perf_counter() - began) / len(new)
    made = []
    for (key, example), reply in zip(new.items(), replies, strict=True):
        if reply is None:
            continue
        scored = score(example, reply.text)
        about = (key, asked.name, example.id, example.task, len(example.haystack), dict(example.meta))
        said = (reply.text, scored.parsed, scored.correct, scored.wrong, reply.error)
        made.append(Answer(*about, *said, reply.prompt_tokens, reply.tokens, reply.cut, seconds))
    return made, fault


def key_of(model: str, example: Example, max_new_tokens: int) -> str:
    """What makes two questions the same one: who is asked what, with which answer in mind, and how long it may get."""
    about = json.dumps([model, example.task, example.prompt, example.values, max_new_tokens])
    return hashlib.sha256(about.encode()).hexdigest()[:24]


def _append(file: Path, answer: Answer) -> None:
    from tokenmill.bench.result import append

    append(file, asdict(answer))


def read_answers(path: str | Path) -> list[Answer]:
    """The answers of a file; a last line that was cut off while it was written is left out.

    Raises:
        LimitError: no such file, or a line that is no answer.
    """
    from tokenmill.bench.result import read_lines

    file = Path(path)
    if not file.is_file():
        raise LimitError("read_answers", "path", str(path), "a file of JSON lines")
    names = {f.name for f in fields(Answer)}
    found = []
    for number, line in enumerate(read_lines(file), start=1):
        good = isinstance(line, dict) and set(line) == names and line["task"] in TASKS
        if not good or not isinstance(line["correct"], int | float):
            raise LimitError(f"{file}:{number}", "line", str(line)[:60], "an answer of needle-threading")
        found.append(Answer(**line))
    return found
