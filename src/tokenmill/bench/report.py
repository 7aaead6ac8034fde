"""The report: one HTML file that needs nothing else, made from result lines."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenmill.errors import LimitError

from ._plot import Point, draw
from .result import Result, read_results
from .task import Metric, load_task

_STYLE = Path(__file__).with_name("report.css")


@dataclass(frozen=True, slots=True)
class Group:
    """Results that compare with each other: one task, model, kind of data and set of options."""

    title: str
    results: tuple[Result, ...]
    metric: str
    better: str

    def point(self, result: Result) -> tuple[float, float]:
        """Cost (time as a share of plain's) and quality of a result."""
        return result.ratio["ms_p50"][0], result.quality[self.metric]


def write_report(source: Path | str, target: Path | str) -> Path:
    """Read result lines from a file or folder and write the report.

    Raises:
        LimitError: there are no results at `source`.
        MissingExtraError: the packages that draw are not installed.
    """
    results = read_results(Path(source))
    if not results:
        raise LimitError("report", "source", str(source), "a file or folder with at least one result")
    page = render(results)
    path = Path(target)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def render(results: Sequence[Result]) -> str:
    """The page as text; of results with one key the last one counts."""
    latest = list({result.key: result for result in results}.values())
    parts = [_section(group) for group in groups(latest)]
    tasks = ", ".join(dict.fromkeys(r.task for r in latest))
    env = latest[-1].env
    facts = " · ".join(
        f"{html.escape(name)} {html.escape(str(env[name]))}"
        for name in ("cpu", "threads", "python", "torch", "transformers", "tokenmill", "commit")
        if env.get(name) not in (None, "")
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>tokenmill report: {html.escape(tasks)}</title>"
        f"<style>{_STYLE.read_text(encoding='utf-8')}</style></head><body><main>"
        f"<header><h1>tokenmill <span>{html.escape(tasks)}</span></h1>"
        f"<p>What each method saves against the untouched model, and what it costs in quality.</p>"
        f'<p class="env">{facts}</p></header>'
        f"{''.join(parts)}{_commands(latest)}</main></body></html>\n"
    )


def groups(results: Sequence[Result]) -> list[Group]:
    """Results that compare with each other, in order of appearance."""
    found: dict[str, list[Result]] = {}
    for result in results:
        told = [f"{k} {v}" for k, v in result.settings.items() if v not in ("", False, 0, None)]
        title = f"{result.data['kind']} — {result.model}"
        detail = f"{result.data['name']}, {result.n} items, seed {result.seed}, {result.weights}, {', '.join(told)}"
        found.setdefault(f"{title}\n{detail}", []).append(result)
    made = []
    for title, members in found.items():
        metrics: Mapping[str, Metric] = load_task(members[0].task).Task.METRICS
        held = [name for name in metrics if any(name in r.quality for r in members)]
        # The finest measure that all lines have says the most in a plot; an all-or-nothing share comes second.
        metric = next((m for m in ("agree", *held) if m in held), "")
        made.append(Group(title, tuple(members), metric, metrics[metric].better if metric else "higher"))
    return made


def pareto(points: Sequence[tuple[float, float]], better: str = "higher") -> list[int]:
    """Indices of the points (cost, quality) that no other point beats in both, by rising cost."""
    sign = 1.0 if better == "higher" else -1.0
    front: list[int] = []
    best = -float("inf")
    for index in sorted(range(len(points)), key=lambda i: (points[i][0], -sign * points[i][1])):
        if sign * points[index][1] > best:
            best = sign * points[index][1]
            front.append(index)
    return front


def _section(group: Group) -> str:
    ok = [r for r in group.results if r.status == "ok"]
    title, _, detail = group.title.partition("\n")
    front = {ok[i].key for i in pareto([group.point(r) for r in ok], group.better)} if group.metric else set()
    plot = _plot(group, ok, front) if ok and group.metric else ""
    return (
        f'<section><h2>{html.escape(title)}</h2><p class="detail">{html.escape(detail)}</p>'
        f"<figure>{plot}</figure>{_table(group, front)}</section>"
    )


def _label(result: Result) -> str:
    return " ".join([result.method, *(f"{k}={v}" for k, v in result.params.items())])


def _table(group: Group, front: set[str]) -> str:
    metrics = load_task(group.results[0].task).Task.METRICS
    held = [m for m in metrics if any(m in r.quality for r in group.results)]
    heads = ["method", "speed", "95 % interval", "ms", *held, "model calls", "tokens per call"]
    titles = {m: metrics[m].title for m in held}
    rows = []
    order = sorted(group.results, key=lambda r: r.ratio["ms_p50"][0] if r.status == "ok" else float("inf"))
    for result in order:
        name = f"<code>{html.escape(_label(result))}</code>"
        if result.status != "ok":
            rows.append(f'<tr class="failed"><th>{name}</th><td colspan="{len(heads) - 1}">'
                        f"failed: {html.escape(result.message)}</td></tr>")  # fmt: skip
            continue
        ratio, low, high = result.ratio["ms_p50"]
        cells = [f"{1 / ratio:.2f}×", f"{1 / high:.2f}–{1 / low:.2f}", f"{result.cost['ms_p50']:,.0f}"]
        cells += [f"{result.quality[m]:.3f}" if m in result.quality else "" for m in held]
        cells += [_number(result.cost, "model_calls", 1), _number(result.cost, "tokens_per_call", 2)]
        mark = ' <span class="front" title="on the Pareto front">●</span>' if result.key in front else ""
        plain = ' class="plain"' if result.method == "plain" else ""
        rows.append(f"<tr{plain}><th>{name}{mark}</th>{''.join(f'<td>{c}</td>' for c in cells)}</tr>")
    head = "".join(
        f'<th title="{html.escape(titles.get(h, h))}">{html.escape(h.replace("_", " "))}</th>' for h in heads
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _number(cost: Mapping[str, float], name: str, digits: int) -> str:
    return f"{cost[name]:.{digits}f}" if name in cost else ""


def _commands(results: Sequence[Result]) -> str:
    commands = "".join(f"<pre><code>{html.escape(c)}</code></pre>" for c in dict.fromkeys(r.cmd for r in results) if c)
    return f"<section><h2>Do it again</h2>{commands}</section>" if commands else ""


def _plot(group: Group, ok: Sequence[Result], front: set[str]) -> str:
    metrics: Mapping[str, Metric] = load_task(group.results[0].task).Task.METRICS
    points = []
    for r in ok:
        cost, low, high = r.ratio["ms_p50"]
        points.append(Point(_label(r), cost, low, high, r.quality[group.metric], r.key in front))
    return draw(points, "time, as a share of plain's", metrics[group.metric].title)
