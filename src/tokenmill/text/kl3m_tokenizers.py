"""KL3M tokenizers: train a vocabulary for a field of work, or one of very short tokens for texts with errors.

Bommarito, Katz and Bommarito, "KL3M Tokenizers: A Family of Domain-Specific and Character-Level Tokenizers for Legal,
Financial, and Preprocessing Applications" (arXiv 2503.17247). The domain family is a byte-level BPE with custom tokens
of the field; the character family forbids tokens longer than a few characters, so that a wrong letter changes few
tokens.

Use it when a model is trained anew, or gets a new vocabulary, and its texts differ from what general tokenizers saw.
Do not use it with a model as it is: its embeddings belong to its own vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from tokenmill.catalog import Card, Paper, Reported
from tokenmill.errors import LimitError, unknown_name
from tokenmill.text import _bpe_training as bpe
from tokenmill.text._corpus_stream import CorpusStream
from tokenmill.text._custom_tokens import CustomTokens, fit
from tokenmill.text._tokenizer_report import TokenizerReport

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["CARD", "KL3M_SPECIALS", "CustomTokens", "TokenizerReport", "train_char_bpe", "train_domain_bpe"]

CARD = Card(
    name="KL3M tokenizers",
    kind="tokenizer",
    paper=Paper(
        title=(
            "KL3M Tokenizers: A Family of Domain-Specific and Character-Level Tokenizers for Legal, Financial, and "
            "Preprocessing Applications"
        ),
        date="2025-03-21",
        arxiv="2503.17247",
        code="https://github.com/alea-institute/kl3m-tokenizers",
    ),
    summary=(
        "Trains byte-level vocabularies for one field of work, with custom tokens and a size that is a power of two. "
        "A second family caps the length of tokens, so that errors in a text move few boundaries."
    ),
    claim=(
        "Fewer tokens per character on texts of the field than a general vocabulary of the same size, more outside it; "
        "with capped tokens, fewer changed tokens for each wrong character."
    ),
    api=("train_domain_bpe", "train_char_bpe", "CustomTokens", "KL3M_SPECIALS", "TokenizerReport"),
    exact=False,
    trains=False,
    task="tokenize",
    differs=(
        "custom tokens that begin or end with a letter or digit are not found inside words",
        "custom tokens are compared with the learned vocabulary as text, and the room that is saved goes to merges",
        "an exact power of two is not doubled; too small a corpus is refused unless filling is asked",
        "the initial alphabet is the 256 bytes, without the 66 symbols that no text gives",
        "citations are an argument and nothing is downloaded",
    ),
    reported=Reported(
        table="tokens per character",
        setting="mean of five data sets, 128k cased (GPT-4o: 0.2636)",
        metric="tokens per character",
        value=0.2417,
    ),
)

_ROLES = {f"{role}_token": f"<|{role}|>" for role in ("bos", "eos", "pad", "unk", "sep", "cls", "mask")}
_ROLES |= {"bos_token": "<|start|>", "eos_token": "<|end|>"}
_PAIRS = tuple(mark for name in ("system", "user", "instruction") for mark in (f"<|{name}|>", f"</|{name}|>"))
KL3M_SPECIALS: tuple[str, ...] = (*_ROLES.values(), *_PAIRS)
"""The 13 special tokens of the paper, ids 0-12: start, end, pad, unk, sep, cls, mask, and three pairs."""

Short = Literal["raise", "fill"]


def train_domain_bpe(
    texts: Iterable[str] | None = None,
    vocab_size: int = 32_768,
    *,
    files: Sequence[str | Path] = (),
    normalization: bpe.Normalization = "nfkc",
    lowercase: bool = False,
    custom_tokens: CustomTokens | Literal["empty"] | None = None,
    special_tokens: Sequence[str] = KL3M_SPECIALS,
    pad_to_power_of_two: bool = True,
    min_frequency: int = 1,
    max_token_length: int | None = None,
    short: Short = "raise",
    seed: int = 0,
    progress: bool = False,
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE for a field of work (paper, "domain" family).

    Args:
        texts: strings.
        vocab_size: 32,768, 65,536 or 131,072 in the paper; everything counts.
        files: paths of text or JSON lines with "text" (``.jsonl``, ``.jsonl.gz``); ``"path:0.1"`` reads a tenth.
        normalization: Unicode form, "none" for none.
        lowercase: an uncased vocabulary.
        custom_tokens: strings of the field; None for the defaults of `CustomTokens`, "empty" for no such tokens.
        special_tokens: at ids 0..n-1.
        pad_to_power_of_two: fill with whitespace runs up to the next power of two; one that is met stays.
        min_frequency: of a pair, to be merged; the paper's runs used 1.
        max_token_length: symbols of a token at most; None in the paper.
        short: "raise" when the corpus supports fewer tokens than asked, or "fill" with whitespace runs.
        seed: of sampled files.
        progress: show the trainer's bar.

    Raises:
        LimitError: a setting outside its limit, no room for the tokens, a corpus that is empty, bad or too small.
    """
    where = "train_domain_bpe"
    normalizer = _check(where, normalization, lowercase, special_tokens, min_frequency, short)
    if max_token_length is not None and max_token_length < 1:
        raise LimitError(where, "max_token_length", max_token_length, "at least 1, or None")
    if isinstance(custom_tokens, str) and custom_tokens != "empty":
        raise LimitError(where, "custom_tokens", custom_tokens, 'a CustomTokens, "empty", or None for the defaults')
    chosen = CustomTokens.only() if custom_tokens == "empty" else custom_tokens
    added = (chosen if chosen is not None else CustomTokens()).added(normalizer)
    added = [token for token in added if token.content not in special_tokens]
    bpe.require_room(where, vocab_size, len(special_tokens), len(added))
    stream = CorpusStream(texts, files, seed=seed, where=where)
    # Room for the custom tokens that will prove learned; `fit` takes back what is too much.
    room = vocab_size - len(special_tokens) - bpe.BYTES
    learned = bpe.train_bpe(
        stream, room, normalizer=normalizer, max_token_length=max_token_length,
        min_frequency=min_frequency, progress=progress,
    )  # fmt: skip
    kept, missing = fit(where, learned, added, vocab_size, len(special_tokens))
    supported = len(kept.vocabulary(special_tokens)) + len(missing)
    size = _filled(where, supported, vocab_size, pad_to_power_of_two, short)
    made = bpe.assemble(kept, specials=special_tokens, normalizer=normalizer, added=missing, filled_to=size)
    return _wrapped(made, special_tokens)


