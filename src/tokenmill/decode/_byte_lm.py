"""A token model as a model of bytes: its state, its text, several of them as one."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from tokenmill.decode._adjacency import vocabulary
from tokenmill.decode._byte_text import ByteState, ByteText, check_sampling, generate_bytes, mix
from tokenmill.decode._byte_view import ByteTokenizerView
from tokenmill.decode._byte_vocabulary import Vocabulary
from tokenmill.decode._covers import ByteTrace, Covers, Machine, start_all, start_valid
from tokenmill.decode._token_tree import TokenTree
from tokenmill.errors import LimitError, UnsupportedError, unknown_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Mode = Literal["valid", "all"]


@dataclass(frozen=True, slots=True)
class FillInTheMiddle:
    """How a model wants a text with a gap: the names of its control tokens, and which part stands before the gap.

    Attributes:
        prefix: opens the text before the gap.
        suffix: opens the text behind it.
        middle: opens the gap.
        order: ``"spm"`` puts the text before the gap last, directly before what is generated, so that it may end
            inside a token; with ``"psm"`` it is closed by a control token, which is a hard boundary.
    """

    prefix: str = "<|fim_prefix|>"
    suffix: str = "<|fim_suffix|>"
    middle: str = "<|fim_middle|>"
    order: Literal["psm", "spm"] = "spm"

    def __post_init__(self) -> None:
        if self.order not in ("psm", "spm"):
            raise unknown_name("FillInTheMiddle", "order", str(self.order), ("psm", "spm"))

    def arrange(
        self, view: ByteTokenizerView, before: bytes, after: bytes, head: Sequence[int]
    ) -> tuple[list[int], bytes]:
        """Tokens of the hard context, and the bytes that are open at their end.

        Raises:
            LimitError: the tokenizer has no such control token.
        """
        ids = []
        for name in (self.prefix, self.suffix, self.middle):
            if name not in view.token_bytes.specials:
                mend = "Give the model's own names, FillInTheMiddle(prefix=..., suffix=..., middle=...)."
                raise LimitError("FillInTheMiddle", "control token", name, "one of the tokenizer's specials", mend)
            ids.append(view.token_bytes.specials[name])
        opening, behind, gap = ids
        if self.order == "psm":
            return [*head, opening, *view.encode(before), behind, *view.encode(after), gap], b""
        # The order that models with both are trained on: an empty prefix, the suffix, then the prefix in the gap.
        return [*head, opening, behind, *view.encode(after), gap], before


@dataclass(frozen=True)
class ByteLM:
    """A token model as a model of bytes.

    Args:
        model: a causal language model of transformers (sdpa or eager attention).
        tokenizer: its tokenizer, or a `ByteTokenizerView`.
        mode: ``"valid"`` is the model restricted to valid encodings, renormalised at each step; ``"all"`` sums over
            all segmentations of the model as it is.
        beam: contexts that are evaluated for a byte at most (mode ``"all"``); ``None`` keeps all, which is exact and
            grows with the text.
        lookback: bytes before the end of a prompt from which on other segmentations than the tokenizer's count (mode
            ``"all"``); ``None``: from the start.
        context: token ids before the text; ``None`` is the beginning-of-text token, or the end-of-text token of a
            tokenizer without one.
        end: token ids that end a text; ``None``: those of the model's generation settings, or the tokenizer's.
        temperature: of tokens, inside the sums; the temperature of bytes is an argument of `generate`.

    Raises:
        LimitError: an unknown mode, a beam below 1, no token to start from.
        UnsupportedError: a tokenizer that cannot be read as bytes, or attention that takes no mask of ancestors.
    """

    model: PreTrainedModel
    tokenizer: Any
    _: KW_ONLY
    mode: Mode = "valid"
    beam: int | None = None
    lookback: int | None = None
    context: Sequence[int] | None = None
    end: Sequence[int] | None = None
    temperature: float = 1.0
    trace: ByteTrace = field(default_factory=ByteTrace, compare=False, repr=False)
    view: ByteTokenizerView = field(init=False, compare=False, repr=False)
    vocabulary: Vocabulary = field(init=False, compare=False, repr=False)
    head: tuple[int, ...] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_mode("ByteLM", self.mode, self.beam, self.lookback)
        if not self.temperature > 0:
            raise LimitError("ByteLM", "temperature", self.temperature, "above 0")
        for name in ("context", "end"):  # so that the settings stay as they are
            given = getattr(self, name)
            object.__setattr__(self, name, None if given is None else tuple(int(i) for i in given))
        object.__setattr__(self, "view", view_of(self.tokenizer))
        ends = end_ids(self.model.generation_config, self.tokenizer) if self.end is None else list(self.end)
        object.__setattr__(
            self, "vocabulary", Vocabulary.of(self.view, vocabulary(self.model), ends, self.model.device)
        )
        object.__setattr__(self, "head", self._head(ends))

    def _head(self, ends: Sequence[int]) -> tuple[int, ...]:
        if self.context is not None:
            if len(self.context) == 0:
                raise LimitError("ByteLM", "context", [], "at least one token", "Give a token to start from.")
            return tuple(self.context)
        for source in (self.tokenizer, self.model.generation_config, self.model.config):
            if (bos := getattr(source, "bos_token_id", None)) is not None:
                return (int(bos),)
        if not ends:
            raise LimitError("ByteLM", "context", None, "token ids, since the tokenizer has no bos and no eos")
        return (ends[0],)

    def start(
        self,
        x: bytes | str = b"",
        *,
        context: Sequence[int] | None = None,
        temperature: float | None = None,
        scored: bool = False,
    ) -> Covers:
        """The state behind a text that may end anywhere.

        Args:
            x: the text; special tokens written in it are read as plain text.
            context: token ids before it, instead of the model's own.
            temperature: of tokens, instead of the model's own.
            scored: let `Covers.logp` count from the first byte of x, which costs a sum for each token of x.

        Raises:
            LimitError: bytes that the tokenizer cannot begin, a text longer than the model's positions, or (mode
                ``"all"``) a beam that lost every segmentation of x.
        """
        data = x.encode() if isinstance(x, str) else bytes(x)
        head = self.head if context is None else tuple(context)
        if not head:
            raise LimitError("ByteLM", "context", list(head), "at least one token", "Give a token to start from.")
        tree = TokenTree("ByteLM", self.model, self.trace)
        view = self.view if self.mode == "valid" else None
        warmth = self.temperature if temperature is None else temperature
        machine = Machine(tree, view, self.vocabulary, self.beam, warmth, self.trace)
        if view is not None:
            return start_valid(machine, view, data, head, scored=scored)
        fixed = self._fixed(data)
        if scored and fixed:
            raise UnsupportedError("ByteLM", "probabilities of whole texts need lookback=None in mode 'all'")
        return start_all(machine, data, head, fixed, len(self.view.token_bytes.join(fixed)))

    def _fixed(self, data: bytes) -> list[int]:
        """Tokens of a prompt that are taken as the tokenizer has them (mode ``"all"``)."""
        if self.lookback is None:
            return []
        ids, left = self.view.encode(data), len(data) - self.lookback
        spelled = 0
        for count, token in enumerate(ids):
            spelled += len(self.view.token_bytes[token] or b"")
            if spelled > left:
                return ids[:count]
        return ids if left >= 0 else []

    def prefix_logprob(self, x: bytes | str) -> float:
        """Log-probability, in nats, that a text begins with x; 0 for the empty string."""
        return self.start(x, scored=True).logp

    def next_byte_logprobs(self, x: bytes | str) -> Tensor:
        """(258,) float64: log-law of what follows x: 256 bytes, `END`, and `OTHER` for the other control tokens."""
        return self.start(x).logprobs()

    def generate(
        self,
        x: bytes | str,
        *,
        max_new_bytes: int = 500,
        temperature: float = 0.6,
        top_p: float = 1.0,
        temperature_at: Literal["byte", "token"] = "byte",
        stop: Sequence[bytes] = (),
        context: Sequence[int] | None = None,
        generator: torch.Generator | None = None,
    ) -> ByteText:
        """Continue a text byte by byte.

        Args:
            x: the text, which may end anywhere.
            max_new_bytes: at most.
            temperature: 0 takes the likeliest byte. The temperature of bytes and that of tokens give different laws.
            top_p: mass of the likeliest bytes that are kept.
            temperature_at: ``"token"`` tempers the model's own law inside the sums instead.
            stop: byte strings that end the text, such as ``[b"\\n"]``.
            generator: of the draws.

        Raises:
            LimitError: settings outside their limits, or a prompt that cannot be read.
        """
        check_sampling("ByteLM.generate", temperature, top_p)
        if temperature_at not in ("byte", "token"):
            raise unknown_name("ByteLM.generate", "temperature_at", str(temperature_at), ("byte", "token"))
        inner = None
        if temperature_at == "token" and temperature > 0:
            inner, temperature = temperature, 1.0
        return generate_bytes(
            self.start(x, context=context, temperature=inner),
            max_new_bytes=max_new_bytes,
            temperature=temperature,
            top_p=top_p,
            stop=stop,
            generator=generator,
        )

    def infill(self, before: str | bytes, after: str | bytes, format: FillInTheMiddle, **settings: Any) -> ByteText:
        """Fill the gap between two texts, for a model that was trained to; ``settings`` are those of `generate`.

        Only with ``order="spm"`` the text before the gap may end inside a token: in the other order a control token
        stands behind it.
        """
        data = [part.encode() if isinstance(part, str) else part for part in (before, after)]
        context, x = format.arrange(self.view, data[0], data[1], self.head)
        return self.generate(x, context=context, **settings)


@dataclass(frozen=True)
class ByteEnsemble:
    """Several models of bytes as one; their vocabularies may differ.

    Args:
        members: `ByteLM` objects, or anything with ``start(x)``.
        weights: one each, normalised; ``None`` for equal ones.
        rule: ``"mean"`` averages the laws of the next byte, so that the log-loss is at most that of the best of M equal
            members plus log M for each byte; ``"product"`` averages their logarithms and renormalises.

    Raises:
        LimitError: no members, weights that do not fit, an unknown rule.
    """

    members: Sequence[Any]
    _: KW_ONLY
    weights: Sequence[float] | None = None
    rule: Literal["mean", "product"] = "mean"

    def __post_init__(self) -> None:
        if not self.members:
            raise LimitError("ByteEnsemble", "members", 0, "at least one model")
        weights = [1.0] * len(self.members) if self.weights is None else list(self.weights)
        good = len(weights) == len(self.members) and all(w >= 0 and math.isfinite(w) for w in weights) and sum(weights)
        if not good:
            raise LimitError(
                "ByteEnsemble", "weights", weights, f"{len(self.members)} numbers of at least 0, not all of them 0"
            )
        if self.rule not in ("mean", "product"):
            raise unknown_name("ByteEnsemble", "rule", str(self.rule), ("mean", "product"))
        object.__setattr__(self, "members", tuple(self.members))
        object.__setattr__(self, "weights", tuple(w / sum(weights) for w in weights))

    def start(self, x: bytes | str = b"") -> EnsembleState:
        """The state behind a text that may end anywhere."""
        return EnsembleState(self, tuple(member.start(x) for member in self.members))

    def next_byte_logprobs(self, x: bytes | str) -> Tensor:
        """(258,) float64: log-law of what follows x; controls are matched by meaning."""
        return self.start(x).logprobs()

    def generate(
        self,
        x: bytes | str,
        *,
        max_new_bytes: int = 500,
        temperature: float = 0.6,
        top_p: float = 1.0,
        stop: Sequence[bytes] = (),
        generator: torch.Generator | None = None,
    ) -> ByteText:
        """Continue a text byte by byte; every member reads each chosen byte. See `ByteLM.generate`."""
        return generate_bytes(
            self.start(x),
            max_new_bytes=max_new_bytes,
            temperature=temperature,
            top_p=top_p,
            stop=stop,
            generator=generator,
        )


@dataclass(frozen=True, slots=True)
class EnsembleState:
    """The states of an ensemble's members behind the same bytes."""

    of: ByteEnsemble
    states: tuple[ByteState, ...]

    @property
    def length(self) -> int:
        """Bytes that were read."""
        return self.states[0].length

    def logprobs(self) -> Tensor:
        """(258,) float64, see `mix`."""
        return mix([state.logprobs() for state in self.states], self.of.weights or (), self.of.rule)

    def push(self, byte: int) -> EnsembleState:
        """The state behind one more byte."""
        return replace(self, states=tuple(state.push(byte) for state in self.states))


