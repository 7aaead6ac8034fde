"""One face for every masked diffusion model: logits for chosen places, whatever the model's class."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokenmill import hf
from tokenmill.errors import LimitError, UnsupportedError

_PROBE_TOKENS = 4
_probed: weakref.WeakKeyDictionary[nn.Module, set[tuple[Any, ...]]] = weakref.WeakKeyDictionary()


@dataclass(slots=True)
class Batch:
    """One pass in padded form.

    Attributes:
        logits: (B, Q, V) float32, minus infinity at ids that must never come out.
        targets: (B, Q) int64, the place that each row of logits predicts.
        valid: (B, Q) bool, false at what pads the batch and at targets behind the last place.
        queries, keys: (B,) int64, places fed and places read in each row.
    """

    logits: Tensor
    targets: Tensor
    valid: Tensor
    queries: Tensor
    keys: Tensor


class Denoiser:
    """A bidirectional model as a function from ids with masks to logits.

    Args:
        model: a decoder of transformers that is configured bidirectional (``is_causal=False``; Gemma 3:
            ``use_bidirectional_attention=True``), a masked language model (BERT, ModernBERT; without cache), or an
            object with the call of LLaDA (``input_ids, attention_mask``) or Dream (``..., position_ids``) that the
            user has built.
        mask_token_id: the id of the mask; it never comes out. None for a model without one (a guide).
        eos_token_ids: ids that end a text.
        logits_shift: the prediction for a place is the logits of the place before it (Dream).
        suppress_tokens: further ids that never come out.
        causal: the model is autoregressive on purpose, and attention stays causal.

    Raises:
        LimitError: ids outside the vocabulary, or a mask id that is also an end id.
        UnsupportedError: attention that takes no explicit mask.
    """

    def __init__(
        self,
        model: Any,
        *,
        mask_token_id: int | None,
        eos_token_ids: Iterable[int] = (),
        logits_shift: bool = False,
        suppress_tokens: Iterable[int] = (),
        causal: bool = False,
    ) -> None:
        where, self.model = "Denoiser", model
        self.shift, self.causal = logits_shift, causal
        self.mask_id = -1 if mask_token_id is None else mask_token_id
        masks = () if mask_token_id is None else (mask_token_id,)
        self.eos_ids = tuple(dict.fromkeys(eos_token_ids))
        self.suppressed = (*masks, *suppress_tokens)
        vocabulary = getattr(model.config, "vocab_size", None)
        for name, ids in (("mask_token_id", masks), ("eos_token_ids", self.eos_ids), ("suppress", self.suppressed)):
            bad = [i for i in ids if i < 0 or (vocabulary is not None and i >= vocabulary)]
            if bad:
                raise LimitError(where, name, bad[0], f"in [0, {vocabulary}), the model's vocabulary")
        if mask_token_id in self.eos_ids:
            raise LimitError(where, "mask_token_id", mask_token_id, f"none of the end ids {list(self.eos_ids)}")
        self.name = type(model).__name__
        self.kind = _kind(model)
        self.takes_positions = "position_ids" in _parameters(model)
        self.window = hf.sliding_window(model) if self.kind == "decoder" else None
        self.form = hf.mask_form(where, model) if self.kind == "decoder" else "bool"
        self._linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))

    @property
    def dtype(self) -> torch.dtype:
        """Of the model's weights."""
        return next(self.model.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Where the model's weights are."""
        return next(self.model.parameters()).device

    def check_bidirectional(self) -> None:
        """Change the last of a few tokens and look whether the logits in front of it move.

        Raises:
            UnsupportedError: they do not, so the model is causal.
        """
        if self.causal or self._known("bidirectional"):
            return
        ids = self._probe_ids()
        with torch.no_grad():
            logits = self.model(input_ids=ids).logits.float()
        gap = (logits[0, :-1] - logits[1, :-1]).abs().max()
        if not bool(gap > 1e-6 * logits.abs().max()):
            raise UnsupportedError(
                "Denoiser",
                f"{self.name} is causal: another last token changes no logits in front of it",
                "Build it with is_causal=False (Gemma 3: use_bidirectional_attention=True) and weights that were "
                "trained so, or pass causal=True if you mean it.",
            )
        self._learn("bidirectional")

    def check_cache(self) -> None:
        """Recompute one token of a few through the cache and look whether the logits stay.

        Raises:
            UnsupportedError: the model takes no cache, or one that cannot be written by place.
        """
        if self._known("cache"):
            return
        mend = "Use NoCache."
        if "past_key_values" not in _parameters(self.model):
            raise UnsupportedError("Denoiser", f"{self.name} has no KV cache (no argument past_key_values)", mend)
        x = self._probe_ids()
        everything = torch.ones_like(x, dtype=torch.bool)
        one = everything.clone()
        one[:, :-1] = False
        one[1, 0] = True  # rows of different sizes
        full = self.logits(x).logits
        try:
            cache = self.new_cache(*x.shape)
            self.logits(x, compute=everything, cache=cache)
            again = self.logits(x, compute=one, read=everything, cache=cache).logits
        except (AttributeError, TypeError, ValueError, IndexError, KeyError, RuntimeError) as error:
            raise UnsupportedError("Denoiser", f"{self.name} takes no cache of transformers ({error})", mend) from error
        gap = (again[:, :1] - full[[[0], [1]], [[_PROBE_TOKENS - 1], [0]]]).nan_to_num(posinf=0, neginf=0).abs().max()
        if not bool(gap < 1e-2 * full[full.isfinite()].abs().max()):
            raise UnsupportedError("Denoiser", f"{self.name} does not recompute single places through a cache", mend)
        self._learn("cache")

    def check_padding(self) -> None:
        """Put two paddings in front of a few tokens and look whether the tokens' logits differ.

        Raises:
            UnsupportedError: they do: the model attends to padding.
        """
        if self.kind == "decoder" or self._known("padding"):
            return
        ids = self._probe_ids()[:1].expand(2, -1).clone()
        ids[1, 0] = ids[0, 1]
        real = torch.ones_like(ids, dtype=torch.bool)
        real[:, 0] = False
        places = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        with torch.no_grad():
            logits = self.model(
                input_ids=ids, **self._call(real, real, self.default_positions(real), places, places)
            ).logits.float()
        gap = (logits[0, 1:] - logits[1, 1:]).abs().max()
        if bool(gap > 1e-4 * logits.abs().max()):
            raise UnsupportedError(
                "Denoiser",
                f"{self.name} attends to padding: it ignores attention_mask",
                "Decode prompts of equal length together, or one at a time.",
            )
        self._learn("padding")

    def new_cache(self, rows: int, size: int) -> hf.IndexedCache:
        """A cache for ``size`` places; with several rows it has room for what pads the batch."""
        layers = self.model if self.kind == "decoder" else self.model.config.num_hidden_layers
        return hf.IndexedCache(layers, capacity=size if rows == 1 else 2 * size)

    @staticmethod
    def default_positions(real: Tensor) -> Tensor:
        """(B, S) int64: 0 at a row's first real place; padding has 0 as well."""
        return (real.long().cumsum(1) - 1).clamp(min=0)

    def logits(
        self,
        x: Tensor,
        *,
        real: Tensor | None = None,
        positions: Tensor | None = None,
        compute: Tensor | None = None,
        read: Tensor | None = None,
        cache: hf.IndexedCache | None = None,
        frozen: Tensor | None = None,
    ) -> Batch:
        """One pass.

        Args:
            x: (B, S) int64.
            real: (B, S) bool, false at padding; ``None``: all are real.
            positions: (B, S) int64; ``None`` counts the real places of each row.
            compute: (B, S) bool, the places to feed; ``None`` for all real ones.
            read: (B, S) bool, the places that attention reads; ``None`` for all that are fed. Places beyond those
                need a cache that holds them.
            cache: written at ``compute`` and read at ``read``.
            frozen: (B,) int64, places below it must not be written.

        Raises:
            LimitError: a place to feed that is frozen.
        """
        real = torch.ones_like(x, dtype=torch.bool) if real is None else real
        positions = self.default_positions(real) if positions is None else positions
        compute = real if compute is None else compute
        read = compute if read is None else read
        if frozen is not None and bool((compute & (torch.arange(x.shape[1], device=x.device) < frozen[:, None])).any()):
            raise LimitError("Denoiser", "compute", "a frozen place", f"from place {frozen.tolist()} on")
        fed, given = _pack(compute)
        if cache is None:
            seen, shown = fed, given
        else:
            seen, shown = _pack(read)
            self._plan(cache, fed, given, seen, shown, x.shape[1])
        call = self._call(given, shown, positions.gather(1, fed), fed, seen, cache)
        with torch.no_grad():
            logits = self.model(input_ids=x.gather(1, fed), **call).logits
        logits = logits.float()
        if self.suppressed:
            logits = logits.index_fill(-1, torch.tensor(self.suppressed, device=logits.device), -torch.inf)
        targets = fed + int(self.shift)
        valid = given & (targets < x.shape[1])
        return Batch(logits, targets.clamp(max=x.shape[1] - 1), valid, compute.sum(1), shown.sum(1))

    def _plan(self, cache: hf.IndexedCache, fed: Tensor, given: Tensor, seen: Tensor, shown: Tensor, size: int) -> None:
        """Rows to write and read. What pads the batch is written behind the sequence, where nobody reads."""
        if fed.shape[0] == 1:
            write, rows = fed[0], seen[0]
            whole = rows.shape[0] == max(int(rows[-1]) + 1, cache.get_seq_length(), int(write[-1]) + 1)
            cache.plan(write=write, read=None if whole else rows)
            return
        spare = size + torch.arange(fed.shape[1], device=fed.device)
        write = torch.where(given, fed, spare)
        # A pad to read repeats a row that is there, and the mask hides it.
        there = torch.where(shown[:, :1], seen[:, :1], write[:, :1])
        cache.plan(write=write, read=torch.where(shown, seen, there))

    def _call(
        self,
        given: Tensor,
        shown: Tensor,
        positions: Tensor,
        fed: Tensor,
        seen: Tensor,
        cache: hf.IndexedCache | None = None,
    ) -> dict[str, Any]:
        """Keyword arguments of the model: mask, positions, cache."""
        call: dict[str, Any] = {"position_ids": positions} if self.takes_positions else {}
        if self.kind == "two_dimensional":
            return call | {"attention_mask": given.long()}
        mask = shown[:, None, None, :].expand(-1, 1, given.shape[1], -1)
        if self.causal or self.window is not None:
            gap = (fed[:, :, None] - seen[:, None, :])[:, None]
            mask = mask & (gap >= 0) if self.causal else mask
            near = mask if self.window is None else mask & (gap.abs() < self.window)
            call["attention_mask"] = self._forms(mask, near)
        else:
            call["attention_mask"] = hf.as_form(mask, self.form, self.dtype)
        if cache is not None:
            call |= {"past_key_values": cache, "use_cache": True}
        elif "use_cache" in _parameters(self.model):
            call["use_cache"] = False
        return call

    def _forms(self, mask: Tensor, near: Tensor) -> Tensor | dict[str, Tensor]:
        """The masks of full and of sliding layers, in the form that the model takes."""
        kinds = set(hf.layer_types(self.model)) if self.window is not None else {"full_attention"}
        each = {"full_attention": mask, "sliding_attention": near}
        made = {kind: hf.as_form(each[kind], self.form, self.dtype) for kind in kinds}
        return made if len(made) > 1 else next(iter(made.values()))

    def flops(self, queries: int, keys: int) -> float:
        """Operations of a pass of one row: 2 for each weight and query, 4 for each query, key and attention width."""
        config = self.model.config
        layers = getattr(config, "num_hidden_layers", None) or getattr(config, "n_layers", 0)
        heads = getattr(config, "num_attention_heads", None) or getattr(config, "n_heads", 1)
        hidden = getattr(config, "hidden_size", None) or getattr(config, "d_model", 0)
        width = heads * (getattr(config, "head_dim", None) or hidden // heads)
        return 2.0 * self._linear * queries + 4.0 * layers * width * queries * keys

    def _probe_ids(self) -> Tensor:
        """(2, 4) ids that differ in the last one; no mask, no end."""
        vocabulary = self.model.config.vocab_size
        usable = [i for i in range(min(vocabulary, 64)) if i not in (self.mask_id, *self.eos_ids)]
        if len(usable) < 2:
            raise LimitError("Denoiser", "vocab_size", vocabulary, "at least 2 ids besides mask and end")
        ids = [usable[-1 - i % len(usable)] for i in range(_PROBE_TOKENS)]
        return torch.tensor([[*ids[:-1], ids[1]], [*ids[:-1], ids[0]]], device=self.device)

    def _known(self, what: str) -> bool:
        return self._key(what) in _probed.get(self.model, ())

    def _learn(self, what: str) -> None:
        _probed.setdefault(self.model, set()).add(self._key(what))

    def _key(self, what: str) -> tuple[Any, ...]:
        config = self.model.config
        flags = ("is_causal", "use_bidirectional_attention", "_attn_implementation")
        return (what, self.causal, *(getattr(config, flag, None) for flag in flags))


def _kind(model: Any) -> str:
    """``decoder``: 4-D masks and a cache; ``two_dimensional``: masks (B, Q); ``four_dimensional``: no known cache."""
    parameters = _parameters(model)
    try:
        hf.attention_layers(model)
    except (UnsupportedError, AttributeError):
        if "attention_bias" in parameters or "position_ids" not in parameters:
            return "two_dimensional"
        own = type(model).__module__.startswith("transformers.")
        return "two_dimensional" if own else "four_dimensional"
    return "decoder" if "past_key_values" in parameters else "two_dimensional"


def _parameters(model: Any) -> frozenset[str]:
    return frozenset(inspect.signature(model.forward).parameters)


def _pack(places: Tensor) -> tuple[Tensor, Tensor]:
    """Sets (B, S) bool as ascending indices (B, Q), padded with other places, and which of them count."""
    counts = places.sum(1)
    most = max(int(counts.max()), 1)
    index = places.to(torch.int8).sort(dim=1, descending=True, stable=True).indices[:, :most]
    return index, torch.arange(most, device=places.device) < counts[:, None]
