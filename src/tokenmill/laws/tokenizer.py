"""Laws of tokenizers: what a method of this kind makes is an ordinary fast tokenizer of transformers."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer

from . import Case, DoesNotApply, Law, Stage, expect

ON_MODELS = False
TEXTS = (
    "def f(x):\n    return {'a': x**2}  # done",
    "Съешь же ещё этих мягких булок № 5",
    "天地玄黃 키스의 naïve façade 👩‍👩‍👧",
    "  \t\n\n x" + " " * 40 + "y\r\n",
    "<|endoftext|> [CLS] (a) 2024 1.10 x86_64",
    "a",
    "",
)


def stage(_: str | None, seed: int) -> Stage:
    """The ids of a few texts; there is no untouched model to compare with."""

    def run(tokenizer: Any) -> tuple[torch.Tensor, ...]:
        if tokenizer is None:
            raise DoesNotApply("a tokenizer has no neutral setting")
        return tuple(torch.tensor(ids, dtype=torch.int64) for ids in tokenizer(list(TEXTS))["input_ids"])

    return Stage(run=run, inputs={"seed": torch.tensor(seed)})


def texts_come_back(case: Case) -> None:
    tokenizer = case.small()
    backend = tokenizer.backend_tokenizer
    for text in TEXTS:
        wanted = backend.normalizer.normalize_str(text) if backend.normalizer is not None else text
        back = tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"])
        expect(back == wanted, f"{text!r} comes back as {back!r}")


def ids_are_inside_the_vocabulary(case: Case) -> None:
    tokenizer = case.small()
    for ids in tokenizer(list(TEXTS))["input_ids"]:
        expect(all(0 <= i < len(tokenizer) for i in ids), f"an id is outside [0, {len(tokenizer)})")


def offsets_go_through_the_text(case: Case) -> None:
    tokenizer = case.small()
    for text in TEXTS:
        offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        covered = set().union(*(range(a, b) for a, b in offsets)) if offsets else set()
        expect(covered == set(range(len(text))), f"the offsets leave out a part of {text!r}")
        starts = [a for a, _ in offsets]
        expect(starts == sorted(starts), f"the offsets go back in {text!r}")


def saved_and_read_it_is_the_same(case: Case) -> None:
    backend = case.small().backend_tokenizer
    again = Tokenizer.from_str(backend.to_str())
    expect(again.to_str() == backend.to_str(), "the tokenizer changes when it is saved and read")
    for text in TEXTS:
        expect(again.encode(text).ids == backend.encode(text).ids, f"read again, it cuts {text!r} otherwise")


LAWS = Law.all(
    texts_come_back, ids_are_inside_the_vocabulary, offsets_go_through_the_text, saved_and_read_it_is_the_same
)
