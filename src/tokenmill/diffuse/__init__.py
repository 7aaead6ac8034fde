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
        "DiffusionTrace": "_trace",
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
        "Snapshot": "_trace",
        "Threshold": "_rules",
        "entropy_bound_set": "_rules",
        "factor_set": "_rules",
        "frozen_prefix": "freecache_guided_diffusion",
        "nll_bound": "_bound",
        "quotas": "_schedule",
        "top_n": "_rules",
    },
)
