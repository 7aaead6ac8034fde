"""Toys of the byte-level tests: a small BPE whose valid encodings can all be listed, and a random model over them."""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import tokenizers
import torch
from torch import Tensor

LETTERS = "ab "
MERGES = [("a", "b"), ("ab", "a"), (" ", "a"), ("b", "b"), ("ab", "ab")]
END = 8  # the id behind the 3 letters and the 5 merges
LONGEST = 7


def toy_tokenizer() -> tokenizers.Tokenizer:
    """Three letters, five merges, and an end token that spells nothing."""
    vocab = {letter: i for i, letter in enumerate(LETTERS)} | {a + b: 3 + i for i, (a, b) in enumerate(MERGES)}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, MERGES))
    made.add_special_tokens([tokenizers.AddedToken("<end>", special=True)])
    return made


TOKENS: list[bytes | None] = [*(c.encode() for c in LETTERS), *((a + b).encode() for a, b in MERGES), None]


@cache
def encoding(text: bytes) -> tuple[int, ...]:
    return tuple(toy_cached().encode(text.decode()).ids)


@cache
def toy_cached() -> tokenizers.Tokenizer:
    return toy_tokenizer()


def spelled(ids: Sequence[int]) -> bytes:
    return b"".join(TOKENS[i] or b"" for i in ids)


class ToyContexts:
    """Logits of a random language model over token sequences of at most `LONGEST` bytes.

    Args:
        leak: without it, invalid continuations have no mass at all.
    """

    def __init__(self, seed: int, *, leak: bool) -> None:
        self.seed, self.leak = seed, leak
        self.rows = 0

    def logits(self, ids: tuple[int, ...]) -> Tensor:
        self.rows += 1
        rng = np.random.default_rng(zlib.crc32(repr((self.seed, ids)).encode()))
        row = torch.from_numpy(rng.normal(0, 1.5, size=9))
        left = LONGEST - len(spelled(ids))
        for token, text in enumerate(TOKENS[:END]):
            assert text is not None
            too_long = len(text) > left
            invalid = encoding(spelled((*ids, token))) != (*ids, token)
            if too_long or (invalid and not self.leak):
                row[token] = -math.inf
        return row

    def prefill(self, ids: Sequence[int]) -> tuple[Any, Tensor]:
        assert ids[0] == END, "the hard context comes first"
        inner = tuple(ids[1:])
        return inner, self.logits(inner)

    def extend(self, parents: Sequence[Any], tokens: Sequence[int]) -> tuple[list[Any], Tensor]:
        nodes: list[Any] = []
        for parent, token in zip(parents, tokens, strict=True):
            nodes.append((*(nodes[parent] if isinstance(parent, int) else parent), token))
        return nodes, torch.stack([self.logits(node) for node in nodes])


class SlowView:
    """Validity by encoding again, the slow twin of ByteTokenizerView."""

    def __init__(self) -> None:
        from tokenmill.text import TokenBytes

        self.token_bytes = TokenBytes.from_list(TOKENS, {"<end>": END})
        self.trie = self.token_bytes.trie

    def encode(self, data: bytes) -> list[int]:
        return list(encoding(data))

    def openings(self, data: bytes, whole: Sequence[int] | None = None) -> list[list[int]]:
        return [list(encoding(data))]

    def extend(self, ids: Sequence[int], data: bytes) -> list[int]:
        return list(encoding(spelled(ids) + data))

    def may_end(self, ids: Sequence[int]) -> bool:
        return True

    def valid_next(self, ids: Sequence[int]) -> Tensor:
        ids = tuple(ids)
        return torch.tensor([encoding(spelled((*ids, v))) == (*ids, v) for v in range(END)] + [False])


def strings(longest: int = LONGEST) -> list[bytes]:
    return ["".join(s).encode() for n in range(longest + 1) for s in itertools.product(LETTERS, repeat=n)]


def all_segmentations(text: bytes) -> list[tuple[int, ...]]:
    """Every token sequence that spells the text."""
    if not text:
        return [()]
    return [
        (token, *rest)
        for token, piece in enumerate(TOKENS[:END])
        if piece and text.startswith(piece)
        for rest in all_segmentations(text[len(piece) :])
    ]
