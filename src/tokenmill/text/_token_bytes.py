"""A vocabulary as bytes: what every token stands for, exactly, for whatever kind of tokenizer."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from tokenmill.errors import LimitError, UnsupportedError
from tokenmill.text._byte_trie import ByteTrie
from tokenmill.text._encoder import plain_tokenizer, text_encoder
from tokenmill.text._ranks import RankEncoder, check_ranks
from tokenmill.text._structure import WHERE, Structure, read_structure, special_tokens, token_list

_built: weakref.WeakKeyDictionary[Any, tuple[Any, TokenBytes]] = weakref.WeakKeyDictionary()


class TokenBytes:
    """The bytes behind each token id, and an encoder that reads every text as text.

    Attributes:
        tokens: id -> canonical bytes; ``None`` for special tokens, the unknown token and unused ids. Two ids may have
            the same bytes (a byte token and a piece): they stay apart.
        specials: content -> id of special tokens.
        changes: what `encode` does to a text before it is cut, in words; "" when joined bytes give the text back.
            SentencePiece reads U+2581 as a space and may put a space before the text; WordPiece drops blanks.
        lengths: (V,) int32, bytes of each token, 0 for ``None``.
        max_length: the longest token's bytes.
    """

    def __init__(
        self,
        tokens: Sequence[bytes | None],
        specials: Mapping[str, int],
        changes: str = "",
        encoder: Callable[[], Callable[[str], list[int]]] | None = None,
    ) -> None:
        """Use `of`, `from_ranks` or `from_list`. `encoder` makes the encoding function on first use."""
        self.tokens: tuple[bytes | None, ...] = tuple(tokens)
        self.specials = dict(specials)
        self.changes = changes
        self.lengths = np.fromiter((len(t) if t else 0 for t in self.tokens), dtype=np.int32, count=len(self.tokens))
        self.max_length = int(self.lengths.max(initial=0))
        self._make_encoder = encoder
        self.json: str | None = None
        self.rename = False
        self.engine: Any = None  # of tokenmill.text._engines, which needs this module
        self.ranks: RankEncoder | None = None

    @classmethod
    def of(cls, tokenizer: Any) -> TokenBytes:
        """Read the bytes of a tokenizer's tokens; one object a tokenizer, as long as that lives and does not grow.

        Args:
            tokenizer: a transformers tokenizer with a `tokenizers` backend, a `tokenizers.Tokenizer`, a
                ``tiktoken.Encoding``, or a `TokenBytes` (returned as it is).

        Raises:
            UnsupportedError: the structure does not say what the tokens' bytes are.
        """
        if isinstance(tokenizer, TokenBytes):
            return tokenizer
        state = _state(tokenizer)
        try:
            known = _built.get(tokenizer)
        except TypeError:  # neither hashable nor weakly referenced: read it each time
            return _read(tokenizer)
        if known is None or known[0] != state:
            known = (state, _read(tokenizer))
            _built[tokenizer] = known
        return known[1]

    @classmethod
    def from_list(cls, tokens: Sequence[bytes | None], specials: Mapping[str, int] | None = None) -> TokenBytes:
        """A bare vocabulary; it cannot `encode`."""
        _check_specials("TokenBytes.from_list", tokens, specials or {})
        return cls(tokens, specials or {})

    @classmethod
    def from_ranks(
        cls, ranks: Mapping[bytes, int], specials: Mapping[str, int] | None = None, pattern: str | None = None
    ) -> TokenBytes:
        """A tiktoken-like vocabulary: merge ranks that are the ids, and the pattern that cuts text first.

        Args:
            ranks: token bytes -> id; lower ids merge first.
            specials: content -> id, never found in a text by `encode`.
            pattern: a regular expression of the package `regex`; None cuts nothing.

        Raises:
            UnsupportedError: ranks that repeat or are negative.
        """
        check_ranks(ranks)
        specials = specials or {}
        tokens: list[bytes | None] = [None] * (1 + max([*ranks.values(), *specials.values()]))
        for token, i in ranks.items():
            tokens[i] = token
        _check_specials("TokenBytes.from_ranks", tokens, specials)
        made = cls(tokens, specials)
        made.ranks = RankEncoder(ranks, pattern)
        return made

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, token: int) -> bytes | None:
        return self.tokens[token]

    def join(self, ids: Iterable[int]) -> bytes:
        """The bytes of a sequence of tokens.

        Raises:
            LimitError: an id outside the vocabulary, or one that stands for no text.
        """
        tokens, found = self.tokens, []
        for place, i in enumerate(ids):
            token = tokens[i] if 0 <= i < len(tokens) else None
            if token is None:
                mend = "Take special tokens out first."
                raise LimitError("TokenBytes.join", f"ids[{place}]", int(i), "a token with bytes", mend)
            found.append(token)
        return b"".join(found)

    def encode(self, text: str) -> list[int]:
        """The tokens of a text: no special tokens are added, and "<eos>" in the text is text.

        Raises:
            UnsupportedError: a bare vocabulary.
        """
        return self._encoder(text)

    @cached_property
    def trie(self) -> ByteTrie:
        """The tokens sorted by bytes, built on first use."""
        return ByteTrie(self.tokens)

    @cached_property
    def _encoder(self) -> Callable[[str], list[int]]:
        if self.ranks is not None:
            return self.ranks
        if self._make_encoder is None:
            mend = "Build it with TokenBytes.of(tokenizer) or from_ranks."
            raise UnsupportedError("TokenBytes.encode", "a bare vocabulary has no encoder", mend)
        return self._make_encoder()


def _check_specials(where: str, tokens: Sequence[bytes | None], specials: Mapping[str, int]) -> None:
    for content, i in specials.items():
        if not 0 <= i < len(tokens) or tokens[i] is not None:
            raise LimitError(where, f"specials[{content!r}]", i, "an id of the vocabulary whose bytes are None")


def _state(tokenizer: Any) -> tuple[int, tuple[int, ...]]:
    """What changes when somebody adds tokens to a tokenizer that was read before."""
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    size = backend.get_vocab_size() if hasattr(backend, "get_vocab_size") else 0
    return size, tuple(getattr(tokenizer, "all_special_ids", ()))


def _read(tokenizer: Any) -> TokenBytes:
    if hasattr(tokenizer, "_mergeable_ranks") and hasattr(tokenizer, "encode_ordinary"):
        return TokenBytes.from_ranks(tokenizer._mergeable_ranks, tokenizer._special_tokens, tokenizer._pat_str)
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not hasattr(backend, "to_str"):
        mend = "Pass a fast tokenizer, TokenBytes.from_ranks(ranks) or TokenBytes.from_list(tokens)."
        raise UnsupportedError(WHERE, f"{type(tokenizer).__name__} has no `tokenizers` backend to read", mend)
    text: str = backend.to_str()
    structure = read_structure(text)
    specials = special_tokens(structure)
    named = getattr(tokenizer, "all_special_tokens", ())
    for content in named:
        i = backend.token_to_id(content)
        if i is not None:
            specials.setdefault(content, i)
    tokens = token_list(structure, specials)
    rename = _could_find(structure, specials)

    def encoder() -> Callable[[str], list[int]]:
        return text_encoder(*plain_tokenizer(text, specials, rename=rename))

    found = TokenBytes(tokens, specials, "; ".join(structure.changes), encoder)
    found.json, found.rename = text, rename
    return found


def _could_find(structure: Structure, specials: Mapping[str, int]) -> bool:
    """Whether the model itself, with no added tokens, might produce a special token from a text."""
    model = structure.data["model"]
    if model["type"] != "BPE":
        return bool(specials)
    if model.get("ignore_merges"):
        return any(content in model["vocab"] for content in specials)
    single = any(len(content) == 1 for content in specials)
    return single or not specials.keys().isdisjoint(a + b for a, b in model["merges"])
