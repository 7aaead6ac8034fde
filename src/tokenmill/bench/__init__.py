"""The bench: tasks x methods, timed in pairs against the untouched model, as JSON lines and one HTML report."""

from __future__ import annotations

from pathlib import Path

from tokenmill.catalog import lazy

_HERE = Path(__file__).parent

__getattr__, __dir__ = lazy(
    __name__,
    {
        "run": "runner",
        "Result": "result",
        "read_results": "result",
        "write_report": "report",
        "Task": "task",
        "MethodSpec": "task",
        "load_task": "task",
        "load_sweep": "sweep",
    },
)


def task_names() -> list[str]:
    """The names of all tasks: one module each in the folder ``tasks``. Imports none of them."""
    return [file.stem.replace("_", "-") for file in sorted((_HERE / "tasks").glob("[a-z]*.py"))]


def sweep_names() -> list[str]:
    """The names of the sweeps that ship, one TOML file each."""
    return [file.stem for file in sorted((_HERE / "sweeps").glob("*.toml"))]
