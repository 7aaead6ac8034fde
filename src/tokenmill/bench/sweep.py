"""Sweeps: flat TOML files that name methods and settings. A list is a sweep over its values, and nothing else nests."""

from __future__ import annotations

import itertools
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenmill import settings
from tokenmill.errors import LimitError, unknown_name

from .task import MethodSpec, load_task


@dataclass(frozen=True, slots=True)
class Sweep:
    """A sweep as it is written: the options of the task, the seeds, and every method with every setting."""

    name: str
    task: str
    options: Mapping[str, Any]
    seeds: tuple[int, ...]
    methods: tuple[str, ...]


def load_sweep(name: str | Path) -> Sweep:
    """Read a sweep that ships, by name, or a file of your own.

    Raises:
        LimitError: unknown name or key, a value that nests, or no methods.
    """
    path = Path(name)
    if path.suffix != ".toml":
        from tokenmill import bench

        if str(name) not in bench.sweep_names():
            raise unknown_name("bench", "sweep", str(name), bench.sweep_names())
        path = Path(__file__).parent / "sweeps" / f"{name}.toml"
    where = path.name
    if not path.is_file():
        raise LimitError("bench", "sweep", str(path), "a file")
    try:
        written = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise LimitError(where, "file", str(path), "TOML", str(error)) from error
    task = written.pop("task", None)
    if not isinstance(task, str):
        raise LimitError(where, "task", task, "the name of a task")
    seeds = written.pop("seeds", [0])
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int for seed in seeds):
        raise LimitError(where, "seeds", seeds, "a list of integers")
    methods = written.pop("method", [])
    if not isinstance(methods, list) or not methods:
        raise LimitError(where, "method", methods, "at least one [[method]]")
    known = settings.settings_of(load_task(task).Options)
    for key, value in written.items():
        if key not in known or key == "seed":
            raise unknown_name(where, "key", key, [*(k for k in known if k != "seed"), "task", "seeds", "method"])
        if isinstance(value, list | dict):
            raise LimitError(where, key, value, "one value", "Only a method's settings sweep over a list.")
    specs = tuple(spec for method in methods for spec in _specs(where, method))
    return Sweep(path.stem, task, written, tuple(seeds), specs)


def _specs(where: str, method: Mapping[str, Any]) -> Iterator[str]:
    """Every combination of a method's listed values, as specs."""
    params = dict(method)
    slug = params.pop("id", None)
    if not isinstance(slug, str):
        raise LimitError(where, "method.id", slug, "the name of a method")
    for key, value in params.items():
        values = value if isinstance(value, list) else [value]
        if not values or any(isinstance(v, list | dict) for v in values):
            raise LimitError(where, f"{slug}.{key}", value, "a value or a list of values")
        params[key] = values
    for combination in itertools.product(*params.values()):
        yield MethodSpec(slug.replace("_", "-"), dict(zip(params, combination, strict=True))).text
