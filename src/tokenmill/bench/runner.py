"""Run a task: laws first, then paired timings that can be interrupted, then one result line a method and kind."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from tokenmill import laws
from tokenmill.errors import LimitError

from .environment import environment
from .measure import means, percentiles, ratio_of_medians, timed, turned
from .result import FILE, Result, append, key, read_lines, read_results
from .task import Item, MethodSpec, Outcome, Subject, Task

PLAIN = "plain"
Progress = Callable[[str, int, int], None]


def _silent(_what: str, _done: int, _total: int) -> None:
    """Progress that nobody watches."""


def run(
    task: Task,
    methods: Sequence[str],
    out: Path | str,
    *,
    sweep: str = "",
    command: str = "",
    progress: Progress = _silent,
) -> list[Result]:
    """Measure methods against plain and append the lines to ``out/results.jsonl``.

    A measurement that is in the folder already is not made again, and an interrupted run goes on after the last
    finished item. `plain` is always among the methods.

    Args:
        task: a task with its options.
        methods: specs, ``slug`` or ``slug:key=value``.
        out: folder of the results.
        sweep: name of the sweep that this run belongs to.
        command: what reproduces the run; kept in every line.
        progress: called with what is going on, and how many of how many timings are done.

    Returns:
        The lines of what was asked for, those that were there before included.

    Raises:
        TokenmillError: bad specs or options, before any work.
    """
    specs = [task.check(MethodSpec.parse(text)) for text in dict.fromkeys([PLAIN, *methods])]
    names = [spec.text for spec in specs]
    if len(set(names)) < len(names):
        raise LimitError("bench", "methods", ",".join(methods), "a list in which each method comes once")
    lines = _Lines(task, sweep, command)
    folder = Path(out)
    file = folder / FILE
    before = {r.key: r for r in read_results(file) if r.status == "ok"} if file.exists() else {}
    found: list[Result] = []
    jobs: list[_Job] = []
    for kind in task.kinds():
        items = task.items(kind)
        keys = {spec.text: lines.key(spec, kind, len(items)) for spec in specs}
        found += [before[k] for k in keys.values() if k in before]
        missing = [spec for spec in specs if keys[spec.text] not in before]
        if missing:
            paired = [specs[0], *(spec for spec in missing if spec.slug != PLAIN)]
            jobs.append(_Job(task, kind, items, paired, {spec.text for spec in missing}, folder))
    broken = _broken_laws([spec.slug for job in jobs for spec in job.specs], task.BASELINES, progress)
    total, done = sum(len(job.items) for job in jobs), 0
    for job in jobs:
        job.failed |= {spec.text: broken[spec.slug] for spec in job.specs if spec.slug in broken}
        for item in job.measure():
            done += 1
            progress(f"{job.kind} {item.id}", done, total)
        for line in lines.of(job):
            append(file, line)
            found.append(line)
        job.partial.unlink(missing_ok=True)
    return found


def _broken_laws(slugs: Sequence[str], baselines: Sequence[str], progress: Progress) -> dict[str, str]:
    """Slug -> message of its first broken law: there is no cost without correctness."""
    broken: dict[str, str] = {}
    for slug in dict.fromkeys(slugs):
        if slug in baselines:
            continue
        progress(f"laws of {slug}", 0, 0)
        for result in laws.each(slug):
            if result.status == "broken":
                broken[slug] = f"a law is broken: {result.law}: {result.message}"
                break
    return broken


@dataclass(slots=True)
class _Job:
    """The items of one kind under some methods, plain first; `wanted` names those that get a line.

    `rows` holds, for each finished item, what each method did: ms, counts, quality.
    """

    task: Task
    kind: str
    items: list[Item]
    specs: list[MethodSpec]
    wanted: set[str]
    folder: Path
    failed: dict[str, str] = field(default_factory=dict)
    rows: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)

    @property
    def partial(self) -> Path:
        """Where finished items are kept until the lines are written."""
        about = [self.task.name, self.task.model_name(), self.task.data(self.kind), self.task.settings()]
        about += [self.task.options.seed, [item.id for item in self.items], [spec.text for spec in self.specs]]
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:12]
        return self.folder / f"partial-{digest}.jsonl"

    def measure(self) -> Iterator[Item]:
        """Time all methods on all items that are not finished yet; each item is kept as soon as it is."""
        for line in read_lines(self.partial):
            self.rows[line["item"]] = line["methods"]
            self.failed |= line["failed"]
        lanes: dict[str, list[Subject]] = {}
        for number, item in enumerate(self.items):
            if item.id not in self.rows:
                self._prepare(lanes)
                self.rows[item.id] = self._item(number, item, lanes)
                line = {"item": item.id, "methods": self.rows[item.id], "failed": self.failed}
                append(self.partial, line)
            yield item

    def _prepare(self, lanes: dict[str, list[Subject]]) -> None:
        """Make the subjects: one for each repeat, so that a method with a memory meets every item once."""
        if lanes:
            return
        for spec in self.specs:
            if spec.text not in self.failed:
                with _Failing(self, spec):
                    repeats = range(self.task.options.repeats)
                    lanes[spec.text] = [self.task.subject(spec, self.kind) for _ in repeats]

    def _item(self, number: int, item: Item, lanes: dict[str, list[Subject]]) -> dict[str, dict[str, Any]]:
        ms: dict[str, list[float]] = {}
        outcomes: dict[str, Outcome] = {}
        for repeat in range(self.task.options.repeats):
            for spec in turned(self.specs, number + repeat):
                if spec.text in self.failed:
                    continue
                subject = lanes[spec.text][repeat]
                with _Failing(self, spec):
                    took, outcome = timed(lambda s=subject: s.run(item))
                    ms.setdefault(spec.text, []).append(took)
                    outcomes.setdefault(spec.text, outcome)
        plain = outcomes[PLAIN]
        return {
            name: {
                "ms": median(ms[name]),
                "counts": dict(outcome.counts),
                "quality": self.task.quality(item, plain, outcome),
            }
            for name, outcome in outcomes.items()
            if name not in self.failed
        }


@dataclass(slots=True)
class _Failing:
    """Turns an error of a method into its failed line; plain's own errors come out, since nothing works without it."""

    job: _Job
    spec: MethodSpec

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> bool:
        if not isinstance(error, Exception) or self.spec.slug == PLAIN:
            return False
        self.job.failed[self.spec.text] = f"{type(error).__name__}: {error}"
        return True


