"""One byte-level BPE trainer for every method here: train, cut to size, add tokens, pad, make a tokenizer."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from tokenmill.errors import LimitError, unknown_name
from tokenmill.text._corpus_stream import CorpusStream
from tokenmill.text._structure import byte_level_alphabet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Normalization = Literal["nfc", "nfd", "nfkc", "nfkd", "none"]
_NORMALIZERS = {"nfc": normalizers.NFC, "nfd": normalizers.NFD, "nfkc": normalizers.NFKC, "nfkd": normalizers.NFKD}
BYTES = 256
_BYTE_OF = byte_level_alphabet()


@dataclass(frozen=True, slots=True)
class Learned:
    """Merges in the order in which they were learned, in the byte alphabet.

    Attributes:
        symbols: the vocabulary before the merges, in the order of ids.
        merges: pairs; a later one may give a string that an earlier one gave too.
    """

    symbols: tuple[str, ...]
    merges: tuple[tuple[str, str], ...]

    def first(self, merges: int) -> Learned:
        """What training for fewer tokens gives: BPE learns its merges in order, so it is the beginning."""
        return Learned(self.symbols, self.merges[:merges])

    def vocabulary(self, specials: Sequence[str] = ()) -> dict[str, int]:
        """String -> id: special tokens, then symbols, then what the merges make."""
        made = [*specials, *self.symbols, *(a + b for a, b in self.merges)]
        return {text: number for number, text in enumerate(dict.fromkeys(made))}


def byte_alphabet() -> list[str]:
    """The 256 symbols that stand for bytes, sorted."""
    return sorted(_BYTE_OF)


def to_bytes(text: str) -> bytes:
    """The bytes that a string of the byte alphabet stands for."""
    return bytes(map(_BYTE_OF.__getitem__, text))


def to_symbols(text: str) -> str:
    """The string of the byte alphabet for a text."""
    return "".join(piece for piece, _ in pre_tokenizers.ByteLevel(False, use_regex=False).pre_tokenize_str(text))


def make_normalizer(where: str, normalization: str, *, lowercase: bool) -> Any:
    """The normaliser, or None when nothing is changed.

    Raises:
        LimitError: an unknown name.
    """
    if normalization != "none" and normalization not in _NORMALIZERS:
        raise unknown_name(where, "normalization", normalization, [*_NORMALIZERS, "none"])
    steps = [] if normalization == "none" else [_NORMALIZERS[normalization]()]
    if lowercase:
        steps.append(normalizers.Lowercase())
    return normalizers.Sequence(steps) if steps else None


def unicode_form(text: str, normalization: str) -> str:
    """`text` normalised by Python, for what is cut before the trainer sees it."""
    return text if normalization == "none" else unicodedata.normalize(normalization.upper(), text)  # type: ignore[arg-type]


def train_bpe(
    stream: Iterable[str | list[str]],
    merges: int,
    *,
    normalizer: Any = None,
    regex: bool = True,
    max_token_length: int | None = None,
    min_frequency: int = 1,
    progress: bool = False,
) -> Learned:
    """Learn byte-level merges with the trainer of `tokenizers`; all work for each word is done there.

    Args:
        stream: texts, or lists of texts; nothing is learned across the end of one.
        merges: how many to learn at most.
        normalizer: of `tokenizers`, or None.
        regex: cut words as GPT-2 does first; without, each text is one word.
        max_token_length: symbols of a token at most.
        min_frequency: of a pair, to be merged.
        progress: show the trainer's bar.
    """
    made = Tokenizer(models.BPE())
    if normalizer is not None:
        made.normalizer = normalizer
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)
    # The trainer's limit of a token's length is exclusive.
    limit: dict[str, Any] = {} if max_token_length is None else {"max_token_length": max_token_length + 1}
    trainer = trainers.BpeTrainer(
        vocab_size=BYTES + max(merges, 0),
        min_frequency=min_frequency,
        show_progress=progress,
        initial_alphabet=byte_alphabet(),
        **limit,
    )
    made.train_from_iterator(stream, trainer)  # type: ignore[arg-type]
    return read_learned(made)


def read_learned(trained: Tokenizer) -> Learned:
    """Symbols and merges of a trained model."""
    model = json.loads(trained.to_str())["model"]
    pairs = tuple((a, b) for a, b in model["merges"])
    made = {a + b for a, b in pairs}
    symbols = [text for text, _ in sorted(model["vocab"].items(), key=lambda item: item[1])]
    return Learned(tuple(s for s in symbols if s not in made), pairs)


def require_room(where: str, vocab_size: int, specials: int, custom: int, others: int = BYTES) -> int:
    """Merges that a vocabulary has room for.

    Raises:
        LimitError: none.
    """
    left = vocab_size - specials - custom - others
    if left < 0:
        limit = f"at least {vocab_size - left}"
        told = f"It leaves {left} merges after {specials} special, {custom} custom and {others} byte tokens."
        raise LimitError(where, "vocab_size", vocab_size, limit, told)
    return left


def power_of_two(size: int) -> int:
    """The least power of two that is not below `size`; a power of two is its own."""
    return 1 << max(size - 1, 0).bit_length()


def fillers(taken: set[str], count: int) -> list[str]:
    """Runs of 2, 3, ... spaces and newlines in turn that are not in `taken`, `count` of them."""
    found: list[str] = []
    length = 2
    while len(found) < count:
        found += [run for run in (" " * length, "\n" * length) if run not in taken]
        length += 1
    return found[:count]


def assemble(
    learned: Learned,
    *,
    specials: Sequence[str],
    normalizer: Any = None,
    regex: bool = True,
    added: Sequence[AddedToken] = (),
    filled_to: int = 0,
) -> Tokenizer:
    """The tokenizer: specials at 0..n-1, symbols, merges, added tokens, and whitespace runs up to `filled_to`."""
    made = Tokenizer(models.BPE(learned.vocabulary(specials), list(learned.merges)))
    if normalizer is not None:
        made.normalizer = normalizer
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in specials])
    made.add_tokens(list(added))
    missing = filled_to - made.get_vocab_size()
    if missing > 0:
        taken = {to_bytes(t).decode("utf-8", "replace") for t in learned.vocabulary()} | {t.content for t in added}
        made.add_tokens([AddedToken(run, normalized=False) for run in fillers(taken, missing)])
    return made


def wrap(made: Tokenizer, roles: dict[str, str], extra: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """As a transformers tokenizer that pads on the left and cleans nothing up."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        **roles,
        **({"extra_special_tokens": list(extra)} if extra else {}),
    )


def chunked(stream: CorpusStream, cut: Any, normalization: str) -> Iterator[list[str]]:
    """Each piece of a stream, normalised, as the list that `cut` makes of it: every chunk is a text of its own."""
    for text in stream:
        yield cut(unicode_form(text, normalization))
