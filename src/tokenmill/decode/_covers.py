"""Covers: the token contexts that a byte string may have come from, and the law of its next byte.

A cover of the bytes x is a token sequence whose last token starts inside x and reaches or passes its end. Covers are
disjoint events, so P(x) is the sum of their probabilities (Phan et al., arXiv 2410.09303, byte-token representation
lemma), and all covers with the same tokens before the last one share one row of the language model. The state of a
byte string is therefore a few contexts, each with a contiguous range of the byte trie: the tokens that begin with what
the context lacks of x. One more byte narrows the ranges, and evaluates the contexts that end exactly there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from torch import Tensor

from tokenmill.decode._byte_view import ByteTokenizerView
from tokenmill.decode._byte_vocabulary import END, OTHER, SLOTS, Law, Vocabulary, token_law
from tokenmill.errors import LimitError
from tokenmill.trace import Trace

_MOST = 1024  # contexts that are evaluated for one byte, without a beam
_CHUNK = 64  # tokens whose whole laws are held at once


class Contexts(Protocol):
    """Where logits come from: contexts that share a cache."""

    def prefill(self, ids: Sequence[int], /) -> tuple[Any, Tensor]: ...
    def extend(self, parents: Sequence[Any], tokens: Sequence[int], /) -> tuple[Sequence[Any], Tensor]: ...


@dataclass(frozen=True, slots=True, eq=False)
class Context:
    """Tokens that spell the first ``end`` bytes of x, and the tokens that may come next without contradicting x.

    Attributes:
        ids: the tokens behind the hard context.
        node: their place in the cache.
        end: bytes of x that they spell.
        logp: log-probability of the tokens, relative to where the state began.
        lo, hi: range in the trie: tokens that begin with the bytes of x behind ``end``.
        law: (hi - lo,) float64, their log-probabilities.
        bytes: (SLOTS,) float64 probabilities of the next byte or control token, while ``end`` is the end of x.
    """

    ids: tuple[int, ...]
    node: Any
    end: int
    logp: float
    lo: int
    hi: int
    law: Tensor
    bytes: Tensor | None = None


@dataclass(slots=True)
class ByteTrace(Trace):
    """Counts of byte-level work.

    Attributes:
        bytes: that were read or produced one by one.
        laws: contexts whose next-token law was summed.
        leaked: mass that the model gave to invalid continuations, summed over those laws.
    """

    bytes: int = 0
    laws: int = 0
    leaked: float = 0.0

    @property
    def leak(self) -> float:
        """Share of the model's mass on continuations that no valid encoding has, a mean over contexts."""
        return self.leaked / self.laws if self.laws else 0.0


@dataclass(frozen=True, slots=True)
class Machine:
    """Everything about a byte law that does not change while bytes come in.

    Attributes:
        contexts: gives logits.
        view: validity of token sequences; ``None`` sums over all of them.
        vocabulary: of the model.
        beam: contexts that are evaluated for a byte at most; ``None`` for all.
        temperature: of tokens.
        trace: counts, filled while the state moves.
    """

    contexts: Contexts
    view: ByteTokenizerView | None
    vocabulary: Vocabulary
    beam: int | None = None
    temperature: float = 1.0
    trace: ByteTrace = field(default_factory=ByteTrace)

    def law(self, ids: Sequence[int], logits: Tensor) -> Law:
        """The law behind a context."""
        mask, end = None, self.vocabulary.end
        if self.view is not None:
            mask = self.view.valid_next(ids).to(logits.device)
            if not self.view.may_end(ids):
                end = end[:0]
        law = token_law(logits, mask, end, self.temperature)
        self.trace.laws += 1
        self.trace.leaked += law.leak
        return law

    def context(self, ids: tuple[int, ...], node: Any, end: int, logp: float, law: Law, rest: bytes) -> Context | None:
        """A context that lacks ``rest`` of x; ``None`` when no token begins with it."""
        v = self.vocabulary
        if rest:
            lo, hi = v.trie.range(rest)
            while lo < hi and v.lengths[lo] == len(rest):
                lo += 1  # these end at the end of x: they are contexts of their own
            if lo == hi:
                return None
            return Context(ids, node, end, logp, lo, hi, law.by_id[v.order[lo:hi]])
        return self.whole(ids, node, end, logp, law)

    def whole(self, ids: tuple[int, ...], node: Any, end: int, logp: float, law: Law) -> Context:
        """A context that ends where x does: any token may come."""
        v = self.vocabulary
        spelled = law.by_id[v.order]
        sums = spelled.new_zeros(SLOTS).index_add_(0, v.first, spelled.exp())
        sums[END] = law.by_id[v.end].exp().sum()
        sums[OTHER] = law.by_id[v.other].exp().sum()
        return Context(ids, node, end, logp, 0, len(v.lengths), spelled, sums)


