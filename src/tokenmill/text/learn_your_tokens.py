"""Learn Your Tokens: a language model over words whose units are pooled, around any decoder of transformers.

Thawani, Ghanekar, Zhu and Pujara, "Learn Your Tokens: Word-Pooled Tokenization for Language Modeling" (arXiv
2310.11628). Bytes, characters or subwords of a word become a few vectors; a causal model reads these alone; a small
decoder writes the units of the next word. No word is unknown and any string can be written.

Use it to train a small model on text with many rare words and numbers, where a vocabulary is not wanted. Do not use it
with a model that is trained already: it has another input and another output.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from tokenmill.catalog import Card, Paper
from tokenmill.errors import LimitError, unknown_name
from tokenmill.text._word_generation import WordScores
from tokenmill.text._word_pooled import WordPooledConfig, WordPooledLM
from tokenmill.text._word_segmenter import WordSegmenter

__all__ = ["CARD", "LearnYourTokens", "WordPooledConfig", "WordPooledLM", "WordScores", "WordSegmenter"]

CARD = Card(
    name="Learn Your Tokens",
    kind="model",
    paper=Paper(
        title="Learn Your Tokens: Word-Pooled Tokenization for Language Modeling",
        date="2023-10-17",
        arxiv="2310.11628",
        code="https://github.com/avi-jit/eTok",
    ),
    summary=(
        "Pools the bytes, characters or subwords of each word into a few vectors and models these alone. "
        "A small decoder writes the units of the next word, all words at once in training."
    ),
    claim=(
        "More than 300 % better next-word accuracy than subword and byte or character models, and about 30 times on "
        "rare words; under the authors' conditions, which handicap the baselines."
    ),
    api=("LearnYourTokens", "WordPooledLM", "WordPooledConfig", "WordSegmenter", "WordScores"),
    exact=False,
    trains=True,
    task="words",
    differs=(
        "words are cut without loss, and a long word goes on in a second row; the authors lose blanks and lines",
        "padding is never read; in the authors' code the result depends on how long it is",
        "exactly one end of word is predicted, and a word of full length ends by itself",
        "a learned start stands before the first word, so that every word of a text has a probability",
        "the backbone is any decoder of transformers, with its own positions",
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnYourTokens:
    """The paper's hyper-parameters; `model` makes an untrained model around a backbone.

    Attributes:
        base: units: byte, char or sub (the authors' code defaults to char).
        num_prefix: p, vectors of a word.
        c_max: units of a word at most; longer ones go on in another.
        enc_layers: of the word encoder.
        enc_heads: of its attention.
        dec_layers: of the unit decoder.
        dec_heads: of its attention.
        ff: width of their feed-forward layers as a multiple of the backbone's (the authors' encoder has 4 at D = 512).
        dropout: of encoder and decoder.
        tie_head: write units with the embedding of units.
    """

    base: Literal["byte", "char", "sub"] = "byte"
    num_prefix: int = 4
    c_max: int = 24
    enc_layers: int = 2
    enc_heads: int = 4
    dec_layers: int = 2
    dec_heads: int = 8
    ff: int = 4
    dropout: float = 0.1
    tie_head: bool = False

    def __post_init__(self) -> None:
        if self.base not in ("byte", "char", "sub"):
            raise unknown_name("LearnYourTokens", "base", str(self.base), ("byte", "char", "sub"))
        for name in ("num_prefix", "c_max", "enc_layers", "enc_heads", "dec_layers", "dec_heads", "ff"):
            if getattr(self, name) < 1:
                raise LimitError("LearnYourTokens", name, getattr(self, name), "at least 1")
        if not 0 <= self.dropout < 1:
            raise LimitError("LearnYourTokens", "dropout", self.dropout, "in [0, 1)")

    def segmenter(self, texts: Any = (), *, tokenizer: Any = None) -> WordSegmenter:
        """What cuts texts: for char with the characters of `texts`, for sub with a byte-level tokenizer."""
        if self.base == "char":
            return WordSegmenter.of_characters(texts, c_max=self.c_max)
        return WordSegmenter(self.base, c_max=self.c_max, tokenizer=tokenizer)

    def model(self, segmenter: WordSegmenter, backbone: Any) -> WordPooledLM:
        """An untrained model.

        Args:
            segmenter: with the same base and `c_max`.
            backbone: config of a decoder of transformers.

        Raises:
            LimitError: another segmenter, or heads that do not divide the backbone's width.
            UnsupportedError: a backbone that is no decoder.
        """
        for name in ("base", "c_max"):
            if getattr(segmenter, name) != getattr(self, name):
                limit = f"{name}={getattr(self, name)!r}"
                raise LimitError("LearnYourTokens.model", "segmenter", getattr(segmenter, name), limit)
        shape = {k: v for k, v in asdict(self).items() if k not in ("base", "dropout")}
        config = WordPooledConfig(backbone=backbone, unit_vocab_size=segmenter.size, unit_dropout=self.dropout, **shape)
        made = WordPooledLM(config)
        made.segmenter = segmenter
        return made


def small() -> LearnYourTokens:
    """A small shape, used by the laws."""
    return LearnYourTokens(num_prefix=2, c_max=8, enc_layers=1, enc_heads=2, dec_layers=1, dec_heads=2)
