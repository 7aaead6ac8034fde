"""Let attention read fewer tokens: methods that choose which, and what they share. Names load on first use."""

from __future__ import annotations

from tokenmill.catalog import lazy

__getattr__, __dir__ = lazy(
    __name__,
    {
        "AttendTrace": "_session",
        "OracleTopK": "_baselines",
        "Quest": "_baselines",
        "SnapKV": "_baselines",
        "SparseAttention": "_session",
        "StreamingLLM": "_baselines",
        "prefill": "_prefill",
        "sparse_attend": "_gather",
        "top_indices": "_gather",
    },
)
