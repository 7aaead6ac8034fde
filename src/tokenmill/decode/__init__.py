"""Produce tokens left to right, faster or under constraints. Names load on first use."""

from __future__ import annotations

from tokenmill.catalog import lazy

__getattr__, __dir__ = lazy(__name__, {"DecodeTrace": "_request", "Tree": "_tree", "tree_template": "token_recycling"})
