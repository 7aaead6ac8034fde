"""What may follow behind a pre-tokenizer, for a whole vocabulary at once: by classes of characters, then by pairs.

A candidate decides where the end of the text is cut. Candidates whose characters the pre-tokenizer cannot tell apart
decide alike, so one of each class is cut, thousands instead of hundreds of thousands. Inside a piece, pairs of tokens
say the rest.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from tokenmill.text._added import CutOut
from tokenmill.text._byte_trie import END, ByteTrie
from tokenmill.text._classes import CharacterClasses, Looks, Probe
from tokenmill.text._merges import Pairs
from tokenmill.text._utf8 import Continuations, likely_character, split

Bools = NDArray[np.bool_]
AHEAD = ("x", "1", "!")
"""What may follow blanks and move where they are cut: a letter, a digit, a sign."""
BLANKS = b" \t\n\r\x0b\x0c"
_INVALID, _ALONE = -2, -1  # else the place of a beginning that the candidate goes on from


class Cuts(Protocol):
    """A pre-tokenizer and the BPE behind it."""

    def ends(self, text: str) -> list[int]:
        """Where the pieces of a text end, in characters; [] when they do not tile it."""
        ...

    def piece(self, data: bytes) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class Cutting:
    """What is known of a tokenizer that cuts text before BPE.

    Attributes:
        cuts: its pre-tokenizer.
        looks: what that looks at.
        probe: asks it for properties of characters.
        added: added tokens.
        pairs: simulates its merges.
        whole: a piece that is a token is taken whole, whatever the merges say.
        nfc: the text is composed first.
    """

    cuts: Cuts
    looks: Looks
    probe: Probe
    added: CutOut
    pairs: Callable[[], Pairs]
    whole: bool
    nfc: bool


class CutMasks:
    """Masks behind text that ends with a whole character."""

    def __init__(self, tokens: Sequence[bytes | None], trie: ByteTrie, cutting: Cutting, candidates: Bools) -> None:
        """`candidates` (V,): the tokens that are not special."""
        self._tokens, self._trie, self._cutting = tokens, trie, cutting
        allowed = candidates & Continuations(trie).after(0) & ~cutting.added.inside()
        allowed[list(cutting.added.ids)] = False
        self._ids = np.flatnonzero(allowed)  # (N,) candidates
        self._texts = [_whole(tokens[i] or b"") for i in self._ids.tolist()]
        self._groups: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}

    @cached_property
    def _pairs(self) -> Pairs:
        return self._cutting.pairs()

    @cached_property
    def _classes(self) -> CharacterClasses:
        return CharacterClasses(self._cutting.looks, self._cutting.probe, self._texts)

    @cached_property
    def _odd(self) -> NDArray[np.int64]:
        """Candidates that may not be composed, alone or with the character before them: they are encoded again."""
        if not self._cutting.nfc:
            return np.zeros(0, dtype=np.int64)
        joining = _joining()
        odd = [not unicodedata.is_normalized("NFC", t) or t[0] in joining for t in self._texts]
        return self._ids[np.array(odd, dtype=bool)]

    @cached_property
    def _unmade(self) -> list[bytes]:
        """Tokens that merges do not make; they are only found where a piece is taken whole."""
        if not self._cutting.whole:
            return []
        return [self._tokens[i] or b"" for i in self._ids[~self._pairs.reachable[self._ids]].tolist()]

    def mask(self, tail: Sequence[int], again: Callable[[Sequence[int], Sequence[int]], list[int]]) -> Bools:
        """(V,) bool: the tokens that may follow canonical `tail`; `again` says it for single candidates."""
        added = self._cutting.added
        start = next((k for k in range(len(tail), 0, -1) if tail[k - 1] in added.ids), 0)
        section = tail[start:]
        text = b"".join(self._tokens[i] or b"" for i in section).decode()
        made = self._pairs.reachable[self._ids]
        fits = made.copy()
        if section:
            fits &= ~np.isin(self._ids, self._pairs.clashing(section[-1]), assume_unique=True)
        mask = np.zeros(len(self._tokens), dtype=bool)
        joined: list[bytes] = []
        known: dict[tuple[int, ...], int] = {}
        for ahead in ("", *AHEAD):
            outcome = self._outcomes(section, text, ahead, known, joined)  # (N,)
            good = (outcome == _ALONE) & (made | self._cutting.whole) | (outcome >= 0) & fits
            for place, begun in enumerate(joined):
                good &= ~np.isin(self._ids, self._taken_whole(begun)) | (outcome != place)
            mask[self._ids[good]] = True
        if self._odd.size:
            mask[self._odd] = False
            mask[again(tail, self._odd.tolist())] = True
        if not section or self._outcome(section, text, tuple(self._cutting.cuts.ends(text)), joined) == _ALONE:
            mask |= added.found
        added.block(mask, added.begun(tail, self._tokens))
        return mask

    def _outcomes(
        self, section: Sequence[int], text: str, ahead: str, known: dict[tuple[int, ...], int], joined: list[bytes]
    ) -> NDArray[np.int64]:
        """(N,) what becomes of the end of the text with each candidate, and with `ahead` behind those that end blank.

        `known` remembers places of cuts, `joined` the beginnings of last pieces.
        """
        lead = self._classes.lead(text)
        if lead not in self._groups:
            self._groups[lead] = self._classes.groups(lead)
        group, first = self._groups[lead]
        outcome = np.full(first.size, _INVALID, dtype=np.int64)
        for g, i in enumerate(first.tolist()):
            candidate = self._texts[i]
            if ahead and not _ends_blank(candidate):
                continue
            stop = len(text) + len(candidate)
            ends = self._cutting.cuts.ends(text + candidate + ahead)
            inner = tuple(end for end in ends if end < stop)
            if not ends or (inner and inner[-1] > len(text)):
                continue  # the candidate itself is cut
            if inner not in known:
                known[inner] = self._outcome(section, text, inner, joined)
            outcome[g] = known[inner]
        return outcome[group]

    def _outcome(self, section: Sequence[int], text: str, inner: tuple[int, ...], joined: list[bytes]) -> int:
        """What becomes of the tokens when the text is cut at these places (in characters)."""
        token_at, place = {0: 0}, 0
        for k, i in enumerate(section, 1):
            place += len(self._tokens[i] or b"")
            token_at[place] = k
        data, before = text.encode(), 0
        for end in (len(text[:e].encode()) for e in inner):
            if end not in token_at or self._cutting.cuts.piece(data[before:end]) != tuple(
                section[token_at[before] : token_at[end]]
            ):
                return _INVALID
            before = end
        if before == len(data):
            return _ALONE
        inside = section[token_at[before] :]
        pairs = self._pairs
        apart = all(pairs.fits(a, b) for a, b in pairwise(inside))
        if not apart or not pairs.reachable[list(inside)].all():
            return _INVALID
        joined.append(data[before:])
        return len(joined) - 1

    def _taken_whole(self, begun: bytes) -> NDArray[np.int64]:
        """The tokens that make a piece a token, which is then taken whole, when they go on from its beginning."""
        found = []
        for token in self._unmade:
            if token.startswith(begun) and len(token) > len(begun):
                rest = token[len(begun) :]
                low, high = self._trie.range(rest)
                equal = int((self._trie.byte_at(low, high, len(rest)) == END).sum())
                found += self._trie.order[low : low + equal].tolist()
        return np.array(found, dtype=np.int64)


def _ends_blank(text: str) -> bool:
    return text[-1] in BLANKS.decode()


def _whole(token: bytes) -> str:
    """A token as text; a likely character where it ends inside one."""
    head, rest = split("CutMasks", token)
    return head + likely_character(rest) if rest else head


def _joining() -> frozenset[str]:
    """The characters that may compose with the one before them, or change places with it."""
    found = {chr(p) for p in range(0x110000) if unicodedata.combining(chr(p))}
    found |= {chr(p) for p in (*range(0x1161, 0x1176), *range(0x11A8, 0x11C3))}  # Hangul vowels and final consonants
    for p in range(0x110000):
        parts = unicodedata.decomposition(chr(p)).split()
        if len(parts) == 2 and not parts[0].startswith("<"):
            found.add(chr(int(parts[1], 16)))
    return frozenset(found)
