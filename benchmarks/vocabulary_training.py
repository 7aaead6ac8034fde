"""How long a domain vocabulary takes to train beside the bare trainer, and how far one wrong character reaches.

python benchmarks/vocabulary_training.py     # some minutes on one core

The source files of the standard library become one file; the bare trainer of `tokenizers` and ours read it in turn.
Then vocabularies of short tokens and ordinary ones, trained on the same manual, cut held-out parts of it before and
after three characters in a hundred were changed: the Jaccard index of their boundaries says how much moved.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from _lines import Lines, seconds
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from tokenmill import corpora
from tokenmill.models import tokenizer
from tokenmill.text import train_char_bpe, train_domain_bpe
from tokenmill.text._tokenizer_report import boundary_stability

SIZES = (4096, 16_384)
REPEATS = 5
NOISE = 0.03
CHARS = 2000  # of a document, from its beginning


def bare(file: str, size: int) -> Tokenizer:
    """The library's own trainer with the same cutting into words."""
    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.NFKC()  # type: ignore[assignment]
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, min_frequency=1, initial_alphabet=alphabet, show_progress=False)
    made.train([file], trainer)
    return made


def training(lines: Lines) -> None:
    texts = [record.text for record in corpora.load("python-stdlib").split("train")]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "source.txt"
        file.write_text("\n".join(texts), encoding="utf-8")
        for size in SIZES:
            took: dict[str, list[float]] = {"bare": [], "ours": []}
            for _ in range(REPEATS):
                took["bare"].append(seconds(lambda n=size: bare(str(file), n)))
                took["ours"].append(
                    seconds(lambda n=size: train_domain_bpe(files=[file], vocab_size=n, custom_tokens="empty"))
                )
            ratio = median(ours / plain for ours, plain in zip(took["ours"], took["bare"], strict=True))
            megabytes = file.stat().st_size / 1e6
            lines.keep("time", vocab_size=size, megabytes=megabytes, seconds=took, ratio=ratio)


def stability(lines: Lines) -> None:
    corpus = corpora.load("python-reference")
    train = [record.text for record in corpus.split("train")]
    held_out = [record.text[:CHARS] for record in corpus.split("test")]
    domain: dict[str, Any] = {"custom_tokens": "empty", "short": "fill"}
    made = {
        "char 4,096, 3 symbols": train_char_bpe(train, 4096, 3, short="fill"),
        "char 4,096, 4 symbols": train_char_bpe(train, 4096, 4, short="fill"),
        "BPE 4,096": train_domain_bpe(train, 4096, **domain),
        "BPE 16,384": train_domain_bpe(train, 16_384, **domain),
        "gpt2": tokenizer("gpt2"),
        "gemma-3-270m": tokenizer("gemma-3-270m"),
    }
    for name, one in made.items():
        found = boundary_stability(one, held_out, NOISE, 0)
        lines.keep("noise", vocabulary=name, rate=NOISE, texts=len(held_out), **found)


def main() -> None:
    lines = Lines("vocabulary-training", "kl3m-tokenizers")
    stability(lines)
    training(lines)


if __name__ == "__main__":
    main()
