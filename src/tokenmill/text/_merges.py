"""Which two tokens BPE leaves side by side: the merges of a whole vocabulary, simulated once.

BPE (lowest rank first, the leftmost on a tie) turns the text of two tokens back into these two exactly when no merge
across their boundary is ever executed. While it is not, each token is built as it would be alone, so it is enough to
know, for every token alone, which symbol stands at its left and right edge and when.

Time is the running maximum of the executed ranks: what is built with a maximum below another's comes first, whether
or not ranks ascend along a derivation. A pair (l, r) across the boundary of tokens a, b is executed when
- both are there at once: l came no later than r went, and r came before l went (on a tie the left token goes first),
- nothing is preferred to it all that time: its rank is below some merge that a executes while l is at its edge, and at
  most some merge that b executes while r is at its edge.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Shorts = NDArray[np.int32]
NEVER = np.iinfo(np.int32).max
"""The time of what does not happen, and the rank of a pair that does not merge."""


class Merges:
    """The merges of a BPE model by pair, in arrays.

    Attributes:
        starts: (V + 1,) int64, the merges whose left symbol is i are ``starts[i]:starts[i + 1]``.
        right, rank, result: (M,) int32, right symbol, rank and merged symbol, by left symbol, then right symbol.
    """

    def __init__(self, size: int, left: Ints, right: Ints, rank: Ints, result: Ints) -> None:
        """Of a pair that is given twice, the last counts."""
        keys = left * size + right
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        last = np.append(keys[1:] != keys[:-1], True) if keys.size else np.zeros(0, dtype=bool)
        order, self._keys = order[last], keys[last]
        self.size = size
        self.right, self.rank, self.result = (x[order].astype(np.int32) for x in (right, rank, result))
        self.starts = np.searchsorted(left[order], np.arange(size + 1))

    def of(self, left: Ints | Shorts, right: Ints | Shorts) -> tuple[Shorts, Shorts]:
        """Rank and result of each pair, `NEVER` and -1 where it does not merge."""
        rank, result = np.full(left.shape, NEVER, dtype=np.int32), np.full(left.shape, -1, dtype=np.int32)
        if self._keys.size == 0 or left.size == 0:
            return rank, result
        wanted = left.astype(np.int64) * self.size + right
        at = np.searchsorted(self._keys, wanted).clip(max=self._keys.size - 1)
        hit = (self._keys[at] == wanted) & (left >= 0) & (right >= 0)
        rank[hit], result[hit] = self.rank[at[hit]], self.result[at[hit]]
        return rank, result

    @classmethod
    def from_model(cls, size: int, vocab: Mapping[str, int], merges: Sequence[Sequence[str]]) -> Merges:
        """The merges of a `tokenizers` BPE model, in the order of their ranks."""
        left = np.fromiter((vocab[a] for a, _ in merges), dtype=np.int64, count=len(merges))
        right = np.fromiter((vocab[b] for _, b in merges), dtype=np.int64, count=len(merges))
        result = np.fromiter((vocab[a + b] for a, b in merges), dtype=np.int64, count=len(merges))
        return cls(size, left, right, np.arange(len(merges), dtype=np.int64), result)

    @classmethod
    def from_ranks(cls, size: int, ranks: Mapping[bytes, int]) -> Merges:
        """tiktoken's merges: any two tokens whose union is a token, with the union's rank."""
        found = [
            (a, b, rank)
            for token, rank in ranks.items()
            for cut in range(1, len(token))
            if (a := ranks.get(token[:cut])) is not None and (b := ranks.get(token[cut:])) is not None
        ]
        left, right, rank = np.array(found, dtype=np.int64).reshape(-1, 3).T
        return cls(size, left, right, rank, rank)


@dataclass(frozen=True, slots=True)
class Edges:
    """Which symbol stands at one edge of a token, and when. All (E,) int32, sorted by `by`'s column.

    Attributes:
        token: the token.
        symbol: the symbol at its edge.
        came, went: running maximum of the ranks executed when it came (-1: there from the start) and when it was
            merged away (`NEVER`: it stays).
        most: the highest rank the token executes from then on until it is merged away (`NEVER`: it stays).
        starts: (V + 1,) int64 into the entries, by the column they are sorted by.
    """

    token: Shorts
    symbol: Shorts
    came: Shorts
    went: Shorts
    most: Shorts
    starts: Ints


class Pairs:
    """Pair validity of a vocabulary.

    Attributes:
        reachable: (V,) bool, BPE turns the token's own symbols into the token.
        right: the right edges, sorted by token.
        left: the left edges, sorted by symbol.
    """

    def __init__(self, merges: Merges, symbols: Shorts, bounds: Ints, tokens: Ints) -> None:
        """Simulate BPE on every token.

        Args:
            merges: of the model.
            symbols: flat, the first symbols of all tokens; -1 where there is none, such tokens are not reachable.
            bounds: (K + 1,) token k has ``symbols[bounds[k]:bounds[k + 1]]``.
            tokens: (K,) the ids.
        """
        self.merges = merges
        self.reachable = np.zeros(merges.size, dtype=bool)
        lengths = np.diff(bounds)
        lengths[np.searchsorted(bounds, np.flatnonzero(symbols < 0), side="right") - 1] = 0
        lefts: list[Shorts] = []
        rights: list[Shorts] = []
        for n in np.unique(lengths[lengths > 0]).tolist():
            rows = np.flatnonzero(lengths == n)
            left, right = self._simulate(symbols[bounds[rows][:, None] + np.arange(n)], tokens[rows])
            lefts.append(left)
            rights.append(right)
        self.left = _edges(lefts, merges.size, by=1)
        self.right = _edges(rights, merges.size, by=0)

    def _simulate(self, symbols: Shorts, tokens: Ints) -> tuple[Shorts, Shorts]:
        """BPE on tokens of one length: symbols (R, n) -> left and right edges (5, E), of the reachable ones."""
        out: tuple[list[Shorts], list[Shorts]] = ([], [])
        rank, _ = self.merges.of(symbols[:, :-1], symbols[:, 1:])  # (R, n - 1)
        clock = np.full(tokens.size, -1, dtype=np.int32)
        came = [clock.copy(), clock.copy()]
        most = [clock.copy(), clock.copy()]
        while symbols.shape[1] > 1:
            at = rank.argmin(axis=1)  # the leftmost of the lowest
            row = np.arange(at.size)
            done = rank[row, at]
            alive = done < NEVER
            if not alive.all():
                symbols, rank, tokens, clock = symbols[alive], rank[alive], tokens[alive], clock[alive]
                at, done = at[alive], done[alive]
                came, most = [c[alive] for c in came], [m[alive] for m in most]
                row = np.arange(at.size)
            clock = np.maximum(clock, done)
            for side, edge, hit in ((0, 0, at == 0), (1, -1, at == symbols.shape[1] - 2)):
                most[side] = np.maximum(most[side], done)
                gone = (tokens[hit], symbols[hit, edge], came[side][hit], clock[hit], most[side][hit])
                out[side].append(np.stack([x.astype(np.int32) for x in gone]))
                came[side] = np.where(hit, clock, came[side])
                most[side] = np.where(hit, np.int32(-1), most[side])
            symbols, rank = self._merge(symbols, rank, at, row)
        whole = symbols[:, 0] == tokens
        self.reachable[tokens[whole]] = True
        never = np.full(int(whole.sum()), NEVER, dtype=np.int32)
        for side in (0, 1):
            last = (tokens[whole], symbols[whole, 0], came[side][whole], never, never)
            out[side].append(np.stack([x.astype(np.int32) for x in last]))
        edges = [np.concatenate(side, axis=1) for side in out]
        left, right = (side[:, self.reachable[side[0]]] for side in edges)
        return left, right

    def _merge(self, symbols: Shorts, rank: Shorts, at: Ints, row: Ints) -> tuple[Shorts, Shorts]:
        """Execute one merge in each row: (R, n), (R, n - 1) -> (R, n - 1), (R, n - 2)."""
        count, n = symbols.shape
        _, result = self.merges.of(symbols[row, at], symbols[row, at + 1])
        symbols = symbols[np.arange(n) != at[:, None] + 1].reshape(count, n - 1)
        symbols[row, at] = result
        rank = rank[np.arange(n - 1) != at[:, None]].reshape(count, n - 2)
        for place, inside in ((at - 1, at > 0), (at, at < n - 2)):
            r, p = row[inside], place[inside]
            rank[r, p] = self.merges.of(symbols[r, p], symbols[r, p + 1])[0]
        return symbols, rank

    def clashing(self, token: int) -> Ints:
        """The tokens b (sorted, unique) that cannot follow `token`: a merge across the boundary is executed."""
        e, merges = self.right, self.merges
        found: list[Ints] = []
        for i in range(e.starts[token], e.starts[token + 1]):
            low, high = merges.starts[e.symbol[i]], merges.starts[e.symbol[i] + 1]
            rank = merges.rank[low:high]
            use = rank < e.most[i]
            found.append(self._against(i, merges.right[low:high][use], rank[use]))
        return np.unique(np.concatenate(found)) if found else np.zeros(0, dtype=np.int64)

    def _against(self, i: int, symbols: Shorts, rank: Shorts) -> Ints:
        """Tokens with one of `symbols` at their left edge while right edge `i` could merge with it at `rank`."""
        b = self.left
        low, high = b.starts[symbols], b.starts[symbols + 1]
        width = high - low
        shift = np.repeat(low - (width.cumsum() - width), width)
        at = np.arange(shift.size) + shift  # the left edges of all these symbols
        rank = np.repeat(rank, width)
        meets = (self.right.came[i] <= b.went[at]) & (b.came[at] < self.right.went[i])
        return b.token[at[meets & (rank <= b.most[at])]].astype(np.int64)

    def fits(self, a: int, b: int) -> bool:
        """Whether BPE leaves these two reachable tokens side by side."""
        e, left = self.right, self.left_of(b)
        for i in range(e.starts[a], e.starts[a + 1]):
            rank, _ = self.merges.of(np.full(left.shape[1], e.symbol[i], dtype=np.int64), left[1])
            meets = (e.came[i] <= left[3]) & (left[2] < e.went[i])
            if bool((meets & (rank < e.most[i]) & (rank <= left[4]) & (rank < NEVER)).any()):
                return False
        return True

    def left_of(self, token: int) -> Shorts:
        """The left edges of one token: (5, n) token, symbol, came, went, most."""
        columns, starts = self._left_by_token
        return columns[:, starts[token] : starts[token + 1]]

    @cached_property
    def _left_by_token(self) -> tuple[Shorts, Ints]:
        b = self.left
        order = np.argsort(b.token, kind="stable")
        columns = np.stack([x[order] for x in (b.token, b.symbol, b.came, b.went, b.most)])
        return columns, np.searchsorted(columns[0], np.arange(self.merges.size + 1))


def _edges(found: list[Shorts], size: int, by: int) -> Edges:
    columns = np.concatenate(found, axis=1) if found else np.zeros((5, 0), dtype=np.int32)
    order = np.argsort(columns[by], kind="stable")
    columns = columns[:, order]
    token, symbol, came, went, most = (np.ascontiguousarray(c) for c in columns)
    return Edges(token, symbol, came, went, most, np.searchsorted(columns[by], np.arange(size + 1)))


def first_symbols(pieces: Sequence[str], table: Shorts) -> tuple[Shorts, Ints]:
    """The characters of all pieces as ids, flat, and the bounds (K + 1,) of each piece.

    `table` (0x110000,) maps code points to ids, -1 for none.
    """
    points = np.frombuffer("".join(pieces).encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    lengths = np.fromiter(map(len, pieces), dtype=np.int64, count=len(pieces))
    return table[points], np.concatenate([np.zeros(1, dtype=np.int64), lengths.cumsum()])
