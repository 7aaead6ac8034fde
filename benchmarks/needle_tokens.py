"""Tokens that a pair of the needle-threading haystack takes, by tokenizer: contexts in tokens are no common measure.

python benchmarks/needle_tokens.py     # half a minute
"""

from __future__ import annotations

from _lines import Lines

from tokenmill import models
from tokenmill.probe import token_profile

TOKENIZERS = ("gemma-3-270m", "gpt2", "bpe_openai/cl100k_base", "bpe_openai/o200k_base")


def main() -> None:
    lines = Lines("needle-tokens", "needle-threading")
    for one in token_profile({name: models.tokenizer(name) for name in TOKENIZERS}):
        lines.keep(
            "tokens",
            tokenizer=one.tokenizer,
            characters=one.characters,
            tokens=one.tokens,
            tokens_per_pair=one.tokens_per_pair,
            chars_per_token=one.chars_per_token,
        )


if __name__ == "__main__":
    main()
