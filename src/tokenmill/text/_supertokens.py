"""Supertokens: BPE over chunks of random length, so that strings of several words become tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from tokenmill.errors import LimitError
from tokenmill.text import _bpe_training as bpe
from tokenmill.text._corpus_stream import CorpusStream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

WHERE = "train_supertokenizer"
# The published values sum to 1.1; these are the same shares of 1.
_SHIPPED = (0.044, 0.091, 0.146, 0.171, 0.185, 0.171, 0.146, 0.091, 0.044, 0.011)
CHUNK_LENGTHS: Mapping[tuple[int, int], float] = MappingProxyType(
    {(4 + 2 * n, 5 + 2 * n): share / 1.1 for n, share in enumerate(_SHIPPED)}
)
END = "<|endoftext|>"


def random_chunks(text: str, chunk_lengths: Mapping[tuple[int, int], float], rng: np.random.Generator) -> list[str]:
    """Cut a text at random distances: a range by its probability, a length uniformly in it, until the text ends.

    Args:
        text: what is cut; the chunks joined are it.
        chunk_lengths: (least, most) characters -> probability.
        rng: of the draws, all of which are made at once.

    Raises:
        LimitError: probabilities that are negative or do not sum to 1, a range that is empty or begins below 1.
    """
    lows, highs, shares = _checked(chunk_lengths)
    if not text:
        return []
    count = len(text) // int(lows.min()) + 1
    which = rng.choice(len(shares), size=count, p=shares)  # (count,)
    ends = np.cumsum(rng.integers(lows[which], highs[which] + 1))  # (count,)
    stops = [*ends[ends < len(text)].tolist(), len(text)]
    return [text[a:b] for a, b in zip([0, *stops], stops, strict=False)]


def train_supertokenizer(
    texts: Iterable[str] | None = None,
    vocab_size: int = 128_000,
    *,
    files: Sequence[str | Path] = (),
    chunk_lengths: Mapping[tuple[int, int], float] = CHUNK_LENGTHS,
    max_token_length: int = 30,
    min_frequency: int = 2,
    normalization: bpe.Normalization = "nfc",
    special_tokens: Sequence[str] = (END,),
    seed: int = 0,
    progress: bool = False,
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE whose tokens may cross spaces; stock `tokenizers` runs it.

    Chunks go to the trainer as texts of their own, so no separator is needed that a text could hold.

    Args:
        texts: strings.
        vocab_size: of the tokenizer, special tokens included; fewer when the corpus supports no more.
        files: paths of text or JSON lines, also ``"path:0.1"``.
        chunk_lengths: (least, most) characters -> probability.
        max_token_length: symbols (bytes) of a token at most.
        min_frequency: of a pair, to be merged.
        normalization: Unicode form, "none" for none.
        special_tokens: at ids 0..n-1; the first ends a text.
        seed: of the cuts and of sampled files.
        progress: show the trainer's bar.

    Raises:
        LimitError: a setting outside its limit, an empty corpus, too many bad records.
    """
    _checked(chunk_lengths)
    if max_token_length < 2:
        raise LimitError(WHERE, "max_token_length", max_token_length, "at least 2")
    if not special_tokens:
        raise LimitError(WHERE, "special_tokens", special_tokens, "at least one, which ends a text")
    normalizer = bpe.make_normalizer(WHERE, normalization, lowercase=False)
    room = bpe.require_room(WHERE, vocab_size, len(special_tokens), 0)
    stream = CorpusStream(texts, files, seed=seed, where=WHERE)
    rng = np.random.default_rng(seed)
    learned = bpe.train_bpe(
        bpe.chunked(stream, lambda text: random_chunks(text, chunk_lengths, rng), normalization),
        room,
        regex=False,
        max_token_length=max_token_length,
        min_frequency=min_frequency,
        progress=progress,
    )
    made = bpe.assemble(learned, specials=special_tokens, normalizer=normalizer, regex=False)
    return bpe.wrap(made, {"bos_token": special_tokens[0], "eos_token": special_tokens[0]}, special_tokens[1:])


def _checked(chunk_lengths: Mapping[tuple[int, int], float]) -> tuple[Any, Any, Any]:
    """Lows, highs and shares, each (R,)."""
    if not chunk_lengths:
        raise LimitError(WHERE, "chunk_lengths", {}, "at least one range with its probability")
    for low, high in chunk_lengths:
        if not 1 <= low <= high:
            raise LimitError(WHERE, "chunk_lengths", (low, high), "ranges (least, most) with 1 <= least <= most")
    shares = np.array(list(chunk_lengths.values()), dtype=np.float64)
    if (shares < 0).any() or abs(shares.sum() - 1) > 1e-6:
        raise LimitError(WHERE, "sum of chunk_lengths", float(shares.sum()), "1, of probabilities that are >= 0")
    lows, highs = np.array(list(chunk_lengths)).T
    return lows, highs, shares / shares.sum()
