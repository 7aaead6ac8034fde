"""Writing with a vocabulary of up to a million tokens; their rows are predicted and lie in a search index."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from tokenmill.errors import LimitError, MissingExtraError, unknown_name
from tokenmill.text._batch_merging import Token
from tokenmill.text._token_embedders import TokenEmbedder, tables

if TYPE_CHECKING:
    from tokenmill.text.dynamic_tokenization import DynamicBPE

Search = Literal["exact", "pq", "ivf", "hnsw"]
_LARGEST = 1_000_000
_TRAINED = 60_000  # rows that the steps of "pq" are learnt from
_SHARD = 10_000  # rows below which a part of their own does not pay


@dataclass(frozen=True)
class LargeVocabulary:
    """The base tokens, each under its own id, and behind them tokens that join several.

    Attributes:
        pieces: id -> the base tokens that it stands for.
    """

    pieces: tuple[Token, ...]
    _ids: dict[Token, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if len(self.pieces) > _LARGEST:
            raise LimitError("LargeVocabulary", "tokens", len(self.pieces), f"at most {_LARGEST:,}")
        found = {token: i for i, token in enumerate(self.pieces)}
        if len(found) != len(self.pieces) or () in found:
            raise LimitError("LargeVocabulary", "pieces", "a token twice, or one of nothing", "different tokens")
        object.__setattr__(self, "_ids", found)

    def __len__(self) -> int:
        return len(self.pieces)

    @classmethod
    def from_texts(
        cls, bpe: DynamicBPE, texts: Iterable[str], size: int, *, base: int, longest: int = 3
    ) -> LargeVocabulary:
        """The base tokens and the runs of units that save most tokens in some texts.

        Args:
            bpe: says what a unit is; a token is one unit or up to `longest` that follow each other.
            texts: the field of use.
            size: tokens of the whole vocabulary at most.
            base: V, rows of the model's matrix.
            longest: units of a token at most.

        Raises:
            LimitError: a size below V or above a million, or `longest` below 1.
        """
        if not base <= size <= _LARGEST:
            raise LimitError("LargeVocabulary", "size", size, f"from V={base:,} to {_LARGEST:,}")
        if longest < 1:
            raise LimitError("LargeVocabulary", "longest", longest, "at least 1")
        counts: Counter[Token] = Counter()
        for units in bpe.units(texts):
            for n in range(1, longest + 1):
                counts.update(sum(units[i : i + n], ()) for i in range(len(units) - n + 1))
        saved = {token: count * (len(token) - 1) for token, count in counts.items() if len(token) > 1}
        best = sorted(saved, key=lambda token: (-saved[token], token))[: size - base]
        return cls((*((i,) for i in range(base)), *best))

    def encode(self, ids: Sequence[int]) -> list[int]:
        """Base tokens as tokens of this vocabulary: the longest that fits, from left to right."""
        longest = self._longest
        found, at = [], 0
        while at < len(ids):
            for n in range(min(longest, len(ids) - at), 0, -1):
                token = self._ids.get(tuple(ids[at : at + n]))
                if token is not None:
                    found.append(token)
                    at += n
                    break
            else:
                raise LimitError("LargeVocabulary.encode", f"ids[{at}]", ids[at], f"in [0, V={len(self.pieces)})")
        return found

    def decode(self, tokens: Iterable[int]) -> list[int]:
        """The base tokens again."""
        return [i for token in tokens for i in self.pieces[token]]

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self.pieces), default=1)


@dataclass(frozen=True, slots=True)
class LargeOutput:
    """What `LargeVocabHead.generate` wrote.

    Attributes:
        tokens: for each prompt the ids of the large vocabulary.
        ids: the same as base tokens.
        steps: passes of the model behind the prompt.
    """

    tokens: list[list[int]]
    ids: list[list[int]]
    steps: int


class LargeVocabHead:
    """Rows of a large vocabulary, and the search for those with the largest inner product with a hidden state.

    "pq" reads every row as one of sixteen steps in each dimension (four bits), a part of the rows on each thread, and
    scores the best `depth` exactly. For the cells and the graph, inner products become distances on a sphere: each row
    e gets the coordinate sqrt(M^2 - |e|^2) and a query 0, and the nearest row is the one with the highest logit (the
    paper's index compares cosines, whose best may be another). Measured on
    Gemma's hidden states, cells miss the best one often.

    Args:
        model: a causal language model of transformers; nothing in it is changed.
        vocabulary: its base tokens must be the model's rows.
        embedder: predicts the rows of joined tokens.
        search: exact; or faiss: pq (four bits a dimension), ivf (cells), hnsw (a graph), which need the extra ``text``.
        depth: rows that pq finds and that are scored exactly.
        nlist: cells of ivf; None for four times the root of the vocabulary.
        nprobe: cells that are searched.
        ef: width of the search in hnsw.
        links: of a node in hnsw.
        chunk: rows that are predicted at once (paper: 5,000).
        seed: of the index.

    Attributes:
        index: of faiss, whose ``nprobe`` or ``hnsw.efSearch`` may be set anew; None for exact.

    Raises:
        LimitError: a value outside its limit, or a vocabulary whose base is not the model's.
        MissingExtraError: faiss is needed and not installed.
    """

    def __init__(
        self, model: Any, vocabulary: LargeVocabulary, embedder: TokenEmbedder, *, search: Search = "pq",
        depth: int = 8192,
        nlist: int | None = None, nprobe: int = 128, ef: int = 256, links: int = 32, chunk: int = 5000, seed: int = 0,
    ) -> None:  # fmt: skip
        if search not in ("exact", "pq", "ivf", "hnsw"):
            raise unknown_name("LargeVocabHead", "search", str(search), ("exact", "pq", "ivf", "hnsw"))
        given = {
            "nlist": 1 if nlist is None else nlist,
            "nprobe": nprobe,
            "ef": ef,
            "links": links,
            "chunk": chunk,
            "depth": depth,
        }
        for name, value in given.items():
            if value < 1:
                raise LimitError("LargeVocabHead", name, value, "at least 1")
        self.model, self.vocabulary, self.search, self.depth = model, vocabulary, search, depth
        found = tables(model)
        self.scale, base = found.scale, found.input.shape[0]
        if len(vocabulary) < base or any(vocabulary.pieces[i] != (i,) for i in (0, base // 2, base - 1)):
            raise LimitError("LargeVocabHead", "vocabulary", len(vocabulary), f"the model's {base:,} tokens first")
        self.input, self.output = self._rows(found.input, found.output, embedder, chunk)
        self.index = None if search == "exact" else self._built(search, nlist, nprobe, ef, links, seed)

    @torch.no_grad()
    def _rows(self, table: Tensor, out: Tensor | None, embedder: TokenEmbedder, chunk: int) -> tuple[Tensor, Tensor]:
        pieces, base = self.vocabulary.pieces, table.shape[0]
        first = table.new_empty(len(pieces), table.shape[1], dtype=torch.float32)
        first[:base] = table.float()
        second = first if out is None else torch.empty_like(first)
        if out is not None:
            second[:base] = out.float()
        for start in range(base, len(pieces), chunk):
            made = embedder.embed(pieces[start : start + chunk])
            first[start : start + chunk] = made.input
            if out is not None and made.output is not None:
                second[start : start + chunk] = made.output
        return first, second

    def _built(self, search: str, nlist: int | None, nprobe: int, ef: int, links: int, seed: int) -> Any:
        try:
            import faiss  # type: ignore[import-not-found]
        except ImportError as error:
            raise MissingExtraError("LargeVocabHead", "faiss-cpu", "text") from error
        rows = self.output.cpu()
        if search == "pq":
            return _quantised(faiss, rows.numpy(), seed)
        norms = rows.square().sum(1)
        last = (norms.max() - norms).clamp(min=0).sqrt()
        data = torch.cat([rows, last[:, None]], dim=1).numpy()  # (V, D + 1), all of one length
        n, width = data.shape
        if search == "hnsw":
            made: Any = faiss.IndexHNSWFlat(width, links, faiss.METRIC_INNER_PRODUCT)
            made.hnsw.efConstruction, made.hnsw.efSearch = max(ef, 80), ef
        else:
            cells = min(nlist or max(1, int(4 * n**0.5)), n)
            made = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, cells, faiss.METRIC_INNER_PRODUCT)
            made.nprobe = min(nprobe, cells)
            made.cp.niter, made.cp.seed, made.cp.spherical = 8, seed, True
            made.cp.max_points_per_centroid, made.cp.min_points_per_centroid = 40, 1
            made.train(data)
        made.add(data)
        return made

    @torch.no_grad()
    def candidates(self, hidden: Tensor, k: int = 20) -> tuple[Tensor, Tensor]:
        """The k tokens with the highest logits as far as the search finds them, best first.

        Args:
            hidden: (B, D) what the model's output matrix would get.
            k: at most V.

        Returns:
            (B, k) int64 tokens and (B, k) float32 logits; a place that the index could not fill has -inf.
        """
        if not 1 <= k <= len(self.vocabulary):
            raise LimitError("LargeVocabHead.candidates", "k", k, f"in [1, {len(self.vocabulary)}]")
        query = hidden.float()
        if self.index is None:
            found = (query @ self.output.T).topk(k, dim=-1)
            return found.indices, found.values
        if self.search == "pq":
            asked, size = query, min(max(k, self.depth), len(self.vocabulary))
        else:
            asked, size = torch.cat([query, query.new_zeros(len(query), 1)], dim=1), k
        tokens = torch.from_numpy(self.index.search(asked.cpu().numpy(), size)[1]).to(query.device)  # (B, size)
        logits = query.new_full(tokens.shape, -torch.inf)
        for row, (own, one) in enumerate(
            zip(tokens, query, strict=True)
        ):  # not all at once: B * size rows would be copied
            logits[row] = (self.output[own.clamp(min=0)] @ one).masked_fill(own < 0, -torch.inf)
        best = logits.topk(k, dim=-1)
        return tokens.clamp(min=0).gather(1, best.indices), best.values

    @torch.no_grad()
    def generate(
        self, inputs_embeds: Tensor, attention_mask: Tensor, *, max_new_tokens: int = 64, do_sample: bool = False,
        temperature: float = 1.0, top_k: int = 10, min_p: float = 0.1, repetition_penalty: float = 1.0,
        candidates: int = 20, eos: Iterable[int] = (), generator: torch.Generator | None = None,
        use_cache: bool = True, position_ids: Tensor | None = None,
    ) -> LargeOutput:  # fmt: skip
        """Continue prompts, a token of the large vocabulary a step.

        Args:
            inputs_embeds: (B, n, D) as `DynamicInputs` gives them, padded on the left.
            attention_mask: (B, n).
            max_new_tokens: steps.
            do_sample: draw among `top_k` tokens with at least `min_p` of the best one's probability; else the best.
            temperature: of the draw.
            repetition_penalty: divides positive and multiplies negative logits of tokens that were written before.
            candidates: tokens that the search gives (paper: 20).
            eos: base ids that end a text.
            generator: of the draws.
            use_cache: keep keys and values between steps.
            position_ids: (B, n); made from the mask when not given.

        Raises:
            LimitError: a value outside its limit.
        """
        _check(max_new_tokens, temperature, top_k, min_p, repetition_penalty)
        ends = torch.tensor(sorted(set(eos)), dtype=torch.int64, device=inputs_embeds.device)
        k = min(candidates, len(self.vocabulary))
        mask = attention_mask
        fed, places = inputs_embeds, (mask.cumsum(1) - 1).clamp(min=0) if position_ids is None else position_ids
        everything, all_places, cache = fed, places, None
        written: list[Tensor] = []
        running = torch.ones(len(mask), dtype=torch.bool, device=mask.device)
        steps = 0
        for steps in range(1, max_new_tokens + 1):
            made = self.model.base_model(
                inputs_embeds=fed, attention_mask=mask, position_ids=places, past_key_values=cache, use_cache=use_cache
            )
            tokens, logits = self.candidates(made.last_hidden_state[:, -1], k)
            if written and repetition_penalty != 1:
                seen = (tokens[:, :, None] == torch.stack(written, 1)[:, None, :]).any(-1)
                harder = torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty)
                logits = torch.where(seen, harder, logits)
            chosen = _chosen(logits, do_sample, temperature, top_k, min_p, generator)
            token = tokens.gather(1, chosen[:, None])[:, 0]  # (B,)
            written.append(torch.where(running, token, torch.full_like(token, -1)))
            running = running & ~torch.isin(token, ends)
            if not running.any():
                break
            fed = (self.input[token] * self.scale).to(inputs_embeds.dtype)[:, None]
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            places = all_places[:, -1:] + steps
            cache = made.past_key_values if use_cache else None
            if not use_cache:
                everything = torch.cat([everything, fed], dim=1)
                fed, places = (
                    everything,
                    torch.cat([all_places, all_places[:, -1:] + torch.arange(1, steps + 1)], dim=1),
                )
        found = [[t for t in row if t >= 0] for row in torch.stack(written, 1).tolist()]
        return LargeOutput(found, [self.vocabulary.decode(row) for row in found], steps)


def _quantised(faiss: Any, rows: Any, seed: int) -> Any:
    """Rows (V, D) float32 in four bits a dimension, a part of them for each thread."""
    n, width = rows.shape
    first = faiss.IndexPQFastScan(width, width, 4, faiss.METRIC_INNER_PRODUCT)
    first.pq.cp.seed = seed
    some = np.random.default_rng(seed).choice(n, min(n, _TRAINED), replace=False)
    first.train(rows[some])
    shards = faiss.IndexShards(width, True, True)
    shards.own_indices = True
    for part in np.array_split(rows, max(1, min(torch.get_num_threads(), n // _SHARD))):
        one = faiss.clone_index(first)
        one.add(np.ascontiguousarray(part))
        one.this.disown()
        shards.add_shard(one)
    return shards


def _chosen(
    logits: Tensor, sample: bool, temperature: float, top_k: int, min_p: float, generator: torch.Generator | None
) -> Tensor:
    """(B,) places among the candidates."""
    if not sample:
        return logits.argmax(-1)
    best = logits.topk(min(top_k, logits.shape[1]), dim=-1)
    chances = (best.values / temperature).softmax(-1)
    chances = chances * (chances >= min_p * chances.max(-1, keepdim=True).values)
    drawn = torch.multinomial(chances, 1, generator=generator)
    return best.indices.gather(1, drawn)[:, 0]


def _check(steps: int, temperature: float, top_k: int, min_p: float, penalty: float) -> None:
    where = "LargeVocabHead.generate"
    for name, value in (("max_new_tokens", steps), ("top_k", top_k)):
        if value < 1:
            raise LimitError(where, name, value, "at least 1")
    for name, number in (("temperature", temperature), ("repetition_penalty", penalty)):
        if not number > 0:
            raise LimitError(where, name, number, "above 0")
    if not 0 <= min_p <= 1:
        raise LimitError(where, "min_p", min_p, "in [0, 1]")
