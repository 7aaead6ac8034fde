"""FASA: decoding ranks all cached keys by a few rotary frequencies, then attends exactly to the best of them.

Wang et al., "FASA: Frequency-aware Sparse Attention" (arXiv 2602.03152). Rotary positions turn a head's channels in
pairs, and the dot product is a sum over these frequency chunks. A few chunks of each head rank keys almost as the whole
head does; which ones is measured once for a model. Then, at each step, every head scores all keys with its dominant
chunks alone and reads the best keys in full. Prefill is dense, and nothing leaves the cache.

Use it for decoding over long texts, where reading keys is what a step costs. Not for short ones, and not where a
model's heads need other keys than their dominant chunks find: measure the attention mass first.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from tokenmill.attend._frequency import LAYOUTS, Layout, chunk_channels, rotated_chunks
from tokenmill.attend._frequency import FCRanking as FCRanking
from tokenmill.attend._frequency import agreement as agreement
from tokenmill.attend._frequency import combine_channels as combine_channels
from tokenmill.attend._frequency import dominant_keys as dominant_keys
from tokenmill.attend._frequency import split_channels as split_channels
from tokenmill.attend._frequency import tip_scores as tip_scores
from tokenmill.attend._gather import sparse_attend, take, top_indices
from tokenmill.attend._host import host_cache as host_cache
from tokenmill.attend._session import Answer, Reading, SparseAttention
from tokenmill.budget import check, to_count
from tokenmill.catalog import Card, Paper, Reported
from tokenmill.errors import LimitError, UnsupportedError, unknown_name
from tokenmill.hf.layers import token_state
from tokenmill.hf.layout import attention_shape, text_config
from tokenmill.hf.rotary import layer_rotary

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CARD = Card(
    name="FASA",
    kind="attention",
    paper=Paper(
        title="FASA: Frequency-aware Sparse Attention",
        date="2026-02",
        arxiv="2602.03152",
        code="https://github.com/AMAP-ML/FASA-ICLR2026",
    ),
    summary=(
        "Each head ranks all cached keys by the few rotary frequencies that were measured to rank them best. "
        "Attention in decoding then reads the best keys in full; prefill is dense and nothing is evicted."
    ),
    claim=(
        "With 256 keys chosen by a quarter of the channels, models of 3B to 32B keep nearly all of their accuracy on "
        "long texts, and decoding at 64K tokens is up to 2.6 times as fast."
    ),
    api=("FASA", "FCRanking", "host_cache"),
    exact=False,
    trains=False,
    task="long-context",
    needs=frozenset({"calibration"}),
    works_with=("llama", "qwen2", "gemma3_text"),
    differs=(
        "a chunk is the pair of channels that the model rotates together, found by rotating unit vectors; the authors' "
        "release pairs neighbours, which the layout 'adjacent' reproduces",
        "share='kv_group' lets the heads of a group choose together, so that keys are gathered once for each KV head",
        "rankings are safetensors files, where the release pickles",
    ),
    reported=(
        Reported(table="1", setting="Llama-3.1-8B, 256 tokens, 16 of 64 chunks", metric="LongBench", value=48.2),
        Reported(table="1", setting="Qwen2.5-7B, 256 tokens, 16 of 64 chunks", metric="LongBench", value=47.9),
    ),
)


def fac(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    idx: Tensor,
    *,
    scaling: float,
    seen: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Exact attention to the chosen keys (the second stage).

    Args:
        query: (B, H, 1, d).
        keys: (B, G, S, d).
        values: (B, G, S, d_v).
        idx: (B, H, n).
        scaling: of the dot products.
        seen: (B, H, 1, n) bool, false at entries that are no keys.
        options: ``softcap``, see `sparse_attend`.

    Returns:
        (B, H, 1, d_v).
    """
    device = query.device
    keys, values = (take(rows, idx.to(rows.device)).to(device) for rows in (keys, values))
    return sparse_attend(query, keys, values, scaling=scaling, seen=seen, **options)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Calibration(SparseAttention):
    """Dense attention that writes down how well each chunk ranks the keys of each decoding step."""

    channels: Tensor
    k_list: tuple[int, ...]
    layers: tuple[int, ...] | None
    sums: dict[int, list[Tensor]] = field(default_factory=dict)

    def read(self, reading: Reading) -> Answer:
        if reading.queries == 1:
            valid = reading.seen(0, 1, reading.size)[:, 0, 0].expand(len(reading.query), -1)
            channels = self.channels.to(reading.key.device)
            found = [agreement(reading.query[:, :, 0], reading.key, channels, k, valid=valid) for k in self.k_list]
            self.sums.setdefault(reading.layer, []).append(torch.stack(found).mean(1))  # (n_K, H, C)
        return reading.dense()