class _Lines:
    """Makes result lines of a task."""

    def __init__(self, task: Task, sweep: str, command: str) -> None:
        self.task, self.sweep, self.command = task, sweep, command
        self.env: Mapping[str, Any] = {}

    def key(self, spec: MethodSpec, kind: str, n: int) -> str:
        return key(self._about(spec, kind, n))

    def of(self, job: _Job) -> Iterator[Result]:
        """One line for each wanted method of a finished job."""
        self.env = self.env or environment()
        rows = [job.rows[item.id] for item in job.items]
        for spec in job.specs:
            if spec.text not in job.wanted:
                continue
            about = self._about(spec, job.kind, len(job.items))
            about |= {"weights": self.task.weights(), "sweep": self.sweep, "cmd": self.command, "env": self.env}
            about["when"] = datetime.now(UTC).isoformat(timespec="seconds")
            if message := job.failed.get(spec.text):
                yield Result(**about, status="failed", message=message)
            else:
                yield Result(**about, status="ok", **self._figures(spec.text, job, rows))

    def _about(self, spec: MethodSpec, kind: str, n: int) -> dict[str, Any]:
        return {
            "task": self.task.name,
            "model": self.task.model_name(),
            "data": self.task.data(kind),
            "method": spec.slug,
            "params": dict(spec.params),
            "settings": self.task.settings(),
            "seed": self.task.options.seed,
            "n": n,
        }

    def _figures(self, name: str, job: _Job, rows: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
        ours, plain = ([row[of]["ms"] for row in rows] for of in (name, PLAIN))
        counts = [row[name]["counts"] for row in rows]
        totals = {k: sum(c.get(k, 0.0) for c in counts) for k in dict.fromkeys(k for c in counts for k in c)}
        items = [
            {"id": item.id, "ms": a, "tokens": row[name]["counts"].get("tokens"), "ratio": a / b}
            for item, row, a, b in zip(job.items, rows, ours, plain, strict=True)
        ]
        return {
            "quality": means([row[name]["quality"] for row in rows]),
            "cost": {**percentiles(ours), **means(counts), **self.task.derive(totals)},
            "ratio": {"ms_p50": ratio_of_medians(ours, plain, seed=self.task.options.seed)},
            "items": items,
        }
