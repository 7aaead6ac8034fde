"""Text made byte by byte: from any state that has a law of the next byte and takes one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from tokenmill.decode._byte_vocabulary import END, OTHER
from tokenmill.errors import LimitError, StoppedError, TokenmillError, unknown_name

_GREEDY_BELOW = 1e-6


class ByteState(Protocol):
    """What is known behind some bytes: a value, so that `push` leaves it as it is."""

    @property
    def length(self) -> int: ...
    def logprobs(self) -> Tensor: ...
    def push(self, byte: int, /) -> ByteState: ...


@dataclass(frozen=True, slots=True)
class ByteText:
    """Bytes that were generated.

    Attributes:
        data: the new bytes.
        ended: the model ended the text itself.
    """

    data: bytes
    ended: bool

    @property
    def text(self) -> str:
        """The bytes as text; what is no UTF-8 is replaced."""
        return self.data.decode("utf-8", errors="replace")


def shape_law(logprobs: Tensor, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """The law that is sampled from: control tokens other than the end taken out, then temperature, top-k and top-p.

    Args:
        logprobs: (SLOTS,) float64.
        temperature: above 0; the law to the power of its inverse, renormalised.
        top_k: slots that are kept, 0 for all.
        top_p: the likeliest slots that together reach this mass are kept.

    Returns:
        (SLOTS,) float64 probabilities.

    Raises:
        LimitError: temperature, top_k or top_p outside its limit.
    """
    check_sampling("shape_law", temperature, top_p)
    law = logprobs.clone()
    law[OTHER] = -math.inf
    law = (law / temperature).softmax(0)
    if top_k or top_p < 1.0:
        value, order = law.sort(descending=True)
        keep = value.cumsum(0) - value < top_p  # the slot that crosses the limit stays
        if top_k:
            keep[top_k:] = False
        law = torch.zeros_like(law).index_copy(0, order, value * keep)
        law = law / law.sum()
    return law


def choose_slot(
    logprobs: Tensor, *, temperature: float, top_k: int, top_p: float, generator: torch.Generator | None
) -> int:
    """A byte or ``END``: a draw from the shaped law, the likeliest one at temperature 0."""
    if temperature < _GREEDY_BELOW:
        law = logprobs.clone()
        law[OTHER] = -math.inf
        return int(law.argmax())
    law = shape_law(logprobs, temperature=temperature, top_k=top_k, top_p=top_p)
    return int(torch.multinomial(law, 1, generator=generator))


def check_sampling(where: str, temperature: float, top_p: float) -> None:
    """Refuse a temperature below 0 (or not a number) and a top-p outside (0, 1]."""
    if not temperature >= 0.0 or math.isinf(temperature):
        raise LimitError(where, "temperature", temperature, "at least 0", "0 takes the likeliest byte.")
    if not 0.0 < top_p <= 1.0:
        raise LimitError(where, "top_p", top_p, "in (0, 1]")


def generate_bytes(
    state: ByteState,
    *,
    max_new_bytes: int,
    temperature: float,
    top_p: float,
    stop: Sequence[bytes] = (),
    generator: torch.Generator | None = None,
) -> ByteText:
    """Choose a byte, push it, again.

    Args:
        state: behind the prompt.
        max_new_bytes: at most; a last character that would be cut is left out.
        temperature: 0 takes the likeliest byte.
        top_p: see `shape_law`.
        stop: byte strings that end the text; they are not part of it.
        generator: of the draws.

    Raises:
        LimitError: settings outside their limits.
        StoppedError: anything that went wrong on the way, with the `ByteText` so far in ``.partial``.
    """
    check_sampling("generate", temperature, top_p)
    if max_new_bytes < 1:
        raise LimitError("generate", "max_new_bytes", max_new_bytes, "at least 1")
    data = bytearray()
    try:
        while len(data) < max_new_bytes:
            slot = choose_slot(state.logprobs(), temperature=temperature, top_k=0, top_p=top_p, generator=generator)
            if slot == END:
                return ByteText(bytes(data), True)
            data.append(slot)
            ends = [data.find(text, max(0, len(data) - len(text))) for text in stop if text]
            if any(at >= 0 for at in ends):
                return ByteText(bytes(data[: min(at for at in ends if at >= 0)]), False)
            if len(data) < max_new_bytes:
                state = state.push(slot)
    except TokenmillError as error:
        error.partial = ByteText(bytes(data), False)
        raise
    except Exception as error:
        made = ByteText(bytes(data), False)
        raise StoppedError(f"generate: stopped after {len(data)} bytes: {error}", partial=made) from error
    return ByteText(bytes(data[: whole_characters(bytes(data))]), False)


def whole_characters(data: bytes) -> int:
    """How many leading bytes do not include a character that is cut at the end."""
    for back in range(1, min(3, len(data)) + 1):
        byte = data[-back]
        if byte >= 0xC0:  # a first byte of two to four
            wanted = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return len(data) - back if back < wanted else len(data)
        if byte < 0x80:
            break
    return len(data)


def mix(laws: Sequence[Tensor], weights: Sequence[float], rule: Literal["mean", "product"]) -> Tensor:
    """One law from several.

    Args:
        laws: (SLOTS,) float64 log-probabilities each.
        weights: one each, summing to 1.
        rule: ``"mean"`` averages probabilities, ``"product"`` averages their logarithms and renormalises.

    Returns:
        (SLOTS,) float64 log-probabilities.

    Raises:
        LimitError: no laws, weights that do not fit, an unknown rule, members without a common slot.
    """
    stacked = torch.stack([law.to(laws[0].device) for law in laws])  # (M, SLOTS)
    share = torch.tensor(weights, dtype=stacked.dtype, device=stacked.device)[:, None]
    if rule == "mean":
        return (stacked + share.log()).logsumexp(0)
    if rule != "product":
        raise unknown_name("ByteEnsemble", "rule", str(rule), ("mean", "product"))
    total = torch.where(share > 0, stacked * share, torch.zeros_like(stacked)).sum(0)
    if bool((total == -math.inf).all()):
        raise LimitError("ByteEnsemble", "members", len(laws), "in agreement on at least one next byte", "Use 'mean'.")
    return total.log_softmax(0)
