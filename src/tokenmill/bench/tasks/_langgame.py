"""LangGame-lite: questions about the letters of words, with four answers to choose from.

Six kinds of question: which word has most of a letter, contains a piece, starts with it, ends with it, is longest, is
shortest. Right and wrong answers are kept well apart, so that nobody has to count exactly.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from tokenmill.errors import LimitError

OPTIONS = 4
_MANY, _FEW = 2, 1  # occurrences of a letter in the right word at least, in the others at most
_LONG, _NOT_LONG = 7, 4
_SHORT, _NOT_SHORT = 3, 6
_TRIES = 200

_WORDINGS: dict[str, tuple[str, ...]] = {
    "most": ("Which word has most of the letter {}?", "In which word does {} come most often?"),
    "contains": ("Which word contains {}?", "Which word has {} in it?"),
    "starts": ("Which word starts with {}?", "Which word begins with {}?"),
    "ends": ("Which word ends with {}?", "Which word finishes with {}?"),
    "longest": ("Which word is longest?", "Which word has most letters?"),
    "shortest": ("Which word is shortest?", "Which word has fewest letters?"),
}
KINDS = tuple(_WORDINGS)


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt that ends before the answer, the options, and which of them is right."""

    kind: str
    prompt: str
    options: tuple[str, ...]
    answer: int

    @property
    def text(self) -> str:
        """The prompt with the right answer."""
        return f"{self.prompt} {self.options[self.answer]}"


def frequent_words(texts: Iterable[str], most: int = 1000) -> list[str]:
    """The most frequent words of small letters, of 2 to 14 letters, in a fixed order."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(re.findall(r"(?<![A-Za-z_])[a-z]{2,14}(?![A-Za-z_])", text))
    return sorted(counts, key=lambda word: (-counts[word], word))[:most]


def questions(words: Sequence[str], count: int, rng: random.Random) -> list[Question]:
    """So many questions, the kinds in turn.

    Raises:
        LimitError: the words do not give a question of some kind.
    """
    return [_question(KINDS[i % len(KINDS)], words, rng) for i in range(count)]


def _question(kind: str, words: Sequence[str], rng: random.Random) -> Question:
    for _ in range(_TRIES):
        sought, right, wrong = _rules(kind, rng.choice(words), rng)
        good = [word for word in words if right(word)]
        bad = [word for word in words if wrong(word)]
        if good and len(bad) >= OPTIONS - 1:
            options = [rng.choice(good), *rng.sample(bad, OPTIONS - 1)]
            turn = rng.randrange(OPTIONS)
            options = options[turn:] + options[:turn]
            asked = rng.choice(_WORDINGS[kind]).format(sought)
            listed = f"The words: {', '.join(options)}."
            parts = [asked, listed] if rng.random() < 0.5 else [listed, asked]
            return Question(kind, " ".join([*parts, "Answer:"]), tuple(options), -turn % OPTIONS)
    raise LimitError("LangGame", "words", len(words), f"enough words for a question of the kind {kind!r}")


def _rules(kind: str, word: str, rng: random.Random) -> tuple[str, Callable[[str], bool], Callable[[str], bool]]:
    """What is asked for, which words are right and which are wrong."""
    if kind == "most":
        letter = rng.choice(word)
        return letter, lambda w: w.count(letter) >= _MANY, lambda w: w.count(letter) <= _FEW
    if kind == "longest":
        return "", lambda w: len(w) >= _LONG, lambda w: len(w) <= _NOT_LONG
    if kind == "shortest":
        return "", lambda w: len(w) <= _SHORT, lambda w: len(w) >= _NOT_SHORT
    size = min(rng.randint(1, 3), len(word))
    if kind == "contains":
        at = rng.randrange(len(word) - size + 1)
        piece = word[at : at + size]
        return piece, lambda w: piece in w, lambda w: piece not in w
    if kind == "starts":
        head = word[:size]
        return head, lambda w: w.startswith(head), lambda w: not w.startswith(head)
    tail = word[-size:]
    return tail, lambda w: w.endswith(tail), lambda w: not w.endswith(tail)
