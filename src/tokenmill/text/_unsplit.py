"""BPE over text that no pre-tokenizer cuts (Gemma, Llama 2, Mistral): validity by pairs of tokens.

What may follow depends on the last token alone, save for added tokens, which are cut out of the text first, and for
byte tokens, which come only as complete spellings of characters that the vocabulary lacks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tokenmill.text._added import Beginnings, CutOut
from tokenmill.text._byte_trie import ByteTrie
from tokenmill.text._kept_masks import KeptMasks
from tokenmill.text._merges import Pairs
from tokenmill.text._utf8 import Continuations, Spelled, no_fallback, split, state_after

Bools = NDArray[np.bool_]
WHERE = "ByteTokenizerView"
KEPT = 4096
"""Masks that are remembered, of V / 8 bytes each."""
BACK = 8
"""Tokens that `extend` encodes again at first."""


@dataclass(frozen=True)
class Vocabulary:
    """What the engine knows of a tokenizer.

    Attributes:
        tokens: id -> bytes or None.
        trie: of these tokens.
        pairs: the simulated merges.
        added: added tokens, cut out before BPE.
        byte_ids: byte -> its byte token, {} when the vocabulary has single bytes as ordinary symbols.
        spelled: the characters that byte tokens spell; None without byte tokens.
        encode: text -> ids.
        partial: bytes that end inside a character -> ids, where single bytes are ordinary symbols; else None.
    """

    tokens: Sequence[bytes | None]
    trie: ByteTrie
    pairs: Pairs
    added: CutOut
    byte_ids: Mapping[int, int]
    spelled: Spelled | None
    encode: Callable[[str], list[int]]
    partial: Callable[[bytes], list[int]] | None


@dataclass(frozen=True, slots=True)
class Tail:
    """All that the end of a token sequence says about what may follow; equal tails allow equal tokens.

    Attributes:
        last: the last token when merges could reach across it, else -1.
        partial: bytes of an unfinished character at the end.
        begun: beginnings of added tokens at the end, see `CutOut.begun`.
    """

    last: int
    partial: bytes
    begun: Beginnings


class Unsplit:
    """The engine. Equal tails share one mask, kept as bits."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        v = self.vocabulary = vocabulary
        self._byte_of = {i: byte for byte, i in v.byte_ids.items()}
        self._never = v.added.inside()  # (V,) what added tokens would be cut out of
        self._plain = v.pairs.reachable.copy()  # (V,) what BPE itself makes
        self._plain[[i for i, token in enumerate(v.tokens) if not token]] = False
        self._plain[[*self._byte_of, *v.added.ids]] = False
        self._continuations = Continuations(v.trie)
        self._masks = KeptMasks(len(v.tokens), kept=KEPT)

    def encode(self, text: str, rest: bytes) -> list[int]:
        """The canonical tokens of a text, then those of `rest`, the beginning of a character."""
        v = self.vocabulary
        if not rest:
            return v.encode(text)
        if v.byte_ids:
            return v.encode(text) + [v.byte_ids[b] for b in rest]
        if v.partial is None:
            raise no_fallback(rest)
        return v.partial(text.encode() + rest)

    def completable(self, ids: Sequence[int]) -> bool:
        """Whether byte tokens at the end can still spell a character that the vocabulary lacks."""
        partial, spelled = self._partial(ids), self.vocabulary.spelled
        return not partial or spelled is None or spelled.starts(partial)

    def valid_next(self, ids: Sequence[int]) -> Bools:
        """(V,) bool: the tokens that may follow canonical `ids`."""
        tail = self.tail(ids)
        return self._masks.get(tail, lambda: self._mask(tail))

    def may_end(self, ids: Sequence[int]) -> bool:
        """See `ByteTokenizerView.may_end`."""
        return not self._partial(ids)

    def extend(self, ids: Sequence[int], data: bytes) -> list[int] | None:
        """Canonical tokens of the text of `ids` and of `data` behind it, or None where the whole must be encoded.

        Only the last tokens are encoded again. That is right when the first new token may follow what is kept, since
        a sequence in which every token may follow is the canonical one.
        """
        v, back = self.vocabulary, BACK
        while back < len(ids):
            cut = len(ids) - back
            while cut and 0x80 <= (v.tokens[ids[cut]] or b"\0")[0] < 0xC0:
                cut -= 1  # not inside a character
            again = b"".join(v.tokens[i] or b"" for i in ids[cut:]) + data
            new = self.encode(*split(WHERE, again))
            if cut and b"".join(v.tokens[i] or b"" for i in new) == again and self._joins(ids[:cut], new):
                return [*ids[:cut], *new]
            back *= 4
        return None

    def _joins(self, ids: Sequence[int], new: Sequence[int]) -> bool:
        """Whether canonical `new` may stand behind canonical `ids`."""
        v = self.vocabulary
        reach = v.added.reach
        last = [*ids[-max(reach, 1) :]]
        if new and self._plain[last[-1]] and self._plain[new[0]] and not v.pairs.fits(last[-1], new[0]):
            return False
        for token in new:
            if reach <= 0:
                break
            if v.added.finishes(token, v.added.begun(last, v.tokens)):
                return False
            last.append(token)
            reach -= len(v.tokens[token] or b"")
        return True

    def tail(self, ids: Sequence[int]) -> Tail:
        """What the last tokens say; looks no further back than the longest added token."""
        v = self.vocabulary
        last = ids[-1] if ids else -1
        merges = last >= 0 and bool(self._plain[last])
        return Tail(last if merges else -1, self._partial(ids), v.added.begun(ids, v.tokens))

    def _partial(self, ids: Sequence[int]) -> bytes:
        """The bytes of an unfinished character at the end of the text."""
        end, k = b"", len(ids)
        while k and len(end) < 3:
            k -= 1
            if self._byte_of and ids[k] not in self._byte_of:
                break
            end = (self.vocabulary.tokens[ids[k]] or b"") + end
        start = next((k for k in range(1, min(len(end), 3) + 1) if end[-k] >= 0xC0), 0)
        return end[-start:] if start and state_after(end[-start:]) else b""

    def _mask(self, tail: Tail) -> Bools:
        v = self.vocabulary
        if tail.partial and v.spelled is not None:
            mask = np.zeros(len(v.tokens), dtype=bool)
            allowed = [i for b, i in v.byte_ids.items() if v.spelled.starts(tail.partial + bytes([b]))]
            mask[allowed] = True
        else:
            mask = self._plain.copy()
            if tail.last >= 0:
                mask[v.pairs.clashing(tail.last)] = False  # no two plain tokens that a merge would join
            if v.spelled is not None:
                mask[[i for b, i in v.byte_ids.items() if v.spelled.starts(bytes([b]))]] = True
            mask &= ~self._never
            mask |= v.added.found
            if not v.byte_ids:
                mask &= self._continuations.after(state_after(tail.partial))
        v.added.block(mask, tail.begun)
        return mask
