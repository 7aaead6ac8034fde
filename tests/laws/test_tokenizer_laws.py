"""The laws of tokenizers hold for a plain byte-level BPE and are broken by one with the flaw that each is to find."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tokenmill import catalog, laws


def made(flaw: str = "") -> Any:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = [] if flaw == "bytes" else pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(["abc def"], trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False))  # pyright: ignore[reportCallIssue]
    if flaw == "normalizer":
        bpe.normalizer = normalizers.Replace("a", "b")
    if flaw == "offsets":
        bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, clean_up_tokenization_spaces=False)


def broken(tokenizer: Any) -> set[str]:
    def train() -> Any:
        """A toy."""
        return tokenizer

    module = ModuleType("toy", "A toy.")
    vars(module).update({"train": train, "small": train})
    card = replace(catalog.card("token-recycling"), kind="tokenizer", api=("train",), slug="toy", family="text")
    case, found = laws.Case(card, module), set()
    for law in laws.laws_for("tokenizer"):
        try:
            law.check(case)
        except laws.DoesNotApply:
            continue
        except laws.BrokenLawError:
            found.add(law.name)
    return found


def test_a_sound_tokenizer_keeps_every_law() -> None:
    assert not broken(made())


@pytest.mark.parametrize(
    ("flaw", "law"),
    [("bytes", "texts come back"), ("offsets", "texts come back"), ("offsets", "offsets go through the text")],
)
def test_a_flaw_breaks_its_law(flaw: str, law: str) -> None:
    assert law in broken(made(flaw))


def test_what_a_normalizer_changes_is_no_flaw() -> None:
    assert "texts come back" not in broken(made("normalizer"))


def test_an_id_beyond_the_vocabulary_and_a_random_cut_are_found() -> None:
    class Beyond:
        def __init__(self) -> None:
            self.whole, self.calls = made(), 0
            self.backend_tokenizer = self.whole.backend_tokenizer

        def __len__(self) -> int:
            return 100

        def decode(self, ids: list[int]) -> str:
            return self.whole.decode(ids)

        def __call__(self, texts: Any, **how: Any) -> Any:
            self.calls += 1
            found = self.whole(texts, **how)
            if isinstance(texts, list) and self.calls % 2:
                found["input_ids"][0] = found["input_ids"][0][1:]
            return found

    found = broken(Beyond())
    assert {"ids are inside the vocabulary", "same seed same output"} <= found
