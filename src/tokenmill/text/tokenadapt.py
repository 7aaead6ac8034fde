"""TokenAdapt: another tokenizer for a trained model, with rows for its new tokens made from the old rows.

Rows of tokens that both vocabularies have are copied. The row of a new token is a weighted sum of old rows: of the
pieces that the old tokenizer cuts it into (local: by likeness to the whole in a space of texts, and by length), and of
the old tokens nearest to it in that space (global). The same weights serve the input and the output matrix.

Use it to start from when a model gets a vocabulary of its own (a domain, a language, longer tokens) and little training
can follow. Do not expect a model to be good at once where most tokens are new, least of all with supertokens.

Sharthak et al., "Achieving Tokenizer Flexibility in Language Models through Heuristic Adaptation and Supertoken
Learning", 2025.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from tokenmill.catalog import Card, Paper, Reported
from tokenmill.errors import LimitError, UnsupportedError
from tokenmill.text._embedders import Embedder, embedder_of, unit_vectors
from tokenmill.text._embedders import HashEmbedder as HashEmbedder
from tokenmill.text._embedders import TextEmbedder as TextEmbedder
from tokenmill.text._model_rows import check_model, checked_copy, resize_and_write, retarget_ids, suppress
from tokenmill.text._row_estimates import focus_mixture, global_mixture, local_mixture, piece_mean
from tokenmill.text._row_mixture import RowMixture
from tokenmill.text._supertokens import train_supertokenizer as train_supertokenizer
from tokenmill.text._token_bytes import TokenBytes
from tokenmill.text._vocabulary_match import VocabularyMatch, match_vocabularies, old_pieces

CARD = Card(
    name="TokenAdapt",
    kind="model",
    paper=Paper(
        title="Achieving Tokenizer Flexibility in Language Models through Heuristic Adaptation and Supertoken Learning",
        date="2025-05-14",
        arxiv="2505.09738",
        code="https://github.com/Tinycompany-AI/tokenadapt",
    ),
    summary=(
        "Gives a trained model another tokenizer and makes the rows of new tokens from old ones. "
        "A new row mixes the pieces of the token with its neighbours in a space of texts."
    ),
    claim=(
        "Without any training, lower perplexity than the mean of a token's pieces and than a dictionary of "
        "translations; most of the paper's gain is in a script that the new vocabulary covers and the old one did not."
    ),
    api=(
        "TokenAdapt",
        "transplant",
        "Transplanted",
        "TransplantReport",
        "HashEmbedder",
        "TextEmbedder",
        "train_supertokenizer",
    ),
    exact=False,
    trains=False,
    task="transplant",
    needs=frozenset({"tokenizer"}),
    works_with=("llama", "qwen2", "gemma3_text"),
    differs=(
        "Tokens are matched by their bytes and special tokens by content and role, not by a vocabulary's spelling.",
        "Tokens that are part of a character are covered by old byte tokens and never embedded as texts.",
        "A piece's length is counted in bytes, so that a part of a character has one.",
        "Rows that only fill the matrix are suppressed in generation; a new special token starts at the mean row.",
        "A new tokenizer without an end token is refused; the authors' code falls back to the start token.",
    ),
    reported=Reported(
        table="overall perplexity ratios", setting="Llama-3.2-3B to 81K", metric="ratio, ReTok 71.1", value=48.2
    ),
)

Method = Literal["tokenadapt", "random", "mean", "piece-mean", "focus"]
ORIGINS = ("filler", "shared", "special", "local", "global", "hybrid", "pieces", "neighbours", "mean", "random")


@dataclass(frozen=True, slots=True)
class TransplantReport:
    """Where each row of a transplanted model comes from.

    Attributes:
        origin: (rows,) uint8, index into `ORIGINS`: a row that fills the matrix; copied from a shared or a special
            token; made from pieces, from neighbours or from both; with another method, from pieces, from shared
            neighbours, the mean row (also of new special tokens, and where nothing else is known), or drawn.
        source: (V_new,) int64, the old id of copied rows, else -1.
        new_text: (U,) int64, ids of the new tokens that are text.
        mixture: what their rows are made of; None for the methods "random" and "mean".
    """

    origin: np.ndarray
    source: np.ndarray
    new_text: np.ndarray
    mixture: RowMixture | None

    @property
    def counts(self) -> dict[str, int]:
        """Origin -> rows."""
        found = np.bincount(self.origin, minlength=len(ORIGINS))
        return {name: int(n) for name, n in zip(ORIGINS, found, strict=True) if n}

    def of(self, token: int) -> tuple[str, dict[int, float]]:
        """The origin of one new token's row, and the old ids it is made of with their weights.

        Raises:
            LimitError: an id outside the new vocabulary.
        """
        if not 0 <= token < len(self.source):
            raise LimitError("TransplantReport.of", "token", token, f"in [0, V={len(self.source)})")
        name = ORIGINS[self.origin[token]]
        if self.source[token] >= 0:
            return name, {int(self.source[token]): 1.0}
        at = np.flatnonzero(self.new_text == token)
        if self.mixture is None or not at.size:
            return name, {}
        lo, hi = self.mixture.offsets[at[0] : at[0] + 2].tolist()
        parts: dict[int, float] = {}
        for i, w in zip(self.mixture.indices[lo:hi].tolist(), self.mixture.weights[lo:hi].tolist(), strict=True):
            parts[i] = parts.get(i, 0.0) + w
        return name, parts


class Transplanted(NamedTuple):
    """A model for a new tokenizer, that tokenizer with a chat template, and where the rows come from."""

    model: Any
    tokenizer: Any
    report: TransplantReport


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenAdapt:
    """How new rows are made.

    Attributes:
        method: tokenadapt; or a baseline: random (normal draws with the matrix' mean and deviation), mean (of all
            rows), piece-mean (of the token's old pieces), focus (sparsemax over the tokens that both have).
        temperature: T of both softmaxes.
        top_k: neighbours of the global estimate.
        global_weight: share of the global estimate; 0 is local alone, 1 global alone.
        threshold: least cosine of a neighbour; above 1 there is no global estimate.
        pad_to_multiple_of: the matrices get a multiple of so many rows.
        seed: of random rows.
    """

    method: Method = "tokenadapt"
    temperature: float = 0.3
    top_k: int = 3
    global_weight: float = 0.3
    threshold: float = 0.0
    pad_to_multiple_of: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise LimitError("TokenAdapt", "method", self.method, f"one of {', '.join(get_args(Method))}")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise LimitError("TokenAdapt", "temperature", self.temperature, "above 0 and finite")
        if not 0 <= self.global_weight <= 1:
            raise LimitError("TokenAdapt", "global_weight", self.global_weight, "in [0, 1]")
        if math.isnan(self.threshold):
            raise LimitError("TokenAdapt", "threshold", self.threshold, "a number")
        for name in ("top_k", "pad_to_multiple_of"):
            if getattr(self, name) < 1:
                raise LimitError("TokenAdapt", name, getattr(self, name), "at least 1")

    def transplant(
        self,
        model: Any,
        old_tokenizer: Any,
        new_tokenizer: Any,
        embedder: str | Embedder = "all-minilm-l6-v2",
        *,
        inplace: bool = False,
    ) -> Transplanted:
        """Put a new tokenizer under a model; see `transplant`."""
        rows = check_model(model, old_tokenizer, new_tokenizer)
        ours, theirs = TokenBytes.of(old_tokenizer), TokenBytes.of(new_tokenizer)
        match = match_vocabularies(old_tokenizer, new_tokenizer, rows)
        wanted = [theirs.tokens[i] or b"" for i in match.new_text]
        mixture = self.mixture(ours, wanted, match, rows, embedder)
        model = model if inplace else checked_copy(model)
        drawn = self.method == "random"
        total = resize_and_write(
            model, match.source, match.new_text, mixture, len(theirs), self.pad_to_multiple_of,
            generator=torch.Generator().manual_seed(self.seed) if drawn else None,
        )  # fmt: skip
        retarget_ids(model, match.source)
        suppress(model, len(theirs), total)
        tokenizer = checked_copy(new_tokenizer)
        if getattr(tokenizer, "chat_template", None) is None and getattr(old_tokenizer, "chat_template", None):
            tokenizer.chat_template = old_tokenizer.chat_template
        return Transplanted(model, tokenizer, self._report(match, mixture, theirs, total))

    def mixture(
        self, old: TokenBytes, wanted: list[bytes], match: VocabularyMatch, rows: int, embedder: str | Embedder
    ) -> RowMixture | None:
        """What each of the wanted tokens is made of; None when no old row takes part (random, mean)."""
        if self.method in ("random", "mean"):
            return None
        if self.method == "focus":
            embed = embedder_of(embedder)
            shared = np.unique(match.source[match.source >= 0])
            texts = unit_vectors(embed, [old.tokens[i] for i in shared])
            known = texts.any(dim=1)
            return focus_mixture(unit_vectors(embed, wanted), texts[known], torch.from_numpy(shared)[known])
        pieces = old_pieces(old, wanted, rows)
        if self.method == "piece-mean":
            return piece_mean(pieces)
        return self._hybrid(old, wanted, pieces, rows, embedder_of(embedder))

    def _hybrid(
        self, old: TokenBytes, wanted: list[bytes], pieces: RowMixture, rows: int, embed: Embedder
    ) -> RowMixture:
        new = unit_vectors(embed, wanted)  # (U, d)
        if not len(pieces):
            return pieces
        # Every old token is embedded only where the global estimate needs it.
        ids = torch.arange(min(rows, len(old))) if self.global_weight > 0 else pieces.indices.unique()
        vectors = unit_vectors(embed, [old.tokens[i] for i in ids.tolist()])  # (O, d)
        known = vectors.any(dim=1)
        place = torch.full((rows,), -1, dtype=torch.int64)
        place[ids] = torch.arange(len(ids))
        bags = pieces.bags
        if vectors.shape[1] == new.shape[1]:
            similarity = (new[bags] * vectors[place[pieces.indices]]).sum(dim=1)
        else:  # no text on one side: there are no likenesses
            similarity = torch.zeros(len(bags))
        lengths = torch.from_numpy(old.lengths.astype(np.float32))[pieces.indices]
        whole = torch.tensor([len(token) for token in wanted], dtype=torch.float32)
        share = lengths / whole[bags]
        local = local_mixture(pieces, similarity, share, temperature=self.temperature)
        if self.global_weight == 0 or not bool(known.any()) or vectors.shape[1] != new.shape[1]:
            return local
        near = global_mixture(
            new, vectors[known], ids[known], top_k=self.top_k, temperature=self.temperature, threshold=self.threshold
        )
        return local.mixed(near, self.global_weight)

    def _report(
        self, match: VocabularyMatch, mixture: RowMixture | None, new: TokenBytes, total: int
    ) -> TransplantReport:
        code = {name: i for i, name in enumerate(ORIGINS)}
        origin = np.full(total, code["filler"], dtype=np.uint8)
        size = len(match.source)
        origin[:size][match.source >= 0] = code["shared"]
        specials = np.array(sorted(new.specials.values()), dtype=np.int64)
        origin[specials] = np.where(match.source[specials] >= 0, code["special"], code["mean"])
        if mixture is None:
            origin[match.new_text] = code[self.method]
        else:
            whole = {"piece-mean": "pieces", "focus": "neighbours"}.get(self.method)
            kind = whole or {0.0: "local", 1.0: "global"}.get(self.global_weight, "hybrid")
            origin[match.new_text] = np.where(mixture.found.numpy(), code[kind], code["mean"])
        return TransplantReport(origin, match.source, match.new_text, mixture)


def transplant(
    model: Any,
    old_tokenizer: Any,
    new_tokenizer: Any,
    embedder: str | Embedder = "all-minilm-l6-v2",
    *,
    method: Method = "tokenadapt",
    temperature: float = 0.3,
    top_k: int = 3,
    global_weight: float = 0.3,
    threshold: float = 0.0,
    pad_to_multiple_of: int = 128,
    seed: int = 0,
    inplace: bool = False,
) -> Transplanted:
    """Give a model another tokenizer.

    Args:
        model: a causal or masked language model of transformers, tied or not.
        old_tokenizer: the model's own.
        new_tokenizer: the one it gets; both are tokenizers that `TokenBytes.of` reads.
        embedder: ``"all-minilm-l6-v2"``, ``"hash"`` (no weights needed), or texts -> (n, d). The methods "random",
            "mean" and "piece-mean" do not use it.
        method, temperature, top_k, global_weight, threshold, pad_to_multiple_of, seed: see `TokenAdapt`.
        inplace: change this model instead of a copy.

    Returns:
        The model, a copy of the new tokenizer (with the old chat template if it had none), and the report.

    Raises:
        LimitError: a setting outside its limit; a tokenizer with more tokens than the embedding has rows.
        UnsupportedError: quantised weights, an embedding for each layer, no end token in the new tokenizer.
    """
    settings = TokenAdapt(
        method=method, temperature=temperature, top_k=top_k, global_weight=global_weight, threshold=threshold,
        pad_to_multiple_of=pad_to_multiple_of, seed=seed,
    )  # fmt: skip
    return settings.transplant(model, old_tokenizer, new_tokenizer, embedder, inplace=inplace)


def small() -> TokenAdapt:
    """For the laws."""
    return TokenAdapt(pad_to_multiple_of=8)


def rows_of(matrix: Tensor, report: TransplantReport) -> Tensor:
    """(U, D) float32: the estimated rows alone, from an old matrix (V_old, D)."""
    if report.mixture is None:
        raise UnsupportedError("rows_of", "the rows of this method are not made from old ones")
    return report.mixture.rows(matrix)
