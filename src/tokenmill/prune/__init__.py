"""Drop visual tokens: methods that score them, and what they share. Names load on first use."""

from __future__ import annotations

from tokenmill.catalog import lazy

__getattr__, __dir__ = lazy(
    __name__,
    {
        "AttentionTopK": "_baselines",
        "NormTokens": "_baselines",
        "PrunedInputs": "_pruner",
        "PruneTrace": "_pruner",
        "RandomTokens": "_baselines",
        "VisualPruner": "_pruner",
        "prefill_flops": "_flops",
    },
)