@dataclass(frozen=True, slots=True, eq=False)
class Covers:
    """The covers of one byte string: a value, so that `push` leaves it as it is.

    Attributes:
        machine: what does not change.
        length: bytes of x.
        contexts: whose ranges are not empty.
    """

    machine: Machine
    length: int
    contexts: tuple[Context, ...]

    @property
    def logp(self) -> float:
        """Log-probability of x as a prefix, relative to where the state began."""
        _, total, shift = self._masses()
        return shift + math.log(total) if total > 0 else -math.inf

    def logprobs(self) -> Tensor:
        """(SLOTS,) float64: log-law of the next byte, of the end of the text, and of any other control token."""
        masses, total, _ = self._masses()
        return (masses / total).log()

    @property
    def straddling(self) -> float:
        """Share of the mass of x on covers that reach past its end: 0 where conditioning on tokens has no bias."""
        v, shift = self.machine.vocabulary, max(c.logp for c in self.contexts)
        open_mass = whole = 0.0
        for c in self.contexts:
            mass = math.exp(c.logp - shift)
            if c.bytes is None:
                mass *= float(v.trie.next_byte_sums(c.law.exp(), c.lo, c.hi, self.length - c.end)[:256].sum())
                open_mass += mass
            whole += mass
        return open_mass / whole

    def _masses(self) -> tuple[Tensor, float, float]:
        """Masses (SLOTS,) by next byte, their sum, and the logarithm that both are scaled by."""
        v = self.machine.vocabulary
        shift = max(c.logp for c in self.contexts)
        masses = self.contexts[0].law.new_zeros(SLOTS)
        for c in self.contexts:
            scale = math.exp(c.logp - shift)
            if c.bytes is not None:
                masses += scale * c.bytes
            else:
                sums = v.trie.next_byte_sums(c.law.exp(), c.lo, c.hi, self.length - c.end)
                masses[:256] += scale * sums[:256]
        return masses, float(masses.sum()), shift

    def push(self, byte: int) -> Covers:
        """The covers of x and one more byte.

        Raises:
            LimitError: not a byte, or one that no cover continues with.
        """
        if not 0 <= byte <= 255:
            raise LimitError("push", "byte", byte, "in [0, 255]")
        v = self.machine.vocabulary
        self.machine.trace.bytes += 1
        kept: list[Context] = []
        ended: list[tuple[Context, int, float]] = []
        for c in self.contexts:
            depth = self.length - c.end
            lo, hi = v.trie.narrow(c.lo, c.hi, depth, byte)
            first = lo
            while first < hi and v.lengths[first] == depth + 1:
                logp = float(c.law[first - c.lo])
                if logp > -math.inf:
                    ended.append((c, int(v.trie.order[first]), c.logp + logp))
                first += 1
            law = c.law[first - c.lo : hi - c.lo]
            if law.numel() and bool((law > -math.inf).any()):
                # A small copy, so that the whole row can go.
                law = law.clone() if law.numel() < c.law.numel() // 4 else law
                kept.append(replace(c, lo=first, hi=hi, law=law, bytes=None))
        if not ended and not kept:
            raise LimitError(
                "push", "byte", f"0x{byte:02x}", f"one with a probability above 0 after {self.length} bytes"
            )
        return replace(self, length=self.length + 1, contexts=(*kept, *self._evaluate(ended)))

    def _evaluate(self, ended: list[tuple[Context, int, float]]) -> list[Context]:
        """Contexts that end at the new byte, the likeliest of them when there is a beam."""
        if not ended:
            return []
        machine = self.machine
        if machine.beam is not None and len(ended) > machine.beam:
            ended = sorted(ended, key=lambda e: -e[2])[: machine.beam]
        if len(ended) > _MOST:
            mend = "Their number doubles with every byte or so: give a beam, or a shorter lookback."
            raise LimitError("ByteLM", "segmentations", len(ended), f"at most {_MOST} for a byte", mend)
        nodes, logits = machine.contexts.extend([c.node for c, _, _ in ended], [token for _, token, _ in ended])
        made = []
        for (before, token, logp), node, row in zip(ended, nodes, logits, strict=True):
            ids = (*before.ids, token)
            made.append(machine.whole(ids, node, self.length + 1, logp, machine.law(ids, row)))
        return made


