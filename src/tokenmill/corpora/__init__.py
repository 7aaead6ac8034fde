"""Corpora: text that is on every machine, with its licence, its source, a checksum and a split by file."""

from __future__ import annotations

from tokenmill.corpora._corpus import Corpus, Record
from tokenmill.corpora._stdlib import load, names

__all__ = ["Corpus", "Record", "load", "names"]
