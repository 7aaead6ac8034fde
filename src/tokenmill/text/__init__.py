"""Make text tokens: vocabularies as bytes, and methods that change how text is cut. Names load on first use."""

from __future__ import annotations

from tokenmill.catalog import lazy

__getattr__, __dir__ = lazy(__name__, {"ByteTrie": "_byte_trie", "TokenBytes": "_token_bytes"})