def train_char_bpe(
    texts: Iterable[str] | None = None,
    vocab_size: int = 4096,
    max_chars: int = 3,
    *,
    files: Sequence[str | Path] = (),
    unit: Literal["symbol", "char"] = "symbol",
    normalization: bpe.Normalization = "nfkc",
    lowercase: bool = False,
    special_tokens: Sequence[str] = KL3M_SPECIALS,
    pad_to_power_of_two: bool = True,
    min_frequency: int = 1,
    short: Short = "raise",
    seed: int = 0,
    progress: bool = False,
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of short tokens, for texts with errors (paper, "character" family).

    Args:
        texts: strings.
        vocab_size: 4,096, 8,192 or 16,384 in the paper.
        max_chars: the longest token; 3, 3 and 4 in the paper. A leading space counts.
        files: paths of text or JSON lines, also ``"path:0.1"``.
        unit: what `max_chars` counts: "symbol" is the paper's bytes (a Cyrillic letter is 2), "char" is Unicode
            characters; there the frequent characters beyond ASCII get a token first, up to a quarter of the room.
        normalization: Unicode form, "none" for none.
        lowercase: an uncased vocabulary.
        special_tokens: at ids 0..n-1.
        pad_to_power_of_two: fill with whitespace runs up to the next power of two; these alone may be longer.
        min_frequency: of a pair, to be merged; 1,000 in the paper, for 1.85 million documents.
        short: "raise" when the corpus supports fewer tokens than asked, or "fill" with whitespace runs.
        seed: of sampled files.
        progress: show the trainer's bar.

    Raises:
        LimitError: as `train_domain_bpe`.
    """
    where = "train_char_bpe"
    normalizer = _check(where, normalization, lowercase, special_tokens, min_frequency, short)
    if max_chars < 1:
        raise LimitError(where, "max_chars", max_chars, "at least 1")
    if unit not in ("symbol", "char"):
        raise unknown_name(where, "unit", unit, ("symbol", "char"))
    room = bpe.require_room(where, vocab_size, len(special_tokens), 0)
    stream = CorpusStream(texts, files, seed=seed, where=where)
    if unit == "char":
        learned = _of_characters(stream, room, max_chars, normalizer, min_frequency, progress)
    else:
        learned = bpe.train_bpe(
            stream, room, normalizer=normalizer, max_token_length=max_chars,
            min_frequency=min_frequency, progress=progress,
        )  # fmt: skip
    kept, _ = fit(where, learned, (), vocab_size, len(special_tokens))
    supported = len(kept.vocabulary(special_tokens))
    size = _filled(where, supported, vocab_size, pad_to_power_of_two, short, f" with max_chars={max_chars}")
    return _wrapped(bpe.assemble(kept, specials=special_tokens, normalizer=normalizer, filled_to=size), special_tokens)


def small() -> Any:
    """A tokenizer of 512 tokens from a few lines, for the laws."""
    lines = [f"def f{n}(x): return (a) {2000 + n} of the house" for n in range(40)]
    return train_domain_bpe(lines, 512, custom_tokens=CustomTokens.only(years=("2024",)), short="fill")


# GPT-2's cut of a text into words, as ByteLevel has it.
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def _of_characters(
    stream: CorpusStream, room: int, longest: int, normalizer: Any, min_frequency: int, progress: bool
) -> bpe.Learned:
    """Merges learned over Unicode characters, behind merges that put the characters together from their bytes.

    In UTF-8 the bytes of a character's beginning occur nowhere else, so the first merges rebuild characters and
    nothing but characters; then the learned ones do what they did over characters.
    """
    made = Tokenizer(models.BPE())
    if normalizer is not None:
        made.normalizer = normalizer
    made.pre_tokenizer = pre_tokenizers.Split(Regex(_WORDS), "isolated")
    trainer = trainers.BpeTrainer(
        vocab_size=room + bpe.BYTES, min_frequency=min_frequency, show_progress=progress,
        limit_alphabet=128 + room // 4, max_token_length=longest + 1,
    )  # fmt: skip
    made.train_from_iterator(stream, trainer)
    learned = bpe.read_learned(made)
    builders: dict[tuple[str, str], None] = {}
    for character in learned.symbols:
        data = bpe.to_symbols(character)
        builders.update(dict.fromkeys((data[:n], data[n]) for n in range(1, len(data))))
    merges = [(bpe.to_symbols(a), bpe.to_symbols(b)) for a, b in learned.merges]
    return bpe.Learned(tuple(bpe.byte_alphabet()), (*builders, *merges))


def _check(
    where: str, normalization: str, lowercase: bool, specials: Sequence[str], min_frequency: int, short: str
) -> Any:
    """The normaliser, after the settings that both families have."""
    if len(set(specials)) != len(specials) or not all(specials):
        raise LimitError(where, "special_tokens", tuple(specials), "different strings that are not empty")
    if min_frequency < 1:
        raise LimitError(where, "min_frequency", min_frequency, "at least 1")
    if short not in ("raise", "fill"):
        raise unknown_name(where, "short", short, ("raise", "fill"))
    return bpe.make_normalizer(where, normalization, lowercase=lowercase)


def _filled(where: str, supported: int, asked: int, pad: bool, short: str, with_what: str = "") -> int:
    """The size to fill up to."""
    if supported < asked and short == "raise":
        limit = f"at most {supported}: the corpus supports only {supported} tokens{with_what}"
        mend = "Lower it, give more text, or fill with whitespace runs (short='fill')."
        raise LimitError(where, "vocab_size", asked, limit, mend)
    return bpe.power_of_two(asked) if pad else asked


def _wrapped(made: Tokenizer, specials: Sequence[str]) -> PreTrainedTokenizerFast:
    roles = {role: token for role, token in _ROLES.items() if token in specials}
    return bpe.wrap(made, roles, [token for token in specials if token not in roles.values()])
