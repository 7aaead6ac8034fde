"""Pytest plugin: a table of where the suite's time went, by the folder under tests/ (`-p tests._durations`)."""

from __future__ import annotations

from collections import defaultdict
from pathlib import PurePosixPath

import pytest

_seconds: dict[str, float] = defaultdict(float)
_tests: dict[str, set[str]] = defaultdict(set)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    path = PurePosixPath(report.nodeid.partition("::")[0])
    family = path.parts[1] if len(path.parts) > 2 else "(top)"
    _seconds[family] += report.duration
    _tests[family].add(report.nodeid)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not _seconds:
        return
    terminalreporter.section("seconds by family")
    for family, seconds in sorted(_seconds.items(), key=lambda item: -item[1]):
        terminalreporter.write_line(f"{family:<12} {len(_tests[family]):>6} tests {seconds:>9.1f} s")