def start_valid(machine: Machine, view: ByteTokenizerView, x: bytes, hard: Sequence[int], *, scored: bool) -> Covers:
    """The covers of x among valid encodings: those of every prefix of x that one more token can bring past its end.

    Args:
        machine: with the view.
        view: the tokenizer.
        x: any bytes that the tokenizer can begin.
        hard: tokens before x, at least one.
        scored: start from P("") = 1, which costs a law for each token of x; otherwise from the first context.
    """
    full = view.encode(x)
    lefts = _lefts(view, x, full)
    every = [ids for several in lefts.values() for ids in several]
    common = 0
    while all(len(ids) > common for ids in every) and len({ids[common] for ids in every}) == 1:
        common += 1
    root, row = machine.contexts.prefill(hard if scored else [*hard, *full[:common]])
    logp = 0.0
    if scored:
        root, row, logp = _scored(machine, root, row, full[:common])
    return _grow(machine, x, lefts, tuple(full[:common]), root, row, logp)


def _scored(machine: Machine, node: Any, row: Tensor, ids: Sequence[int]) -> tuple[Any, Tensor, float]:
    """Feed tokens behind a node; return the last node, its logits, and the log-probability of the tokens."""
    logp = 0.0
    for start in range(0, len(ids), _CHUNK):
        chunk = list(ids[start : start + _CHUNK])
        nodes, logits = machine.contexts.extend([node, *range(len(chunk) - 1)], chunk)
        for at, (token, before) in enumerate(zip(chunk, [row, *logits[:-1]], strict=True)):
            logp += float(machine.law(tuple(ids[: start + at]), before).by_id[token])
        node, row = nodes[-1], logits[-1]
    return node, row, logp


def _lefts(view: ByteTokenizerView, x: bytes, full: list[int]) -> dict[int, list[tuple[int, ...]]]:
    """Bytes of x -> token sequences that spell them, for every prefix of x after which a token may reach its end."""
    ends = [0]
    for token in full:
        ends.append(ends[-1] + len(view.token_bytes[token] or b""))
    lefts = {len(x): [tuple(ids) for ids in view.openings(x, full)]}
    for end in range(max(0, len(x) - view.token_bytes.max_length), len(x)):
        lo, hi = view.trie.range(x[end:])
        if lo == hi:
            continue
        whole = sum(e <= end for e in ends) - 1  # tokens of `full` that lie before `end`
        try:
            ids = view.extend(full[:whole], x[ends[whole] : end])
            lefts[end] = [tuple(one) for one in view.openings(x[:end], ids)]
        except LimitError:
            continue  # no token sequence ends inside this character
    return lefts


def _grow(
    machine: Machine,
    x: bytes,
    lefts: dict[int, list[tuple[int, ...]]],
    root: tuple[int, ...],
    node: Any,
    row: Tensor,
    logp: float,
) -> Covers:
    """Evaluate the tree of all lefts in one forward behind the tokens that they share."""
    places: dict[tuple[int, ...], Any] = {root: node}
    beyond: list[tuple[int, ...]] = []
    for ids in sorted({ids for several in lefts.values() for ids in several}, key=len):
        for stop in range(len(root) + 1, len(ids) + 1):
            if ids[:stop] not in places:
                places[ids[:stop]] = len(beyond)
                beyond.append(ids[:stop])
    laws, logps = {root: machine.law(root, row)}, {root: logp}
    if beyond:
        grown, rows = machine.contexts.extend([places[ids[:-1]] for ids in beyond], [ids[-1] for ids in beyond])
        for ids, place, logits in zip(beyond, grown, rows, strict=True):
            before = logps[ids[:-1]]
            places[ids] = place
            logps[ids] = before + float(laws[ids[:-1]].by_id[ids[-1]]) if before > -math.inf else before
            if logps[ids] > -math.inf:  # nothing may follow what nothing begins with
                laws[ids] = machine.law(ids, logits)
    found = []
    for end, ids in ((end, ids) for end, several in lefts.items() for ids in several):
        if logps[ids] > -math.inf:
            context = machine.context(ids, places[ids], end, logps[ids], laws[ids], x[end:])
            if context is not None and (context.bytes is not None or bool((context.law > -math.inf).any())):
                found.append(context)
    if not found:
        raise LimitError("ByteLM", "prompt", x[-40:], "text with a probability above 0", "No token sequence covers it.")
    return Covers(machine, len(x), tuple(found))


def start_all(machine: Machine, x: bytes, hard: Sequence[int], ids: Sequence[int], spelled: int) -> Covers:
    """The covers of x among all token sequences that begin with ``ids``, which spell the first bytes of x.

    Args:
        machine: without a view.
        x: the bytes.
        hard: tokens before x.
        ids: fixed tokens.
        spelled: bytes of x that they spell.
    """
    node, row = machine.contexts.prefill([*hard, *ids])
    first = machine.whole(tuple(ids), node, spelled, 0.0, machine.law(tuple(ids), row))
    covers = Covers(machine, spelled, (first,))
    for byte in x[spelled:]:
        covers = covers.push(byte)
    return covers
