"""Produce tokens by unmasking, with masked diffusion language models. Names load on first use."""

from __future__ import annotations

from tokenmill.catalog import lazy

__getattr__, __dir__ = lazy(
    __name__,
    {
        "Canvas": "_canvas",
        "DelayedCache": "_caches",
        "Denoiser": "_denoiser",
        "Diffusion": "_decoder",
        "DiffusionTrace": "_decoder",
        "DualCache": "_caches",
        "Entropy": "_rules",
        "EntropyBound": "_rules",
        "Factor": "_rules",
        "KVPolicy": "_policy",
        "Margin": "_rules",
        "NoCache": "_caches",
        "Plan": "_policy",
        "PrefixCache": "_caches",
        "Proposal": "_proposal",
        "Quota": "_rules",
        "RandomReveal": "_rules",
        "Reveal": "_rule",
        "RevealRule": "_rule",
        "Threshold": "_rules",
    },
)
