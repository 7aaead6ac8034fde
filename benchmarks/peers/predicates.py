"""Predicates on text that a peer and tokenmill are both given: one source, so that both check the same thing."""

from __future__ import annotations


def no_letter_e(text: str) -> bool:
    """No letter e, in either case."""
    return "e" not in text and "E" not in text


def short_words(text: str) -> bool:
    """No word of more than five letters."""
    return all(len(word) <= 5 for word in text.split())
