"""What methods share that choose what attention reads: how they attach, what they see of a call, what is counted."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from tokenmill.errors import LimitError, UnsupportedError
from tokenmill.hf.attention import Call, attached, register
from tokenmill.hf.backends import visible
from tokenmill.hf.layers import Follower, token_state
from tokenmill.hf.layout import FULL, attention_layers, layer_types
from tokenmill.hf.rotary import Rotary, layer_rotary
from tokenmill.trace import Trace

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "tokenmill-attend"
Answer = tuple[Tensor, Tensor | None]
Followed = TypeVar("Followed", bound=Follower)


@dataclass(slots=True)
class AttendTrace(Trace):
    """Counts over the layers that a method is attached to.

    A key is counted once for each KV head (for each query head, where those choose apart) and each chunk of queries
    that reads it. ``bytes_read`` has keys and values that attention read and what was read to choose them.

    Attributes:
        keys_scored: keys that were looked at, in whole or in part, to choose.
        keys_read: keys that attention read.
        keys_dense: keys that dense attention would have read for the same chunks.
        sparse_calls: parts of calls (chunks of queries) that read a chosen set.
        dense_calls: parts of calls that read everything.
        selections: rows for which a set was chosen.
        reused: rows that used an earlier set again.
    """

    keys_scored: int = 0
    keys_read: int = 0
    keys_dense: int = 0
    sparse_calls: int = 0
    dense_calls: int = 0
    selections: int = 0
    reused: int = 0

    @property
    def density(self) -> float:
        """Keys that attention read, as a share of those that dense attention would have read."""
        return self.keys_read / self.keys_dense if self.keys_dense else 1.0


@dataclass(frozen=True, slots=True)
class Span:
    """Which cached keys a chunk of queries can see: one range of slots for each row.

    Attributes:
        first: (B,) int64, slot of the first key that is no padding.
        stop: (B,) int64, one past the last key that some query of the chunk sees.
        longest: keys of the longest row.
    """

    first: Tensor
    stop: Tensor
    longest: int

    def mask(self, size: int, *, skip: int = 0, leave: int = 0) -> Tensor:
        """(B, size) bool: slots of the span without its first ``skip`` and its last ``leave`` keys."""
        slots = torch.arange(size, device=self.first.device)
        return (slots >= self.first[:, None] + skip) & (slots < self.stop[:, None] - leave)

    def rows(self, chosen: Tensor) -> Span:
        """The span of some rows of the batch, (B,) bool."""
        return Span(self.first[chosen], self.stop[chosen], self.longest)


@dataclass(slots=True)
class Session:
    """One `SparseAttention.attach`: the method, the counts, and what is known of the layers."""

    method: SparseAttention
    model: PreTrainedModel
    trace: AttendTrace
    first_layer: int
    rotaries: dict[int, Rotary] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Reading:
    """One call of one attention layer.

    Attributes:
        session: the attachment.
        module: the attention module.
        query: (B, H, Q, D), rotated.
        key: (B, G, S, D), rotated, the cache's and this call's.
        value: (B, G, S, D_v).
        mask: (B or 1, 1 or H, Q, S) boolean or additive; ``None``: one query sees all, Q = S queries are causal.
        call: what the seam knows of the call.
        options: the keyword arguments of the attention function.
    """

    session: Session
    module: Any
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    call: Call
    options: dict[str, Any]

    @property
    def trace(self) -> AttendTrace:
        """The counts of the attachment."""
        return self.session.trace

    @property
    def layer(self) -> int:
        """Index of the decoder layer."""
        return self.call.layer_idx

    @property
    def scaling(self) -> float:
        """Scale of the dot products."""
        return self.options["scaling"]

    @property
    def queries(self) -> int:
        """Q."""
        return self.query.shape[2]

    @property
    def size(self) -> int:
        """S, the slots of the keys: padding and unwritten ones too."""
        return self.key.shape[2]

    def chunks(self, width: int) -> Iterator[tuple[int, int]]:
        """Ranges of at most ``width`` queries, counted from the last one.

        So a left-padded row is cut where it would be cut alone; only the first range is shorter.
        """
        first = self.queries % width
        stops = [*([first] if first else []), *range(first + width, self.queries + 1, width)]
        return zip([0, *stops[:-1]], stops, strict=True)

    def end(self, stop: int) -> int:
        """Slots before this one hold every key that the queries before ``stop`` can see."""
        layer = self.call.cache_layer
        # A static cache has unwritten slots behind the queries' own, so its mask has to say what is seen.
        appended = layer is None or getattr(layer, "max_cache_len", None) is None
        return self.size - self.queries + stop if appended else self.size

    def seen(self, start: int, stop: int, end: int) -> Tensor:
        """(B or 1, 1 or H, stop - start, end) bool: what a chunk of queries sees of the first ``end`` slots."""
        if self.mask is not None:
            part = self.mask if self.mask.shape[-2] == 1 else self.mask[:, :, start:stop]
            return visible(part, self.query[:, :, start:stop], self.key)[..., :end]
        rows = torch.arange(self.size - self.queries + start, self.size - self.queries + stop, device=self.key.device)
        return (rows[:, None] >= torch.arange(end, device=self.key.device))[None, None]

    def span(self, seen: Tensor) -> Span | None:
        """The range of keys that a chunk sees; ``None`` when some row's keys are not one range.

        Args:
            seen: (B or 1, 1 or H, q, end), see `seen`.
        """
        batch, end = self.query.shape[0], seen.shape[-1]
        if self.mask is None:
            first = torch.zeros(batch, dtype=torch.long, device=seen.device)
            return Span(first, first + end, end)
        some = seen.any(2).any(1).expand(batch, -1).to(torch.uint8)  # (B, end)
        count = some.sum(-1, dtype=torch.long)
        first = some.argmax(-1)
        stop = torch.where(count > 0, end - some.flip(-1).argmax(-1), first)
        holes, longest = torch.stack([(stop - first - count).max(), count.max()]).tolist()
        return Span(first, stop, longest) if holes == 0 else None

    def follower(self, name: str, make: type[Followed], *args: Any) -> Followed | None:
        """State of the method that lies on this layer of the cache; ``None`` when there is no cache."""
        if self.call.past_key_values is None:
            return None
        layer = token_state(self.call.past_key_values, self.layer, visible=self.size)
        return layer.follower(name, lambda: make(*args))

    def unrotated_keys(self) -> Tensor:
        """The keys without their rotation, (B, G, S, D); each is turned back once, when it is written.

        Raises:
            UnsupportedError: keys that were written before the method was attached, a static cache.
        """
        where, turn = type(self.session.method).__name__, self.rotary()
        phases = self.call.position_embeddings
        if phases is None:
            raise UnsupportedError(where, f"{type(self.module).__name__} is not handed its rotary phases")
        cache = self.call.past_key_values
        if cache is None:
            return turn.unrotate(self.key, phases)
        layer = token_state(cache, self.layer, visible=self.size)
        new = layer.missing("unrotated")
        if new > self.queries:
            raise UnsupportedError(
                where,
                f"the cache holds {new - self.queries} keys from before the method was attached",
                "Attach before the prefill, or use positions='original'.",
            )
        cos, sin = phases
        at = slice(self.queries - new, None)
        return layer.append_state(
            "unrotated", turn.unrotate(self.key[:, :, self.size - new :], (cos[:, at], sin[:, at]))
        )

    def unrotated_query(self) -> Tensor:
        """The queries without their rotation, (B, H, Q, D)."""
        return self.rotary().unrotate(self.query, self.call.position_embeddings)

    def rotary(self) -> Rotary:
        """The rotation of this layer."""
        return self.session.rotaries[self.layer]

    def on_device(self) -> Reading:
        """The same call with keys and values where the queries are, for caches that keep them on the host."""
        device = self.query.device
        return replace(self, key=self.key.to(device), value=self.value.to(device))

    def dense(self) -> Answer:
        """What the layer would do without the method."""
        self.count_read(self.key.shape[0] * self.key.shape[1] * self.size)
        return self.call.inner(self.module, self.query, self.key, self.value, self.mask, **self.options)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        seen: Tensor | None,
        *,
        scaling: float,
        end: int | None = None,
    ) -> Tensor:
        """The layer's own attention over other tensors.

        Args:
            query: (B, H, q, D).
            key: (B, G, n, D).
            value: (B, G, n, D_v).
            seen: (B or 1, 1 or H, q, n) bool; ``None`` with one query: it sees all.
            scaling: of the dot products.
            end: among how many slots the keys were chosen, for the counts; ``None``: they are all.

        Returns:
            (B, H, q, D_v).
        """
        self.count_read(key.shape[0] * key.shape[1] * key.shape[2], end=end)
        options = {**self.options, "scaling": scaling}
        return self.call.inner(self.module, query, key, value, seen, **options)[0].transpose(1, 2)

    def count_read(self, keys: int, *, end: int | None = None, heads: int | None = None) -> None:
        """Write down that attention read ``keys`` keys, chosen among ``end`` slots (``None``: they are all).

        ``heads`` is how many heads chose a set of their own, by default the KV heads.
        """
        trace = self.trace
        trace.keys_read += keys
        trace.keys_dense += keys if end is None else self.key.shape[0] * (heads or self.key.shape[1]) * end
        trace.sparse_calls += end is not None
        trace.dense_calls += end is None
        trace.bytes_read += keys * (self.key.shape[3] + self.value.shape[3]) * self.key.element_size()

    def count_scored(self, keys: int, *, share: float = 1.0, rows: int = 0) -> None:
        """Write down that ``keys`` keys, ``share`` of each, were read to choose a set for ``rows`` rows."""
        self.trace.keys_scored += keys
        self.trace.selections += rows
        self.trace.bytes_read += round(keys * share * self.key.shape[3] * self.key.element_size())


class SparseAttention:
    """Base of the methods: `attach` puts them into a model, and `read` answers one call of one layer.

    Subclasses are frozen dataclasses with a field ``layers``: indices of the layers to attach to; ``None`` means all
    layers with full attention. Sliding layers stay as they are.
    """

    layers: tuple[int, ...] | None = None
    causal = True  # whether what a token gets depends on earlier tokens only
    needs_rotary = False  # whether keys are moved to other positions
    by_head = False  # whether query heads that share a KV head choose apart

    def read(self, reading: Reading) -> Answer:
        """Attention of one call: output (B, Q, H, D_v), and weights or ``None``."""
        raise NotImplementedError

    def check(self, model: PreTrainedModel) -> tuple[int, ...]:
        """Refuse a model that the method cannot work on; returns the layers it will attach to, ascending.

        Raises:
            LimitError: layers that the model does not have.
            UnsupportedError: no layer with full attention, a layer that is not one, attention that is not causal or
                chooses keys by itself.
        """
        where, types = type(self).__name__, layer_types(model)
        modules = {module.layer_idx: module for module in attention_layers(model)}
        full = [index for index in modules if types[index] == FULL]
        chosen = full if self.layers is None else sorted(set(self.layers))
        none = self.layers is not None and not chosen
        if none or any(isinstance(index, bool) or index not in modules for index in chosen):
            raise LimitError(where, "layers", self.layers, f"among the model's attention layers {sorted(modules)}")
        if not chosen or any(index not in full for index in chosen):
            kinds = ", ".join(sorted({types[index] for index in chosen or modules} - {FULL}))
            what = f"{type(model).__name__} has layers of type {kinds} there"
            raise UnsupportedError(where, what, f"Layers with full attention are {full}.")
        for index in chosen:
            if not getattr(modules[index], "is_causal", True):
                raise UnsupportedError(where, f"layer {index} is not causal")
            if hasattr(modules[index], "indexer"):
                raise UnsupportedError(where, f"layer {index} chooses its keys with an indexer of its own")
            if self.by_head and hasattr(modules[index], "sinks"):
                raise UnsupportedError(where, f"layer {index} has learned sinks, and its heads would choose apart")
        return tuple(chosen)

    @contextmanager
    def attach(self, model: PreTrainedModel) -> Generator[AttendTrace, None, None]:
        """Let the method answer the chosen layers inside the ``with``; on exit the model is as it was.

        A cache that is used inside keeps the method's state on its layers, where it follows crops, beams and batches.

        Args:
            model: a decoder-only model on sdpa or eager attention.

        Yields:
            The trace.
        """
        layers = self.check(model)
        turns = (
            {index: layer_rotary(type(self).__name__, model, index) for index in layers} if self.needs_rotary else {}
        )
        session = Session(self, model, AttendTrace(), layers[0], turns)
        register(NAME, _attend, mask="sdpa")
        with attached(model, NAME, layers=layers, state=session):
            yield session.trace


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, call: Call, **options: Any
) -> Answer:
    session: Session | None = call.state
    if session is None:
        return call.inner(module, query, key, value, mask, **options)
    if mask is None and query.shape[2] > 1:
        # No mask and more keys than queries: a static cache that was empty, and the rest of it is unwritten.
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    reading = Reading(session, module, query, key, value, mask, call, options)
    trace = session.trace
    if call.layer_idx == session.first_layer:
        trace.model_calls += 1
        trace.positions += query.shape[0] * query.shape[2]
    return session.method.read(reading)