_VIEWS: weakref.WeakKeyDictionary[Any, ByteTokenizerView] = weakref.WeakKeyDictionary()


def view_of(tokenizer: Any) -> ByteTokenizerView:
    """The view of a tokenizer, made once for each object: a large vocabulary takes seconds."""
    if isinstance(tokenizer, ByteTokenizerView):
        return tokenizer
    try:
        if tokenizer not in _VIEWS:
            _VIEWS[tokenizer] = ByteTokenizerView(tokenizer)
        return _VIEWS[tokenizer]
    except TypeError:  # an object that cannot be referred to weakly
        return ByteTokenizerView(tokenizer)


def check_mode(where: str, mode: str, beam: int | None, lookback: int | None) -> None:
    """Refuse an unknown mode, a beam below 1, a negative lookback, and either of them in mode 'valid'."""
    if mode not in ("valid", "all"):
        raise unknown_name(where, "mode", str(mode), ("valid", "all"))
    for name, value, least in (("beam", beam, 1), ("lookback", lookback, 0)):
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise LimitError(where, name, value, f"None or an integer of at least {least}")


def end_ids(config: Any, tokenizer: Any) -> list[int]:
    """Ids that end a text: those of the generation settings, or else the tokenizer's."""
    for source in (config, tokenizer):
        found = getattr(source, "eos_token_id", None)
        if found is not None:
            return [int(i) for i in (found if isinstance(found, list | tuple) else torch.as_tensor(found).flatten())]
    return []