def calibrate(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    k: int | Sequence[int] = 256,
    max_new_tokens: int = 64,
    layers: tuple[int, ...] | None = None,
    layout: Layout | None = None,
) -> FCRanking:
    """Measure the chunks of a model on texts that it continues (Algorithm 1); once is enough for a model.

    Args:
        model: a decoder-only model; its layers with full attention are measured.
        input_ids: (B, T), texts of at least 2 k tokens; agreement on shorter ones says little.
        attention_mask: (B, T), zero at left padding.
        k: how many keys are compared, or several such numbers.
        max_new_tokens: decoding steps, greedy; all but the first count.
        layers: which layers; ``None``: all with full attention.
        layout: see `chunk_channels`; ``None`` finds the model's own.

    Returns:
        The ranking.

    Raises:
        LimitError: k below 1, texts of less than 2 k tokens, fewer than 2 steps.
        UnsupportedError: a model without rotary positions and no layout.
    """
    k_list = (k,) if isinstance(k, int) else tuple(k)
    length = input_ids.shape[1] if attention_mask is None else int(attention_mask.sum(-1).min())
    if not k_list or any(isinstance(one, bool) or one < 1 for one in k_list):
        raise LimitError("calibrate", "k", k, "at least 1")
    if length < 2 * max(k_list):
        mend = "Among so few keys every chunk agrees: use longer texts, or a smaller k."
        raise LimitError("calibrate", "the shortest text", length, f"at least 2 k = {2 * max(k_list)} tokens", mend)
    if max_new_tokens < 2:
        raise LimitError("calibrate", "max_new_tokens", max_new_tokens, "at least 2")
    shape = attention_shape(model)
    layout, turned = (layout, shape.head_dim) if layout is not None else _own_layout(model, layers)
    watch = _Calibration(channels=chunk_channels(layout, shape.head_dim, turned), k_list=k_list, layers=layers)
    generate: Any = model.generate
    with watch.attach(model):
        generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids) if attention_mask is None else attention_mask,
            max_new_tokens=max_new_tokens,
            min_new_tokens=max_new_tokens,
            do_sample=False,
        )
    chosen = tuple(sorted(watch.sums))
    means = [torch.stack(watch.sums[index]).mean(0).cpu() for index in chosen]  # (n_K, H, C) each
    return FCRanking(
        ca=torch.stack(means, 1).transpose(2, 3).contiguous(),
        layers=chosen,
        k_list=k_list,
        layout=layout,
        head_dim=shape.head_dim,
        rotary_dim=turned,
        queries=len(watch.sums[chosen[0]]) * len(input_ids),
        made_on=_shape(model),
    )


