"""Ask a model what it can read: benchmarks that are made on the spot, with their scorers. Names load on first use."""

from __future__ import annotations

from tokenmill.catalog import lazy

__getattr__, __dir__ = lazy(
    __name__,
    {
        "Answer": "_answers",
        "Cell": "_scores",
        "Endpoint": "_endpoint",
        "Local": "_local",
        "count_tokens": "_lengths",
        "haystack": "_haystack",
        "oracle": "_oracle",
        "read_answers": "_answers",
        "wilson": "_scores",
    },
)
