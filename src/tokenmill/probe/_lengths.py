"""Lengths of haystacks in the tokens of a tokenizer: counted on the whole text, since merges cross every boundary."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tokenmill.errors import LimitError
from tokenmill.probe._haystack import PAIR_CHARS, Keys, haystack, pair_chars

_SLOW_CHARS = 1_000_000
_PROFILED = 200  # pairs of the haystack that a profile measures


def count_tokens(tokenizer: Any, text: str) -> int:
    """How many tokens a text is, without special tokens. Warns where a slow tokenizer meets a long text.

    Args:
        tokenizer: of transformers or tokenizers, or any object with ``encode(text)``.
        text: of any length.
    """
    from tokenmill.text._tokenizer_report import encoder

    if len(text) > _SLOW_CHARS and getattr(tokenizer, "is_fast", True) is False:
        said = f"count_tokens: {len(text):,} characters with a tokenizer that is not fast; this takes a while"
        warnings.warn(said, stacklevel=2)
    return len(encoder(tokenizer)(text))


def pairs_within(count: Callable[[int], int], target: int) -> int:
    """The largest N with ``count(N) <= target``, for a count that does not fall with N; 0 when one pair is too much."""
    low, high = 0, 1
    while count(high) <= target:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) <= target else (low, middle)
    return low


def pairs_of(
    n_pairs: int | None = None,
    n_chars: int | None = None,
    n_tokens: int | None = None,
    tokenizer: Any = None,
    seed: int = 0,
    keys: Keys = "uuid",
) -> int:
    """The number of pairs that exactly one of three lengths asks for: as it is, or the most that stay within it.

    Raises:
        LimitError: none or several lengths, one that is not positive or below one pair, tokens without a tokenizer.
    """
    where = "haystack"
    given = {k: v for k, v in (("n_pairs", n_pairs), ("n_chars", n_chars), ("n_tokens", n_tokens)) if v is not None}
    if len(given) != 1:
        raise LimitError(where, "length", given or None, "exactly one of n_pairs, n_chars, n_tokens")
    ((name, value),) = given.items()
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise LimitError(where, name, value, "a whole number, at least 1")
    if name == "n_pairs":
        return value
    if name == "n_chars":
        if value < pair_chars(keys):
            raise LimitError(where, name, value, f"at least {pair_chars(keys)}, the characters of one pair")
        return value // pair_chars(keys)
    if tokenizer is None:
        raise LimitError(where, "tokenizer", None, "given together with n_tokens")
    found = pairs_within(lambda n: count_tokens(tokenizer, haystack(n, seed, keys)), value)
    if not found:
        needed = count_tokens(tokenizer, haystack(1, seed, keys))
        raise LimitError(where, name, value, f"at least {needed}, this tokenizer's tokens of one pair")
    return found


@dataclass(frozen=True, slots=True)
class TokenProfile:
    """What one tokenizer makes of one text.

    Attributes:
        tokenizer: its name.
        text: the text's name; "haystack" is the library's own.
        characters: of the text.
        tokens: of the whole text.
        tokens_per_pair: of a haystack; None for other texts.
        chars_per_token: characters over tokens.
        context_chars: characters of such a text that fit in `n_tokens`: counted for the haystack, by ratio otherwise.
        n_tokens: the length that `context_chars` belongs to.
    """

    tokenizer: str
    text: str
    characters: int
    tokens: int
    tokens_per_pair: float | None
    chars_per_token: float
    context_chars: int
    n_tokens: int


def token_profile(
    tokenizers: Mapping[str, Any], texts: Mapping[str, str] | None = None, *, n_tokens: int = 8192
) -> list[TokenProfile]:
    """Why token counts of two models cannot be compared: the same texts cut by several tokenizers.

    Args:
        tokenizers: name -> tokenizer.
        texts: name -> text, beside a haystack of 200 pairs that is always measured.
        n_tokens: the context length for which characters are given; each tokenizer has it in its own tokens.

    Returns:
        One profile for each text and tokenizer, haystack first.

    Raises:
        LimitError: no tokenizer, an empty text, the name "haystack", or a length below one pair.
    """
    if not tokenizers:
        raise LimitError("token_profile", "tokenizers", [], "at least one")
    for name, text in (texts or {}).items():
        if not text or name == "haystack":
            raise LimitError("token_profile", "texts", name, "texts that are not empty and not called haystack")
    found = []
    for text_name, text in {"haystack": haystack(_PROFILED), **(texts or {})}.items():
        for name, tokenizer in tokenizers.items():
            tokens = count_tokens(tokenizer, text)
            rate = len(text) / tokens
            own = text_name == "haystack"
            fits = PAIR_CHARS * pairs_of(n_tokens=n_tokens, tokenizer=tokenizer) if own else int(n_tokens * rate)
            per_pair = tokens / _PROFILED if own else None
            found.append(TokenProfile(name, text_name, len(text), tokens, per_pair, rate, fits, n_tokens))
    return found
