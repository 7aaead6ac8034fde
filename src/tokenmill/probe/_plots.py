"""The plots of a run, as SVG text: accuracy over context with intervals, contours, and tokens by tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from tokenmill.errors import LimitError, MissingExtraError
from tokenmill.probe._contours import ALONG, contour, surface
from tokenmill.probe._scores import aggregate

if TYPE_CHECKING:
    from tokenmill.probe._answers import Answer
    from tokenmill.probe._lengths import TokenProfile

_COLOURS = ["#2f5d8a", "#c8793a", "#5b8f6a", "#8a4f7d", "#b8a13a", "#9aa4ae"]
_INK, _GREY = "#1f2933", "#52606d"
_CONTEXT = "context (characters)"


def draw_plots(
    answers: Iterable[Answer] = (), profiles: Sequence[TokenProfile] = (), *, threshold: float = 0.75
) -> dict[str, str]:
    """Name -> SVG: "accuracy", "contour-<task>" for each task, and "tokens" when there are profiles.

    A contour's colours are the accuracy at each context and position or parameter; its line is the threshold.

    Args:
        answers: of any tasks.
        profiles: of `token_profile`.
        threshold: of the contours.

    Raises:
        LimitError: nothing to draw.
        MissingExtraError: the packages that draw are not installed.
    """
    try:
        import altair as alt
        import vl_convert
    except ModuleNotFoundError as error:
        raise MissingExtraError("draw_plots", str(error.name), "bench") from error
    given = list(answers)
    if not given and not profiles:
        raise LimitError("draw_plots", "answers", 0, "at least one, or at least one profile")
    charts: dict[str, Any] = {}
    if any(not a.error for a in given):
        charts["accuracy"] = _accuracy(alt, [asdict(c) for c in aggregate(given) if c.accuracy is not None])
    for task in dict.fromkeys(a.task for a in given if not a.error):
        charts[f"contour-{task}"] = _contour(alt, [a for a in given if a.task == task], ALONG[task], threshold)
    if profiles:
        charts["tokens"] = _tokens(alt, profiles)
    return {name: vl_convert.vegalite_to_svg(_styled(chart).to_dict()) for name, chart in charts.items()}


def _styled(chart: Any) -> Any:
    plain = chart.configure_view(stroke=None)
    return plain.configure_axis(gridColor="#eef1f4", domain=False, labelColor=_GREY, titleColor=_INK)


def _accuracy(alt: Any, rows: list[dict[str, Any]]) -> Any:
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    colour = alt.Color("task:N", scale=alt.Scale(domain=tasks, range=_COLOURS[: len(tasks)]), sort=tasks, title=None)
    base = alt.Chart(alt.Data(values=rows))
    across = alt.X("context:Q", title=_CONTEXT, scale=alt.Scale(type="log", nice=False))
    up = alt.Y("accuracy:Q", title="accuracy, 95 % interval", scale=alt.Scale(domain=[0, 1]))
    bars = base.mark_rule(opacity=0.5).encode(x=across, y=alt.Y("low:Q", title=""), y2="high:Q", color=colour)
    line = base.mark_line(point=True).encode(x=across, y=up, color=colour)
    return alt.layer(bars, line).resolve_scale(y="shared").properties(width=560, height=260)


def _contour(alt: Any, answers: list[Answer], along: str, threshold: float) -> Any:
    title = along.replace("_", " ")
    grid = surface(answers, along)
    cells = [
        {"place": place, "context": f"{context:,}", "accuracy": value, "order": context}
        for place, curve in grid.items()
        for context, value in curve.items()
        if value is not None
    ]
    line = [{"place": place, "reached": reached} for place, reached in contour(answers, along, threshold).items()]
    places, lengths = list(grid), sorted({row["order"] for row in cells})
    x = alt.X("place:N", sort=places, title=title, axis=alt.Axis(labelAngle=0))
    heat = (
        alt.Chart(alt.Data(values=cells))
        .mark_rect()
        .encode(
            x=x,
            y=alt.Y("context:N", sort=[f"{n:,}" for n in reversed(lengths)], title=_CONTEXT),
            color=alt.Color("accuracy:Q", scale=alt.Scale(domain=[0, 1], scheme="blues"), title="accuracy"),
        )
        .properties(width=360, height=220)
    )
    up = alt.Y("reached:Q", title=f"context (characters) at accuracy {threshold:g}", scale=alt.Scale(zero=True))
    reach = (
        alt.Chart(alt.Data(values=line))
        .mark_line(point={"color": _COLOURS[1]}, color=_COLOURS[1])
        .encode(x=x, y=up)
        .properties(width=360, height=220)
    )
    return alt.hconcat(heat, reach)


def _tokens(alt: Any, profiles: Sequence[TokenProfile]) -> Any:
    rows: list[Mapping[str, Any]] = [asdict(p) for p in profiles]
    names = list(dict.fromkeys(row["tokenizer"] for row in rows))
    colours = alt.Scale(domain=names, range=[_COLOURS[i % len(_COLOURS)] for i in range(len(names))])
    return (
        alt.Chart(alt.Data(values=rows))
        .mark_bar()
        .encode(
            x=alt.X("text:N", title=None, axis=alt.Axis(labelAngle=0), sort=None),
            xOffset=alt.XOffset("tokenizer:N", sort=names),
            y=alt.Y("chars_per_token:Q", title="characters a token"),
            color=alt.Color("tokenizer:N", scale=colours, sort=names, title=None),
        )
        .properties(width=560, height=240)
    )
