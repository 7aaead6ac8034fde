"""Texts as vectors: a space in which a token's string has neighbours."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tokenmill import models
from tokenmill.errors import LimitError, unknown_name

Embedder = Callable[[list[str]], Tensor]
"""Texts -> (n, d) floating."""

_MINILM = "all-minilm-l6-v2"


@dataclass(frozen=True, slots=True, kw_only=True)
class HashEmbedder:
    """Counts of character n-grams, hashed: likeness of form, without any weights.

    Attributes:
        dim: d, width of the vectors.
        longest: n-grams of one up to so many characters, the text's two ends included.
    """

    dim: int = 512
    longest: int = 3

    def __post_init__(self) -> None:
        for name in ("dim", "longest"):
            if getattr(self, name) < 1:
                raise LimitError("HashEmbedder", name, getattr(self, name), "at least 1")

    def __call__(self, texts: list[str]) -> Tensor:
        """(n, d) float32."""
        rows, columns = [], []
        for row, text in enumerate(texts):
            data = f"\x02{text}\x03".encode("utf-8", "surrogatepass")
            grams = [data[i : i + n] for n in range(1, self.longest + 1) for i in range(len(data) - n + 1)]
            rows += [row] * len(grams)
            columns += [zlib.crc32(gram) for gram in grams]
        hashed = np.array(columns, dtype=np.int64)
        out = np.zeros((len(texts), self.dim), dtype=np.float32)
        # The lowest bit of the hash is a sign, so that collisions cancel on average.
        np.add.at(out, (np.array(rows, dtype=np.int64), (hashed >> 1) % self.dim), 1.0 - 2.0 * (hashed & 1))
        return torch.from_numpy(out)


@dataclass(frozen=True, slots=False)
class TextEmbedder:
    """A text encoder: the mean of its last hidden states over the text's tokens, no prompt before it.

    Attributes:
        name: ``"all-minilm-l6-v2"`` (from a Python package), a folder, or any transformers id of an encoder.
        batch_size: texts a forward pass.
        device: where the encoder runs.
        cache: keep vectors of long lists in the user's cache, by encoder and texts, in half precision.
    """

    name: str = _MINILM
    batch_size: int = field(default=256, kw_only=True)
    device: str = field(default="cpu", kw_only=True)
    cache: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise LimitError("TextEmbedder", "batch_size", self.batch_size, "at least 1")

    def __call__(self, texts: list[str]) -> Tensor:
        """(n, d) float32, rounded to half precision so that a cached vector equals a new one."""
        place = self._place(texts) if self.cache and len(texts) >= 1000 else None
        if place is not None and place.is_file():
            from safetensors.torch import load_file

            return load_file(place)["vectors"].float()
        made = self._embed(texts).half()
        if place is not None:
            from safetensors.torch import save_file

            place.parent.mkdir(parents=True, exist_ok=True)
            half = place.with_suffix(f".{os.getpid()}.tmp")
            save_file({"vectors": made}, half)
            half.replace(place)
        return made.float()

    def _place(self, texts: list[str]) -> Path:
        from tokenmill.models._cache import cache_dir

        digest = hashlib.sha256(self.name.encode())
        for text in texts:
            data = text.encode("utf-8", "surrogatepass")
            digest.update(len(data).to_bytes(4, "little") + data)
        return cache_dir() / "vectors" / f"{digest.hexdigest()[:32]}.safetensors"

    @torch.inference_mode()
    def _embed(self, texts: list[str]) -> Tensor:
        model, tokenizer = self._loaded
        cut = tokenizer(texts, truncation=True, max_length=128)["input_ids"] if texts else []
        # " The" and "the" are one text to an encoder without case: what is the same to it is computed once.
        distinct = list(dict.fromkeys(map(tuple, cut)))
        distinct.sort(key=len)  # rows of like length share a batch
        found: list[Tensor] = []
        for start in range(0, len(distinct), self.batch_size):
            batch = {"input_ids": [list(ids) for ids in distinct[start : start + self.batch_size]]}
            inputs = tokenizer.pad(batch, return_tensors="pt").to(self.device)
            hidden = model(**inputs).last_hidden_state  # (b, n, d)
            found.append(mean_state(hidden, inputs["attention_mask"]).float().cpu())
        if not found:
            return torch.zeros(0, int(model.config.hidden_size))
        place = {ids: i for i, ids in enumerate(distinct)}
        return torch.cat(found)[torch.tensor([place[tuple(ids)] for ids in cut])]

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        model, tokenizer = models.encoder(self.name, where="TextEmbedder")
        return model.to(self.device), tokenizer


def mean_state(hidden: Tensor, mask: Tensor) -> Tensor:
    """(b, d) mean of last hidden states (b, n, d) over the tokens that the mask (b, n) names: MiniLM's embedding."""
    weights = mask[..., None].to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1)


def embedder_of(given: str | Embedder) -> Embedder:
    """``"hash"``, ``"all-minilm-l6-v2"``, or a function from texts to vectors as it is."""
    if not isinstance(given, str):
        return given
    known: dict[str, Callable[[], Embedder]] = {"hash": HashEmbedder, _MINILM: TextEmbedder}
    if given not in known:
        raise unknown_name("transplant", "embedder", given, known)
    return known[given]()


def unit_vectors(embedder: Embedder, tokens: Sequence[bytes | None]) -> Tensor:
    """Directions of the tokens' texts, (n, d) float32; zero for what is no text, is blank, or has no direction."""
    texts = [_text(token) for token in tokens]
    distinct = list(dict.fromkeys(t for t in texts if t is not None))
    if not distinct:
        return torch.zeros(len(texts), 1)
    vectors = embedder(distinct).float()
    if vectors.dim() != 2 or vectors.shape[0] != len(distinct):
        raise LimitError("transplant", "embedder(texts).shape", tuple(vectors.shape), f"({len(distinct)}, d)")
    vectors = torch.where(vectors.isfinite().all(dim=1, keepdim=True), vectors, 0.0)
    vectors = torch.cat([F.normalize(vectors, dim=1), vectors.new_zeros(1, vectors.shape[1])])
    place = {text: i for i, text in enumerate(distinct)}
    return vectors[torch.tensor([len(distinct) if t is None else place[t] for t in texts])]


def _text(token: bytes | None) -> str | None:
    try:
        text = token.decode("utf-8") if token else ""
    except UnicodeDecodeError:
        return None
    return text if text.strip() else None
