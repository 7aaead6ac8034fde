"""What the attention layers of a model are given, for measurements on real queries and keys."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from tokenmill.attend._session import Answer, Reading, SparseAttention


class Heard(NamedTuple):
    """One call of one layer.

    Attributes:
        query: (B, H, Q, d), without position when the listener turns back.
        key: (B, G, S, d), likewise.
        value: (B, G, S, d_v).
        scaling: of the dot products.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Listener(SparseAttention):
    """Dense attention that keeps the tensors of every call of the layers with full attention.

    Attributes:
        layers: indices of the layers; None means all with full attention.
        turn_back: keep queries and keys without their rotation.
        heard: layer -> its calls.
    """

    layers: tuple[int, ...] | None = None
    turn_back: bool = False
    heard: dict[int, list[Heard]] = field(default_factory=dict)

    @property
    def needs_rotary(self) -> bool:
        return self.turn_back

    def read(self, reading: Reading) -> Answer:
        query, key = reading.query, reading.key
        if self.turn_back:
            query, key = reading.unrotated_query(), reading.rotary().unrotate(key, reading.call.position_embeddings)
        kept = Heard(query.clone(), key.clone(), reading.value.clone(), reading.scaling)
        self.heard.setdefault(reading.layer, []).append(kept)
        return reading.dense()
