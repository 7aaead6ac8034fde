"""A tokenizer seen from its bytes: the canonical tokens of bytes, and which token sequences are canonical at all."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenmill.errors import LimitError
from tokenmill.text._byte_trie import ByteTrie
from tokenmill.text._engines import engine_of
from tokenmill.text._token_bytes import TokenBytes
from tokenmill.text._unsplit import Unsplit
from tokenmill.text._utf8 import split

WHERE = "ByteTokenizerView"


class ByteTokenizerView:
    """Canonical encoding of bytes, and the validity of token prefixes.

    A token sequence is *valid* when encoding its bytes gives it back; a model was trained on valid sequences only, so
    the mass of a byte prefix sits on the valid sequences that cover it (Phan et al., arXiv 2410.09303, section 3).
    Special tokens are boundaries, not text: pass the ids between them.

    - Where nothing cuts the text before BPE (Gemma, Llama 2, Mistral), what may follow depends on the last token, on
      added tokens that the end of the text begins, and on byte tokens. One mask of Gemma's 262,144 tokens is a
      handful of gathers, and every prefix of a valid sequence is valid (`prefix_closed`).
    - Elsewhere (byte-level BPE behind a regular expression, tiktoken, Unigram) a mask encodes every token behind the
      last words again: fine for thousands of tokens, a second or so for hundreds of thousands. Masks are remembered
      by the last words. Such tokenizers are not always prefix-closed: "a  " is cut as "a", two spaces, while "a  x"
      is cut as "a", space, " x", so a sequence can become valid again.

    A tokenizer that puts a space before the text (Llama 2, Mistral) is seen without that step: the space is part of
    the bytes, ``view.encode(b" Hello") == tokenizer.encode("Hello")``.

    Attributes:
        token_bytes: the vocabulary; see `tokenmill.text.TokenBytes`.
        prefix_closed: every prefix of a valid sequence is known to be valid.
    """

    def __init__(self, tokenizer: Any) -> None:
        """Read a tokenizer once; the large tables are built on first use.

        Args:
            tokenizer: whatever `TokenBytes.of` takes, with an encoder.

        Raises:
            UnsupportedError: its tokens have no known bytes, or it changes text (lower case, NFKC, dropped blanks).
        """
        self.token_bytes = TokenBytes.of(tokenizer)
        self._engine, self._needs_space = engine_of(self.token_bytes)
        self.prefix_closed = isinstance(self._engine, Unsplit)

    @cached_property
    def trie(self) -> ByteTrie:
        """The vocabulary's trie."""
        return self.token_bytes.trie

    def __len__(self) -> int:
        return len(self.token_bytes)

    def encode(self, data: bytes) -> list[int]:
        """The canonical tokens of bytes that may end inside a character.

        The bytes of an unfinished character become byte tokens (SentencePiece), or are merged as raw bytes in the
        piece where most characters that begin like this would be (byte-level BPE).

        Raises:
            LimitError: bytes that no text begins with; an unfinished or unknown character and no byte fallback; text
                that the tokenizer does not give back (U+2581 where it stands for a space, decomposed letters under
                NFC); no space at the start where the tokenizer puts one.
        """
        return self._encode(data)

    def _encode(self, data: bytes) -> list[int]:
        text, rest = split(WHERE, data)
        ids = self._engine.encode(text, rest)
        self._check(ids, data)
        return ids

    def _check(self, ids: Sequence[int], data: bytes) -> None:
        tokens, place = self.token_bytes.tokens, 0
        for i in ids:
            token = tokens[i]
            if not token or not data.startswith(token, place):
                near = data[place : place + 12].decode(errors="replace")
                limit = "text that this tokenizer gives back"
                mend = (
                    "No token stands for it; it has no byte fallback."
                    if not token
                    else f"It {self.token_bytes.changes}; change the text first."
                )
                raise LimitError(WHERE, "data", f"{near!r} at position {place}", limit, mend)
            place += len(token)
        if place != len(data):
            raise LimitError(WHERE, "data", f"{data[place : place + 12]!r} at position {place}", "text with tokens")
        if self._needs_space and ids and not self._may_start(ids[0]):
            mend = "This tokenizer puts a space before the text; write it yourself."
            raise LimitError(WHERE, "data", f"{data[:12]!r}", "a text that starts with a space", mend)

    def _may_start(self, token: int) -> bool:
        data = self.token_bytes[token]
        return bool(data) and (data[:1] == b" " or token in self._cut_out)

    @cached_property
    def _cut_out(self) -> frozenset[int]:
        engine = self._engine
        return engine.vocabulary.added.raw.ids if isinstance(engine, Unsplit) else frozenset()

    def extend(self, ids: Sequence[int], data: bytes) -> list[int]:
        """Canonical tokens of the bytes of canonical `ids` followed by `data`; encodes only the last words again.

        Raises:
            LimitError: see `encode`; ids without bytes.
        """
        found = self._engine.extend(ids, data) if ids else None
        return self._encode(self.token_bytes.join(ids) + data) if found is None else found

    def openings(self, data: bytes, whole: Sequence[int] | None = None) -> list[list[int]]:
        """Every token sequence that spells `data` and begins the encoding of some text.

        One where the view is `prefix_closed`. Elsewhere a second one can stand for blanks at the end, which are cut
        in another way when something follows.

        Args:
            data: bytes that may end inside a character.
            whole: their encoding, where it is known.

        Raises:
            LimitError: see `encode`.
        """
        ids = self.encode(data) if whole is None else list(whole)
        engine = self._engine
        return [ids] if isinstance(engine, Unsplit) or not data else engine.openings(data, ids)

    def is_valid(self, ids: Sequence[int]) -> bool:
        """Whether these are the canonical tokens of their own bytes. Not so with special tokens among them."""
        tokens = self.token_bytes.tokens
        if not all(0 <= i < len(tokens) and tokens[i] for i in ids):
            return False
        try:
            same = self.encode(self.token_bytes.join(ids)) == list(ids)
        except LimitError:
            return False
        engine = self._engine
        return same and (not isinstance(engine, Unsplit) or engine.completable(ids))

    def may_end(self, ids: Sequence[int]) -> bool:
        """Whether a text may end behind tokens that begin the encoding of some text.

        Not inside a character, and not behind blanks that are cut like this only when something follows.
        """
        return not ids or self._engine.may_end(ids)

    def valid_next(self, ids: Sequence[int]) -> Tensor:
        """The tokens that may follow.

        Args:
            ids: tokens that begin the encoding of some text; none: the start of a text.

        Returns:
            (V,) bool: v such that ``ids + [v]`` begins the encoding of some text. False for special tokens.
        """
        mask = self._engine.valid_next(ids)
        if self._needs_space and not ids:
            mask = mask & self._starts
        return torch.from_numpy(mask)

    @cached_property
    def _starts(self) -> NDArray[np.bool_]:
        """(V,) bool: the tokens that a text with a space put before it starts with."""
        return np.fromiter((self._may_start(i) for i in range(len(self))), dtype=bool, count=len(self))

    def first_byte_matrix(self, stop_ids: Sequence[Sequence[int]] = ()) -> Tensor:
        """Where a token's mass goes at once: to its first byte, or to a stop.

        Args:
            stop_ids: groups of special ids (end of text, end of turn); each group is one row.

        Returns:
            sparse COO (256 + len(stop_ids), V) float64 of zeros and ones.

        Raises:
            LimitError: a stop that is no id, or that stands for text.
        """
        rows, columns = [], []
        for slot, group in enumerate(stop_ids):
            for i in group:
                if not 0 <= i < len(self) or self.token_bytes[i]:
                    raise LimitError("first_byte_matrix", f"stop_ids[{slot}]", i, "an id without bytes")
                rows.append(256 + slot)
                columns.append(i)
        first = self.trie.bytes[self.trie.offsets[:-1]].long()  # (M,)
        row = torch.cat([first, torch.tensor(rows, dtype=torch.long)])
        column = torch.cat([self.trie.order, torch.tensor(columns, dtype=torch.long)])
        size = (256 + len(stop_ids), len(self))
        ones = torch.ones(row.shape[0], dtype=torch.float64)
        return torch.sparse_coo_tensor(torch.stack([row, column]), ones, size, check_invariants=False).coalesce()
