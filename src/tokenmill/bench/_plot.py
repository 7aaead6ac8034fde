"""The quality-cost plot of a report, as SVG text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenmill.errors import MissingExtraError

WIDTH, HEIGHT = 680, 300
BLUE, GREY, INK = "#2f5d8a", "#9aa4ae", "#1f2933"
_LETTER, _LINE = 6.1, 13.0  # pixels of a label at 11 px


@dataclass(frozen=True, slots=True)
class Point:
    """One method in the plot: cost with its interval, quality, and whether it is on the Pareto front."""

    label: str
    cost: float
    low: float
    high: float
    quality: float
    front: bool


def draw(points: Sequence[Point], cost_title: str, quality_title: str) -> str:
    """Quality over cost with the Pareto front as a line.

    Raises:
        MissingExtraError: the packages that draw are not installed.
    """
    try:
        import altair as alt
        import vl_convert
    except ModuleNotFoundError as error:
        raise MissingExtraError("report", str(error.name), "bench") from error
    across = span([v for p in points for v in (p.low, p.high, 1.0)])
    up = span([p.quality for p in points])
    spots = [
        ((p.cost - across[0]) / (across[1] - across[0]) * WIDTH, (up[1] - p.quality) / (up[1] - up[0]) * HEIGHT)
        for p in points
    ]
    places = label_places([p.label for p in points], spots)
    rows: list[dict[str, Any]] = [
        {
            "label": p.label, "cost": p.cost, "low": p.low, "high": p.high, "quality": p.quality,
            "front": p.front, "label_x": place[0], "label_y": place[1],
        }
        for p, place in zip(points, places, strict=True)
    ]  # fmt: skip
    x = alt.X("cost:Q", title=cost_title, scale=alt.Scale(domain=list(across), zero=False, nice=False))
    y = alt.Y("quality:Q", title=quality_title, scale=alt.Scale(domain=list(up), zero=False, nice=False))
    base = alt.Chart(alt.Data(values=rows))
    on = "datum.front"
    line = base.transform_filter(on).mark_line(color=BLUE, opacity=0.35, strokeWidth=2, interpolate="step-after")
    spread = base.mark_rule(color=GREY, opacity=0.8).encode(x="low:Q", x2="high:Q", y=y)
    dots = base.mark_circle(size=90, opacity=1).encode(
        x=x, y=y, color=alt.condition(on, alt.value(BLUE), alt.value(GREY))
    )
    names = base.mark_text(align="center", baseline="middle", fontSize=11, color=INK).encode(
        x=alt.X("label_x:Q", scale=None), y=alt.Y("label_y:Q", scale=None), text="label:N"
    )
    one = alt.Chart(alt.Data(values=[{"cost": 1.0}])).mark_rule(strokeDash=[3, 4], color=GREY).encode(x="cost:Q")
    layers = alt.layer(one, line.encode(x=x, y=y), spread, dots, names)
    chart = layers.properties(width=WIDTH, height=HEIGHT).configure_view(stroke=None)
    chart = chart.configure_axis(
        gridColor="#eef1f4", domain=False, tickColor="#d5dbe1", labelColor="#52606d", titleColor=INK,
        titleFontWeight="normal", labelFontSize=11, titleFontSize=12, titlePadding=12,
    )  # fmt: skip
    return vl_convert.vegalite_to_svg(chart.to_dict())


def span(values: Sequence[float]) -> tuple[float, float]:
    """The range of an axis: that of the values and a tenth more on both sides."""
    low, high = min(values), max(values)
    room = (high - low) * 0.12 or max(abs(high) * 0.05, 0.05)
    return low - room, high + room


def label_places(labels: Sequence[str], spots: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The middle of each label, near its spot: above, below, right or left, where it covers least."""
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in spots]
    places: list[tuple[float, float]] = []
    for label, (x, y) in zip(labels, spots, strict=True):
        half = len(label) * _LETTER / 2
        beside = [
            (0, -15),
            (0, 15),
            (half + 12, 0),
            (-half - 12, 0),
            (half, -15),
            (-half, -15),
            (half, 15),
            (-half, 15),
        ]
        options = [(min(max(x + dx, half), WIDTH - half), y + dy) for dx, dy in beside]
        boxes = [(cx - half, cy - _LINE / 2, cx + half, cy + _LINE / 2) for cx, cy in options]
        best = min(range(len(options)), key=lambda i: (sum(_common(boxes[i], other) for other in taken), i))
        places.append(options[best])
        taken.append(boxes[best])
    return places


def _common(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> float:
    """The area that two boxes (left, top, right, bottom) share."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
