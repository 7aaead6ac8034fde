"""How many tokens a vocabulary whose tokens may cross blanks saves in its domain, and outside of it.

python benchmarks/supertokens.py     # some minutes on two cores

Both vocabularies have 32,768 tokens and come from the train split of the standard library's source: an ordinary
byte-level BPE and supertokens. They cut held-out source, Python's manual, and manual pages in English and German.
"""

from __future__ import annotations

from typing import Any

from _lines import Lines

from tokenmill import corpora
from tokenmill.models import tokenizer
from tokenmill.text import train_domain_bpe, train_supertokenizer

SIZE = 32_768
CHARS = 20_000  # of a text


def held_out() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in ("python-stdlib", "python-reference", "manual-pages"):
        for record in corpora.load(name).split("test"):
            if record.kind in ("code", "prose", "english", "german"):
                found.setdefault(record.kind, []).append(record.text[:CHARS])
    return found


def tokens(made: Any, texts: list[str]) -> int:
    own = getattr(made, "backend_tokenizer", made)
    return sum(len(found.ids) for found in own.encode_batch_fast(texts, add_special_tokens=False))


def main() -> None:
    lines = Lines("supertokens", "tokenadapt", vocab_size=SIZE)
    train = [record.text for record in corpora.load("python-stdlib").split("train")]
    made = {
        "ordinary": train_domain_bpe(train, SIZE, custom_tokens="empty", short="fill"),
        "supertokens": train_supertokenizer(train, SIZE),
        "gpt2": tokenizer("gpt2"),
        "gemma-3-270m": tokenizer("gemma-3-270m"),
    }
    for kind, texts in held_out().items():
        counts = {name: tokens(one, texts) for name, one in made.items()}
        chars = sum(map(len, texts))
        fewer = {name: 1 - counts["supertokens"] / count for name, count in counts.items() if name != "supertokens"}
        lines.keep("tokens", kind=kind, texts=len(texts), chars=chars, counts=counts, fewer=fewer)


if __name__ == "__main__":
    main()
