"""Frequency chunks: the groups of channels that a rotation turns together, and how well each ranks keys alone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tokenmill.attend._gather import grouped, heads, top_indices
from tokenmill.errors import LimitError, unknown_name
from tokenmill.hf.rotary import Rotary

Layout = Literal["half_split", "interleaved", "adjacent", "channels"]
LAYOUTS = ("half_split", "interleaved", "adjacent", "channels")
_BLOCK = 8  # chunks whose scores are held at once
_FORMAT = "tokenmill-fasa-1"


def chunk_channels(layout: Layout, head_dim: int, rotary_dim: int | None = None) -> Tensor:
    """The channels of every frequency chunk.

    Args:
        layout: ``"half_split"`` pairs i with i + rotary_dim / 2 (Llama, Qwen, Gemma), ``"interleaved"`` 2 i with
            2 i + 1 (MLA, GLM). ``"adjacent"`` pairs neighbours whatever the model rotates, as the authors' release
            does on half-split keys; ``"channels"`` takes single channels, for models without rotary positions.
        head_dim: d.
        rotary_dim: rotated channels, the first ones; the others are pairs of neighbours. ``None``: all.

    Returns:
        (C, 2) int64, or (d, 1) for single channels.

    Raises:
        LimitError: an unknown layout, odd sizes, or more rotated channels than there are.
    """
    if layout not in LAYOUTS:
        raise unknown_name("chunk_channels", "layout", layout, LAYOUTS)
    if layout == "channels":
        return torch.arange(head_dim)[:, None]
    if head_dim < 2 or head_dim % 2:
        raise LimitError("chunk_channels", "head_dim", head_dim, "even", "Use layout='channels'.")
    turned = head_dim if rotary_dim is None else rotary_dim
    if turned % 2 or not 0 <= turned <= head_dim:
        raise LimitError("chunk_channels", "rotary_dim", rotary_dim, f"even and at most head_dim = {head_dim}")
    neighbours = torch.arange(head_dim).view(-1, 2)
    if layout != "half_split":
        return neighbours
    return torch.cat([torch.arange(turned).view(2, -1).T, neighbours[turned // 2 :]])


def rotated_chunks(turn: Rotary, head_dim: int) -> tuple[Layout, int]:
    """The layout of a layer's rotation and the number of rotated channels, found by rotating unit vectors.

    Raises:
        LimitError: the rotation joins channels in a way that no layout describes.
    """
    unit = torch.eye(head_dim)[None, :, None]  # (1, d, 1, d): every channel is a head
    moved = turn.rotate(unit, turn.phases(torch.ones(1, 1, dtype=torch.long)))[0, :, 0]  # (d, d)
    partner = (moved - moved.diagonal().diag()).abs()
    turned = int((partner.amax(-1) > 0).sum())
    for layout in ("half_split", "interleaved"):
        channels = chunk_channels(layout, head_dim, turned)[: turned // 2]
        if torch.equal(partner.argmax(-1)[channels.flatten()], channels.flip(1).flatten()):
            return layout, turned
    raise LimitError(
        "rotated_chunks", "the rotation's channels", partner.argmax(-1).tolist(), "half-split or interleaved"
    )


def chunk_scores(query: Tensor, keys: Tensor, channels: Tensor) -> Tensor:
    """The part of every dot product that each chunk gives.

    Args:
        query: (B, H, d).
        keys: (B, G, S, d).
        channels: (C, w), see `chunk_channels`.

    Returns:
        (B, H, C, S) float32; over all chunks it sums to the dot product.
    """
    b, h, _ = query.shape
    g, s = keys.shape[1:3]
    q = query.float()[..., channels].view(b, g, h // g, *channels.shape)  # (B, G, g, C, w)
    k = keys.float()[..., channels]  # (B, G, S, C, w)
    return torch.einsum("bghcw,bgscw->bghcs", q, k).reshape(b, h, channels.shape[0], s)


def agreement(query: Tensor, keys: Tensor, channels: Tensor, k: int, *, valid: Tensor | None = None) -> Tensor:
    """Contextual agreement: the share of a head's top k keys that each chunk alone ranks among its own top k.

    Args:
        query: (B, H, d), one query of each head.
        keys: (B, G, S, d).
        channels: (C, w).
        k: how many; fewer where a row has fewer keys.
        valid: (B, S) bool, false at padding.

    Returns:
        (B, H, C) float32 in [0, 1]. A random ranking agrees in k / S.
    """
    if valid is None:
        valid = torch.ones(keys.shape[0], keys.shape[2], dtype=torch.bool, device=keys.device)
    take = min(k, keys.shape[2])
    hidden = ~valid[:, None]
    whole = grouped(query[:, :, None], keys)[:, :, 0].masked_fill(hidden, -torch.inf)
    best = torch.zeros_like(whole, dtype=torch.bool).scatter(-1, top_indices(whole, take), True) & valid[:, None]
    found = []
    for part in channels.split(_BLOCK):
        score = chunk_scores(query, keys, part).masked_fill(hidden[:, None], -torch.inf)
        index = top_indices(score, take)  # (B, H, c, k)
        found.append(best[:, :, None].expand_as(score).gather(-1, index).sum(-1))
    count = valid.sum(-1).clamp(1, take)
    return torch.cat(found, -1) / count[:, None, None]


def dominant_keys(keys: Tensor, dims: Tensor) -> Tensor:
    """The channels of the keys that each query head ranks by: (B, G, S, d) and dims (H, m) -> (B, H, S, m)."""
    wide = heads(keys, len(dims))
    return wide.gather(-1, dims[None, :, None].expand(len(keys), -1, keys.shape[2], -1))


def tip_scores(query: Tensor, keys: Tensor, dims: Tensor) -> Tensor:
    """Scores of all keys from some channels (the first stage).

    Args:
        query: (B, H, 1, d), rotated.
        keys: (B, G, S, d), rotated; or what `dominant_keys` gave, (B, H, S, m).
        dims: (H, m) channels of each head.

    Returns:
        (B, H, S) float32.
    """
    if keys.shape[-1] != dims.shape[-1] or keys.shape[1] != len(dims):
        keys = dominant_keys(keys, dims)
    q = query[:, :, 0].float().gather(-1, dims.expand(len(query), -1, -1))
    return (keys.float() @ q[..., None])[..., 0]


def split_channels(keys: Tensor, dims: Tensor) -> tuple[Tensor, Tensor]:
    """Keys (B, H, S, d) -> the channels dims (H, m) and the others: (B, H, S, m) and (B, H, S, d - m)."""
    return dominant_keys(keys, dims), dominant_keys(keys, _others(dims, keys.shape[-1]))


def combine_channels(dominant: Tensor, rest: Tensor, dims: Tensor) -> Tensor:
    """The inverse of `split_channels`."""
    both = torch.cat([dominant, rest], -1)
    order = torch.cat([dims, _others(dims, both.shape[-1])], -1).argsort(-1)
    return dominant_keys(both, order)


def _others(dims: Tensor, width: int) -> Tensor:
    rest = torch.ones(len(dims), width, dtype=torch.bool, device=dims.device).scatter(1, dims, False)
    return rest.nonzero()[:, 1].view(len(dims), -1)


@dataclass(frozen=True, slots=True, eq=False)
class FCRanking:
    """How well each chunk of each head ranks keys, averaged over the steps of a calibration.

    Attributes:
        ca: (n_K, n_layers, C, H) float32, mean contextual agreement.
        layers: indices of the model's layers, in the order of ``ca``.
        k_list: the numbers of keys that were compared.
        layout: see `chunk_channels`.
        head_dim: d.
        rotary_dim: rotated channels.
        queries: how many queries were averaged.
        made_on: shape of the model that it was made on; empty for a ranking that fits any model of its sizes.
    """

    ca: Tensor
    layers: tuple[int, ...]
    k_list: tuple[int, ...]
    layout: Layout
    head_dim: int
    rotary_dim: int
    queries: int = 0
    made_on: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        chunks = len(chunk_channels(self.layout, self.head_dim, self.rotary_dim))
        want = (len(self.k_list), len(self.layers), chunks)
        if self.ca.dim() != 4 or tuple(self.ca.shape[:3]) != want or 0 in self.ca.shape:
            raise LimitError("FCRanking", "ca.shape", tuple(self.ca.shape), f"(n_K, n_layers, C, H) = {(*want, 'H')}")

    @property
    def chunks(self) -> int:
        """C."""
        return self.ca.shape[2]

    @property
    def heads(self) -> int:
        """H."""
        return self.ca.shape[3]

    def dominant(self, n_tip: int, *, k: int | None = None) -> Tensor:
        """The chunks of highest agreement.

        Args:
            n_tip: how many.
            k: of the calibrated numbers of keys the nearest to this one is used; ``None``: the smallest.

        Returns:
            (n_layers, H, n_tip) int64, best first; ties go to the lower chunk.

        Raises:
            LimitError: n_tip outside [1, C].
        """
        if isinstance(n_tip, bool) or not 1 <= n_tip <= self.chunks:
            raise LimitError("FCRanking.dominant", "n_tip", n_tip, f"in [1, C={self.chunks}]")
        at = 0 if k is None else min(range(len(self.k_list)), key=lambda i: abs(self.k_list[i] - k))
        order = self.ca[at].sort(dim=1, descending=True, stable=True).indices  # (layers, C, H)
        return order[:, :n_tip].transpose(1, 2).contiguous()

    def to_dims(self, n_tip: int, layout: Layout | None = None, *, k: int | None = None) -> Tensor:
        """The channels of the dominant chunks, (n_layers, H, w n_tip) int64; see `dominant`."""
        channels = chunk_channels(layout or self.layout, self.head_dim, self.rotary_dim)
        return channels[self.dominant(n_tip, k=k)].flatten(2)

    def save(self, path: str | Path) -> None:
        """Write the ranking as one safetensors file, the rest in its header."""
        from safetensors.torch import save_file

        meta = {name: getattr(self, name) for name in self.__slots__ if name != "ca"}
        meta["made_on"] = dict(self.made_on)
        save_file({"ca": self.ca.contiguous()}, path, {"format": _FORMAT, "ranking": json.dumps(meta)})

    @classmethod
    def load(cls, path: str | Path) -> FCRanking:
        """Read what `save` wrote.

        Raises:
            LimitError: a file without a ranking.
        """
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != _FORMAT:
                raise LimitError("FCRanking.load", "path", str(path), "a file that FCRanking.save wrote")
            ca = file.get_tensor("ca")
        meta = json.loads(header["ranking"])
        for name in ("layers", "k_list"):
            meta[name] = tuple(meta[name])
        meta["made_on"] = tuple(meta["made_on"].items())
        return cls(ca=ca, **meta)
