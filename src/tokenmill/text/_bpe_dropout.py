"""BPE-dropout, to compare with: merges are skipped at random while a text is encoded."""

from __future__ import annotations

import json
from typing import Any

from tokenmill.errors import LimitError, UnsupportedError


def bpe_dropout(tokenizer: Any, dropout: float = 0.1) -> Any:
    """A copy of a BPE tokenizer that skips each merge with this probability.

    Provilkov et al., "BPE-Dropout: Simple and Effective Subword Regularization" (arXiv 1910.13267). It works on texts,
    not on token ids, and its draws cannot be seeded: they are those of the `tokenizers` package.

    Args:
        tokenizer: a transformers tokenizer with a `tokenizers` backend, or a `tokenizers.Tokenizer`.
        dropout: probability of skipping a merge, in [0, 1].

    Returns:
        a `tokenizers.Tokenizer`; the one that was given is left as it was.

    Raises:
        LimitError: `dropout` outside [0, 1].
        UnsupportedError: no BPE, or no backend.
    """
    from tokenizers import Tokenizer

    if not 0 <= dropout <= 1:
        raise LimitError("bpe_dropout", "dropout", dropout, "in [0, 1]", "The paper has 0.1.")
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not hasattr(backend, "to_str"):
        raise UnsupportedError("bpe_dropout", f"{type(tokenizer).__name__} has no `tokenizers` backend")
    data = json.loads(backend.to_str())
    if data["model"]["type"] != "BPE":
        raise UnsupportedError("bpe_dropout", f"a model of type {data['model']['type']} has no merges")
    data["model"]["dropout"] = float(dropout)
    data["model"]["ignore_merges"] = False  # else whole words are looked up before any merge
    return Tokenizer.from_str(json.dumps(data))
