"""Peak memory of a call, for processes that do nothing else."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any


def peak_mib(call: Callable[[], Any]) -> float:
    """What a call holds at its highest, above what the process holds before it."""
    # glibc keeps what was freed, and a call that is served from there would seem to need nothing.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # Linux forgets the highest mark so far
    before = _held_kib("VmRSS")
    call()
    return (_held_kib("VmHWM") - before) / 1024


def _held_kib(what: str) -> int:
    """A line of this process's memory, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what))
