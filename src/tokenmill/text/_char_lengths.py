"""How many characters of the raw text each token completes, for a whole batch of texts at once.

Where the tokens' bytes joined are the text's UTF-8, lengths come from the ids by a table. Where a tokenizer changes the
text first (normalisers, blanks that are dropped), they come from its offsets. A character that several tokens share
belongs to the one that completes it, so the lengths of a text always sum to ``len(text)``.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, compress
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import processors

from tokenmill.errors import LimitError, UnsupportedError
from tokenmill.text._encoder import plain_tokenizer
from tokenmill.text._structure import DUMMY_PREFIX
from tokenmill.text._token_bytes import TokenBytes

_BAR_IS_BLANK = "reads U+2581 as a space"
_PROBES = (
    "The quick brown fox doesn't jump over 12345 lazy dogs; naïve façade.",
    "def f(x):\n    return {'a': x**2}  # 2024-01-31\n\n\nhttps://a.b/c?d=e",
    "Съешь же ещё этих мягких французских булок. 天地玄黃，宇宙洪荒。 키스의 고유조건은 نص حكيم",
    "Gur dhvpx oebja sbk TH3 QU1CK  \t  aGVsbG8gd29ybGQ= 👩‍👩‍👧",
)

_THREADS = min(os.cpu_count() or 1, 8)
_PART = 16  # texts of a task at least

Ids = tuple[NDArray[np.int64], NDArray[np.int64]]


@dataclass(frozen=True, slots=True)
class CharLengths:
    """Texts in tokens.

    Attributes:
        lengths: (M,) int64, characters that each token completes, the texts one behind the other.
        offsets: (B + 1,) int64, where the tokens of each text begin.
    """

    lengths: NDArray[np.int64]
    offsets: NDArray[np.int64]


def check_text(where: str, text: Any) -> str:
    """The text itself.

    Raises:
        LimitError: anything but a `str`, or one with lone surrogates.
    """
    if not isinstance(text, str):
        mend = "Decode it first." if isinstance(text, bytes | bytearray) else ""
        raise LimitError(where, "type of text", type(text).__name__, "str", mend)
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            value = f"U+{ord(text[error.start]):04X} at position {error.start}"
            mend = 'Mend it with text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").'
            raise LimitError(where, "text", value, "free of lone surrogates", mend) from None
    return text


class CharCounter:
    """Tokens of texts and the characters they complete, for one tokenizer. Special tokens in a text are text."""

    def __init__(
        self,
        encode: Callable[[Sequence[str]], Ids] | None,
        count: Callable[[Sequence[str]], NDArray[np.int64]],
        offsets: Callable[[Sequence[str]], list[NDArray[np.int64]]] | None,
        vocabulary: TokenBytes | None,
        table: NDArray[np.int32] | None,
    ) -> None:
        """Use `of`."""
        self._encode, self._count, self._offsets, self._table = encode, count, offsets, table
        self._changes = set(vocabulary.changes.split("; ")) - {""} if vocabulary is not None else set()
        self._tokens = vocabulary.tokens if vocabulary is not None else ()
        self.specials = frozenset(vocabulary.specials.values()) if vocabulary is not None else frozenset()

    @classmethod
    def of(cls, tokenizer: Any) -> CharCounter:
        """Read a tokenizer; for one of `tokenizers` a copy that reads special tokens as text is made once and kept.

        Args:
            tokenizer: what `TokenBytes.of` takes, or any object with ``encode(text) -> ids``, whose tokens can be
                counted but not measured one by one.

        Raises:
            UnsupportedError: WordPiece, which drops blanks; a bare vocabulary; an object without ``encode``.
        """
        if not isinstance(tokenizer, TokenBytes) and not _is_known(tokenizer):
            return cls(None, _counting(tokenizer), None, None, None)
        vocabulary = TokenBytes.of(tokenizer)
        if "drops blanks" in vocabulary.changes:
            what = "thresholds on characters per token are for tokenizers that keep blanks; this is WordPiece"
            raise UnsupportedError("CharCounter", what, "Take the tokenizer of the model that is guarded.")
        if vocabulary.json is not None:
            if vocabulary not in _counters:
                _counters[vocabulary] = cls._of_backend(vocabulary)
            return _counters[vocabulary]
        arrays: Any = getattr(tokenizer, "encode_to_numpy", None)
        ranks: Any = vocabulary.ranks
        if arrays is None and ranks is None:
            raise UnsupportedError("CharCounter", "a bare vocabulary has no encoder", "Use TokenBytes.from_ranks.")

        def encode_texts(texts: Sequence[str]) -> Ids:
            return _flat(list(map(ranks, texts))) if arrays is None else _threaded(arrays, texts)

        return cls(encode_texts, lambda texts: encode_texts(texts)[1], None, vocabulary, vocabulary.lengths)

    @classmethod
    def _of_backend(cls, vocabulary: TokenBytes) -> CharCounter:
        copy, moved = plain_tokenizer(vocabulary.json or "", vocabulary.specials, rename=vocabulary.rename)
        copy.post_processor = processors.ByteLevel(trim_offsets=False)  # others would cut blanks off the offsets
        table = np.zeros(max(len(vocabulary), *moved, 0, copy.get_vocab_size()) + 1, dtype=np.int32)
        table[: len(vocabulary)] = vocabulary.lengths
        for new, old in moved.items():
            table[new] = vocabulary.lengths[old]

        def encode(texts: Sequence[str]) -> Ids:
            return _flat([e.ids for e in copy.encode_batch_fast(list(texts), add_special_tokens=False)])

        def count(texts: Sequence[str]) -> NDArray[np.int64]:
            found = copy.encode_batch_fast(list(texts), add_special_tokens=False)
            return np.fromiter(map(len, found), dtype=np.int64, count=len(found))

        def offsets(texts: Sequence[str]) -> list[NDArray[np.int64]]:
            found: list[Any] = copy.encode_batch(list(texts), add_special_tokens=False)
            return [np.array(e.offsets, dtype=np.int64).reshape(-1, 2) for e in found]

        return cls(encode, count, offsets, vocabulary, table)

    def counts(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """(B,) int64: tokens of each text."""
        return self._count(texts)

    def lengths(self, texts: Sequence[str]) -> CharLengths:
        """Characters that each token of each text completes.

        Raises:
            UnsupportedError: an object of which nothing but ``encode`` is known; offsets that cannot be had.
        """
        if self._encode is None or self._table is None:
            what = "only the number of tokens is known for this tokenizer, and windows need the length of each"
            raise UnsupportedError("CharCounter.lengths", what, "Set windows=() or pass a TokenBytes.")
        ids, counts = self._encode(texts)
        offsets = _starts(counts)
        lengths, exact = _by_table(texts, self._table[ids], offsets, int(DUMMY_PREFIX in self._changes))
        # A U+2581 that is read as a space has two bytes less than the text: such a text is not exact anyway.
        exact &= not (self._changes - {DUMMY_PREFIX, _BAR_IS_BLANK})
        inexact = np.flatnonzero(~exact & (counts > 0))
        if inexact.size:
            self._mend(texts, inexact, lengths, offsets)
        return CharLengths(lengths, offsets)

    def _mend(
        self, texts: Sequence[str], which: NDArray[np.int64], lengths: NDArray[np.int64], offsets: NDArray[np.int64]
    ) -> None:
        """Write the lengths of texts that the tokenizer changed, from its offsets."""
        if self._offsets is None:
            raise UnsupportedError(
                "CharCounter.lengths", "the tokens' bytes are not the text's and there are no offsets"
            )
        chosen = [texts[int(i)] for i in which]
        for i, pairs in zip(which.tolist(), self._offsets(chosen), strict=True):
            lengths[offsets[i] : offsets[i + 1]] = completed(pairs, len(texts[i]))

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits of the tokens' bytes and of how probe texts are cut: another pattern is another vocabulary."""
        digest = hashlib.sha256()
        digest.update(np.array([len(t or b"") for t in self._tokens], dtype="<u4").tobytes())
        digest.update(b"".join(t for t in self._tokens if t))
        digest.update(",".join(map(str, self.counts(_PROBES))).encode())
        return digest.hexdigest()[:16]