def _own_layout(model: PreTrainedModel, layers: tuple[int, ...] | None) -> tuple[Layout, int]:
    """How the model pairs channels, and how many of a head it rotates."""
    first = SparseAttention.check(_Calibration(channels=torch.empty(0), k_list=(), layers=layers), model)[0]
    try:
        return rotated_chunks(layer_rotary("calibrate", model, first), attention_shape(model).head_dim)
    except UnsupportedError as error:
        mend = f"Pass layout= one of {', '.join(LAYOUTS)}; 'channels' needs no rotation."
        raise UnsupportedError("calibrate", error.what, mend) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class FASA(SparseAttention):
    """FASA on the decoding of a model.

    Attributes:
        ranking: what `calibrate` gave.
        keep: keys that each head reads: a count, or a share of the cached ones.
        n_tip: chunks by which each head ranks: a count, or a share of them.
        share: "head": every query head chooses for itself; "kv_group": the heads of a KV head choose together.
        layers: indices of the layers; None means all with full attention.
    """

    ranking: FCRanking = field(kw_only=False)
    keep: int | float = 256  # N_fac, section 5
    n_tip: int | float = 0.25  # 16 of the 64 chunks of a head of 128 channels
    share: Literal["head", "kv_group"] = "head"
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check("FASA", self.keep)
        check("FASA", self.n_tip, parameter="n_tip")
        if self.n_tip > self.ranking.chunks:
            raise LimitError("FASA", "n_tip", self.n_tip, f"at most C = {self.ranking.chunks}, the chunks of a head")
        if self.share not in ("head", "kv_group"):
            raise unknown_name("FASA", "share", self.share, ("head", "kv_group"))

    @property
    def by_head(self) -> bool:
        """Heads of a group choose apart unless they share."""
        return self.share == "head"

    def check(self, model: PreTrainedModel) -> tuple[int, ...]:
        """See `SparseAttention.check`; the ranking has to be one of this model.

        Raises:
            LimitError: a ranking of another model.
        """
        chosen, shape, ranking = SparseAttention.check(self, model), attention_shape(model), self.ranking
        sizes = (ranking.heads, ranking.head_dim)
        made, here = dict(ranking.made_on), dict(_shape(model))
        rope = made.pop("rope_type", None), here.pop("rope_type", None)
        if sizes != (shape.heads, shape.head_dim) or (made and made != here) or set(chosen) - set(ranking.layers):
            limit = f"one of this model: {shape.heads} heads x {shape.head_dim} channels, layers {chosen}"
            found = f"of {ranking.heads} heads x {ranking.head_dim} channels, layers {ranking.layers}"
            raise LimitError("FASA", "ranking", found, limit, f"It was made on {made or 'no model'}; calibrate anew.")
        if made and rope[0] != rope[1]:
            warnings.warn(f"FASA: the ranking was made with rotary positions of type {rope[0]!r}", stacklevel=3)
        return chosen

    def read(self, reading: Reading) -> Answer:
        """See `SparseAttention.read`."""
        n_tip = to_count("FASA", self.n_tip, self.ranking.chunks, parameter="n_tip")
        dims = self.ranking.to_dims(n_tip, k=self.keep if isinstance(self.keep, int) else None)
        dims = dims[self.ranking.layers.index(reading.layer)].to(reading.query.device)  # (H, m)
        tip = self._tip(reading, dims)
        keep = to_count("FASA", self.keep, reading.size)
        if reading.queries > 1 or reading.size <= keep:
            return reading.on_device().dense()
        batch, groups = reading.key.shape[:2]
        score = tip_scores(reading.query, tip, dims)  # (B, H, S)
        reading.count_scored(tip[..., 0].numel(), share=dims.shape[1] / reading.key.shape[3], rows=batch)
        if self.share == "kv_group":
            score = score.view(batch, groups, -1, reading.size).sum(2)
        visible = reading.seen(0, 1, reading.size)[:, :1, 0].expand(batch, score.shape[1], -1)
        index = top_indices(score.nan_to_num(nan=-torch.inf).masked_fill(~visible, -torch.inf), keep)
        seen = visible.gather(-1, index)
        if self.share == "kv_group":
            index = index.repeat_interleave(reading.query.shape[1] // groups, 1)
            seen = seen.repeat_interleave(reading.query.shape[1] // groups, 1)
        reading.count_read(
            seen.numel() if self.share == "head" else batch * groups * keep,
            end=reading.size,
            heads=seen.shape[1] if self.share == "head" else groups,
        )
        softcap = reading.options.get("softcap")
        out = fac(
            reading.query,
            reading.key,
            reading.value,
            index,
            scaling=reading.scaling,
            seen=seen[:, :, None],
            softcap=softcap,
        )
        return out.transpose(1, 2).contiguous(), None

    def _tip(self, reading: Reading, dims: Tensor) -> Tensor:
        """The dominant channels of all keys, (B, H, S, m): a copy beside the cache, so that a step reads only these."""
        if reading.call.past_key_values is None:
            return dominant_keys(reading.key, dims)
        layer = token_state(reading.call.past_key_values, reading.layer, visible=reading.size)
        new = layer.missing("fasa")
        fresh = reading.key[:, :, reading.size - new :].to(dims.device)
        return layer.append_state("fasa", dominant_keys(fresh, dims))


def _shape(model: PreTrainedModel) -> tuple[tuple[str, Any], ...]:
    """What a ranking has to share with the model that it is used on."""
    shape, config = attention_shape(model), text_config(model)
    rope = getattr(config, "rope_parameters", None) or {}
    return (
        ("model_type", config.model_type),
        ("layers", shape.layers),
        ("heads", shape.heads),
        ("kv_heads", shape.kv_heads),
        ("hidden_size", config.hidden_size),
        ("rope_type", rope.get("rope_type") or rope.get("full_attention", {}).get("rope_type")),
    )


def small() -> FASA:
    """Half of the chunks, 6 of 24 tokens, with a ranking that fits every tiny model."""
    ca = torch.rand(1, 6, 4, 4, generator=torch.Generator().manual_seed(0))
    ranking = FCRanking(ca, layers=tuple(range(6)), k_list=(6,), layout="half_split", head_dim=8, rotary_dim=8)
    return FASA(ranking, keep=6, n_tip=2)
