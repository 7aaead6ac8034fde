"""Helpers of the tests about views: what encoding again says, slowly."""

from __future__ import annotations

import random
from collections.abc import Sequence

from tests.text.test_merges import Rules, model_of
from tokenmill.decode._byte_view import ByteTokenizerView

TOY_MERGES = [("a", "b"), ("ab", "c"), ("c", "c"), ("b", "c"), ("ab", "ab")]


def encodings(view: ByteTokenizerView, texts: Sequence[str]) -> list[list[int]]:
    return [view.token_bytes.encode(text) for text in texts]


def wrong(view: ByteTokenizerView, ids: list[int], candidates: Sequence[int]) -> list[int]:
    """The candidates on which `valid_next` and encoding again disagree; those that end inside a character are left."""
    mask, before = view.valid_next(ids), view.token_bytes.join(ids)
    texts = {}
    for i in candidates:
        try:
            texts[i] = (before + (view.token_bytes[i] or b"")).decode()
        except UnicodeDecodeError:
            continue
    found = encodings(view, list(texts.values()))
    return [i for i, again in zip(texts, found, strict=True) if bool(mask[i]) != (again == [*ids, i])]


def sample(view: ByteTokenizerView, ids: list[int], count: int, seed: int = 0) -> list[int]:
    """Tokens where a rule could go wrong, and random ones: short ones, those in question at the end, byte tokens."""
    rng, tokens, mask = random.Random(seed), view.token_bytes.tokens, view.valid_next(ids).tolist()
    with_bytes = [i for i, token in enumerate(tokens) if token]
    refused = [i for i in with_bytes if not mask[i]]
    short = [i for i in with_bytes if len(tokens[i] or b"") <= 2]
    picked = [rng.sample(group, min(count, len(group))) for group in (with_bytes, refused, short)]
    return sorted({i for group in picked for i in group})


def walk(view: ByteTokenizerView, steps: int, rng: random.Random) -> list[int]:
    ids: list[int] = []
    for _ in range(steps):
        allowed = view.valid_next(ids).nonzero()[:, 0]
        ids.append(int(allowed[rng.randrange(len(allowed))]))
    return ids


def spelled_by(view: ByteTokenizerView, text: bytes) -> list[tuple[int, ...]]:
    """Every token sequence that spells a text."""
    if not text:
        return [()]
    starts = [(i, t) for i, t in enumerate(view.token_bytes.tokens) if t and text.startswith(t)]
    return [(i, *rest) for i, t in starts for rest in spelled_by(view, text[len(t) :])]


def toy(merges: Rules = TOY_MERGES) -> ByteTokenizerView:
    return ByteTokenizerView(model_of(merges)[1])