_counters: weakref.WeakKeyDictionary[TokenBytes, CharCounter] = weakref.WeakKeyDictionary()


def completed(pairs: NDArray[np.int64], n: int) -> NDArray[np.int64]:
    """(m,) int64: characters that each token completes, from offsets (m, 2); what no token covers goes to the next."""
    if not len(pairs):
        return np.zeros(0, dtype=np.int64)
    done = np.minimum(pairs[:, 1], np.append(pairs[1:, 0], n))
    done = np.clip(np.maximum.accumulate(done), 0, n)
    done[-1] = n
    return np.diff(done, prepend=0)


def _by_table(
    texts: Sequence[str], sizes: NDArray[np.int32], offsets: NDArray[np.int64], prefix: int
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Lengths (M,) from the tokens' bytes, and whether each text's bytes are those of its tokens (B,).

    Args:
        texts: B texts.
        sizes: (M,) bytes of each token.
        offsets: (B + 1,) where the tokens of each text begin.
        prefix: bytes that the tokenizer puts before a text, if it does.
    """
    total = _starts(sizes)  # (M + 1,)
    ends = total[offsets]  # (B + 1,) bytes of tokens before each text
    raw = np.fromiter((len(t) if t.isascii() else len(t.encode()) for t in texts), dtype=np.int64, count=len(texts))
    over = np.diff(ends) - raw  # (B,) bytes of tokens beyond the text's
    exact = (over == 0) | ((over == prefix) & (raw > 0))
    counts = np.diff(offsets)
    hard = np.fromiter((not t.isascii() for t in texts), dtype=np.bool_, count=len(texts)) | (over != 0)
    if not hard.all():  # the tokens' bytes are the characters of most texts
        found = sizes.astype(np.int64)
        if hard.any():
            theirs = np.repeat(hard, counts)
            some = list(compress(texts, hard.tolist()))
            found[theirs], exact[hard] = _by_table(some, sizes[theirs], _starts(counts[hard]), prefix)
        return found, exact
    joined = "".join(texts)
    begin = _starts(raw)
    owner = np.repeat(np.arange(len(texts)), counts)  # (M,)
    inside = np.clip(total[1:] - ends[owner] - over[owner], 0, raw[owner])
    at = begin[owner] + inside  # (M,) byte position behind each token
    data = np.frombuffer(joined.encode(), dtype=np.uint8)
    follows = np.append((data & 0xC0) == 0x80, False)
    chars = _starts(~follows[:-1])  # characters begun before each byte
    done = chars[at] - follows[at]  # one that is still open does not count
    before = np.empty_like(done)
    before[1:] = done[:-1]
    first = offsets[:-1][counts > 0]
    before[first] = chars[begin[:-1][counts > 0]]
    return done - before, exact


def _starts(sizes: NDArray[Any]) -> NDArray[np.int64]:
    found = np.zeros(len(sizes) + 1, dtype=np.int64)
    np.cumsum(sizes, out=found[1:])
    return found


def _flat(lists: Sequence[Sequence[int]]) -> Ids:
    counts = np.fromiter(map(len, lists), dtype=np.int64, count=len(lists))
    return np.fromiter(chain.from_iterable(lists), dtype=np.int64, count=int(counts.sum())), counts


def _threaded(encode: Any, texts: Sequence[str]) -> Ids:
    """Ids and counts by tiktoken's ``encode_to_numpy``; batches go to threads in parts, since each task costs."""

    def part(some: Sequence[str]) -> list[NDArray[np.uint32]]:
        # With nothing disallowed, special tokens in a text are text, as in encode_ordinary.
        return [encode(text, disallowed_special=()) for text in some]

    size = max(-(-len(texts) // (4 * _THREADS)), _PART)
    if len(texts) <= size:
        found = part(texts)
    else:
        with ThreadPoolExecutor(_THREADS) as pool:
            found = list(
                chain.from_iterable(pool.map(part, (texts[at : at + size] for at in range(0, len(texts), size))))
            )
    counts = np.fromiter(map(len, found), dtype=np.int64, count=len(found))
    return np.concatenate([np.zeros(0, dtype=np.uint32), *found]).astype(np.int64), counts


def _is_known(tokenizer: Any) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    return hasattr(backend, "to_str") or hasattr(tokenizer, "_mergeable_ranks")


def _counting(tokenizer: Any) -> Callable[[Sequence[str]], NDArray[np.int64]]:
    encode = getattr(tokenizer, "encode", None)
    if not callable(encode):
        mend = "Pass a fast tokenizer, a tiktoken encoding, a TokenBytes, or an object with encode(text) -> ids."
        raise UnsupportedError("CharCounter", f"{type(tokenizer).__name__} has no method encode", mend)
    try:
        known: Mapping[str, Any] = inspect.signature(encode).parameters
    except (TypeError, ValueError):
        known = {}
    plain = {"add_special_tokens": False} if "add_special_tokens" in known else {}

    def count(texts: Sequence[str]) -> NDArray[np.int64]:
        found: list[Any] = [encode(text, **plain) for text in texts]
        return np.fromiter((len(ids) for ids in found), dtype=np.int64, count=len(texts))

    return count
