"""The other side of a comparison: a process in an environment of its own, asked over a pipe."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


class Peer:
    """A peer's ``serve.py``: one JSON request a line, one JSON answer a line.

    Args:
        name: its folder beside this file.
        about: the first line, what it has to load.
    """

    def __init__(self, name: str, about: dict[str, Any]) -> None:
        python = HERE / name / ".venv" / "bin" / "python"
        if not python.exists():
            sys.exit(f"There is no {python}: run `make peers` first.")
        self.process = subprocess.Popen(
            [str(python), str(HERE / name / "serve.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.ask(about)

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to one request."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        """Let the process end."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
