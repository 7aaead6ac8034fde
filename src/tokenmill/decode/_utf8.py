"""Bytes as text while the last character may still be on its way."""

from __future__ import annotations

import codecs

_decoder = codecs.getincrementaldecoder("utf-8")


def split_utf8(data: bytes) -> tuple[str, bytes] | None:
    """The text of ``data`` and the bytes of a character that is not whole yet.

    Returns:
        ``None`` where no further bytes could make ``data`` UTF-8.
    """
    decoder = _decoder()
    try:
        text = decoder.decode(data)
    except UnicodeDecodeError:
        return None
    pending = decoder.getstate()[0]
    # The decoder waits for the third byte of a surrogate, which no text holds.
    return None if pending[:1] == b"\xed" and pending[1:] >= b"\xa0" else (text, pending)
