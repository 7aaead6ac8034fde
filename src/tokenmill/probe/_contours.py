"""How long a context a model can really use: where accuracy falls below a threshold, along a position or parameter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from tokenmill.errors import LimitError, unknown_name
from tokenmill.probe._example import COLUMNS
from tokenmill.probe._scores import cell

if TYPE_CHECKING:
    from tokenmill.probe._answers import Answer

_WHERE = "effective_context"
ALONG: Mapping[str, str] = {
    "single": "needle_depth",
    "multiple": "num_needles",
    "conditional": "num_needles",
    "threading": "thread_length",
    "multi-threading": "num_threads",
    "branched": "thread_length",
}
"""The column that a task's contour runs along."""


def crossing(curve: Mapping[int, float | None], threshold: float) -> float:
    """The context up to which a curve (context -> accuracy) stays at the threshold or above.

    0 when the first point lies below it, the last context when none does; else the linear interpolation between the
    last good point and the first bad one. A point without an answer (None) ends the curve.
    """
    reached, level = 0.0, 0.0
    for context in sorted(curve):
        value = curve[context]
        if value is None:
            return reached
        if value < threshold:
            return reached + (level - threshold) / (level - value) * (context - reached) if reached else 0.0
        reached, level = float(context), value
    return reached


def surface(answers: Iterable[Answer], along: str) -> dict[str, dict[int, float | None]]:
    """Value of a column -> context -> accuracy.

    Raises:
        LimitError: a column that answers do not have.
    """
    known = (*COLUMNS, "branching_factor")
    if along not in known:
        raise unknown_name(_WHERE, "along", along, known)
    groups: dict[str, dict[int, list[Answer]]] = {}
    for answer in answers:
        groups.setdefault(str(answer.meta.get(along)), {}).setdefault(answer.context, []).append(answer)
    return {
        place: {context: cell("", context, group).accuracy for context, group in sorted(by_context.items())}
        for place, by_context in sorted(groups.items(), key=lambda item: _order(item[0]))
    }


def contour(answers: Iterable[Answer], along: str, threshold: float = 0.75) -> dict[str, float]:
    """Value of a column -> the context, in characters, up to which accuracy stays at the threshold or above."""
    _check(threshold)
    return {place: crossing(curve, threshold) for place, curve in surface(answers, along).items()}


def effective_context(answers: Iterable[Answer], threshold: float = 0.75, *, along: str = "", at: Any = None) -> float:
    """The effective context of one task, in characters of haystack.

    Args:
        answers: of one task.
        threshold: accuracy that is asked for.
        along: the column of the contour; by default the task's own ("needle_depth" for single needles, the number of
            needles or threads, or the length of a thread).
        at: the value of that column at which the contour is read; without it, its most pessimistic point.

    Raises:
        LimitError: no answers, answers of several tasks, a threshold outside (0, 1], an unknown column or value.
    """
    _check(threshold)
    given = list(answers)
    tasks = sorted({a.task for a in given})
    if len(tasks) != 1:
        raise LimitError(_WHERE, "answers", tasks, "those of one task")
    reached = contour(given, along or ALONG[tasks[0]], threshold)
    if at is None:
        return min(reached.values())
    if str(at) not in reached:
        raise unknown_name(_WHERE, "at", str(at), reached)
    return reached[str(at)]


def _check(threshold: float) -> None:
    if not 0 < threshold <= 1:
        raise LimitError(_WHERE, "threshold", threshold, "in (0, 1]")


def _order(place: str) -> tuple[float, str]:
    try:
        return float(place), place
    except ValueError:
        return float("inf"), place
