"""Which tokens two vocabularies share, and the old pieces of those that are new."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tokenmill.text._row_mixture import RowMixture
from tokenmill.text._token_bytes import TokenBytes

ROLES = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")


@dataclass(frozen=True, slots=True)
class VocabularyMatch:
    """New ids beside old ids.

    Attributes:
        source: (V_new,) int64, the old id with the same bytes, or for special tokens the same content or role; -1.
        new_text: (U,) int64, new ids with bytes that the old vocabulary does not have.
        new_specials: new special tokens without a counterpart.
    """

    source: np.ndarray
    new_text: np.ndarray
    new_specials: tuple[int, ...]


def match_vocabularies(old: Any, new: Any, rows: int) -> VocabularyMatch:
    """Match by bytes, never by how a vocabulary spells them; special tokens match special tokens only.

    Where several old ids have the same bytes, the one of the same name counts, then the one that the old tokenizer
    itself uses, then the lowest.

    Args:
        old, new: tokenizers that `TokenBytes.of` reads.
        rows: of the old embedding; ids beyond it have nothing to give.
    """
    ours, theirs = TokenBytes.of(old), TokenBytes.of(new)
    by_bytes: dict[bytes, list[int]] = {}
    for i, token in enumerate(ours.tokens[:rows]):
        if token is not None:
            by_bytes.setdefault(token, []).append(i)
    source = np.full(len(theirs), -1, dtype=np.int64)
    unmatched: list[int] = []
    for i, token in enumerate(theirs.tokens):
        if token is None:
            continue
        found = by_bytes.get(token)
        if found is None:
            unmatched.append(i)
        else:
            source[i] = found[0] if len(found) == 1 else _choose(old, new, ours, found, i, token)
    old_specials = {content: i for content, i in ours.specials.items() if i < rows}
    by_role = _roles(old, new, old_specials)
    for content, i in theirs.specials.items():
        source[i] = old_specials.get(content, by_role.get(i, -1))
    alone = tuple(i for i in theirs.specials.values() if source[i] < 0)
    return VocabularyMatch(source, np.array(unmatched, dtype=np.int64), alone)


def old_pieces(old: TokenBytes, wanted: Sequence[bytes], rows: int) -> RowMixture:
    """The old pieces of each string of bytes; equal weights.

    A text is cut as the old tokenizer cuts it. What is no text (part of a character), or what the tokenizer changes
    before it cuts, is covered by the longest old tokens from left to right; without any, the row is missing.
    """
    # Of a byte token and a piece with the same bytes, the piece comes later and is the one that has been trained.
    ids = {token: i for i, token in enumerate(old.tokens[:rows]) if token}
    found = [_pieces(old, data, ids, rows) for data in wanted]
    counts = torch.tensor([len(p) for p in found], dtype=torch.int64)
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    indices = torch.tensor([i for pieces in found for i in pieces], dtype=torch.int64)
    return RowMixture(indices, torch.repeat_interleave(1.0 / counts.clamp(min=1), counts), offsets)


def _pieces(old: TokenBytes, data: bytes, ids: dict[bytes, int], rows: int) -> list[int]:
    try:
        cut = old.encode(data.decode("utf-8"))
    except UnicodeDecodeError:
        cut = []
    tokens = [old.tokens[i] if i < rows else None for i in cut]
    if cut and None not in tokens and b"".join(t for t in tokens if t) == data:
        return cut
    longest, at = [], 0
    while at < len(data):
        stop = next((s for s in range(min(len(data), at + old.max_length), at, -1) if data[at:s] in ids), at)
        if stop == at:
            return []
        longest.append(ids[data[at:stop]])
        at = stop
    return longest


def _choose(old: Any, new: Any, ours: TokenBytes, found: list[int], i: int, token: bytes) -> int:
    name = _name(new, i)
    same = [j for j in found if _name(old, j) == name]
    if same:
        return same[0]
    try:
        used = ours.encode(token.decode("utf-8"))
    except UnicodeDecodeError:
        used = []
    return used[0] if len(used) == 1 and used[0] in found else found[0]


def _name(tokenizer: Any, i: int) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    return backend.id_to_token(i) if hasattr(backend, "id_to_token") else i


def _roles(old: Any, new: Any, old_specials: dict[str, int]) -> dict[int, int]:
    """New special id -> old special id of the same role."""
    found: dict[int, int] = {}
    for role in ROLES:
        before, after = getattr(old, role, None), getattr(new, f"{role}_id", None)
        if before in old_specials and after is not None:
            found.setdefault(after, old_specials[before])
    return found
