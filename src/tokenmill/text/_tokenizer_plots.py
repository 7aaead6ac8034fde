"""The plots of a tokenizer report, as SVG text."""

from __future__ import annotations

from typing import Any

from tokenmill.errors import MissingExtraError

_COLOURS = ["#2f5d8a", "#9aa4ae", "#c8793a", "#5b8f6a", "#8a4f7d", "#b8a13a"]
_INK, _GREY = "#1f2933", "#52606d"


def draw(report: dict[str, Any]) -> dict[str, str]:
    """Name -> SVG: tokens per character, the vocabularies' lengths, and what errors change (if that was measured).

    Args:
        report: what `TokenizerReport.to_dict` gives.

    Raises:
        MissingExtraError: the packages that draw are not installed.
    """
    try:
        import altair as alt
        import vl_convert
    except ModuleNotFoundError as error:
        raise MissingExtraError("TokenizerReport.plots", str(error.name), "bench") from error
    lengths = [
        {"tokenizer": name, "characters": int(n), "share": share}
        for name, shares in report["lengths"].items()
        for n, share in shares.items()
    ]
    wanted = {
        "tokens-per-character": (report["rows"], "data:N", "tokens_per_char:Q", "tokens a character"),
        "token-lengths": (lengths, "characters:O", "share:Q", "share of the vocabulary"),
        "boundary-stability": (report["stability"], "data:N", "jaccard:Q", "token ends that stay (Jaccard)"),
    }
    drawn = {}
    for name, (rows, across, up, title) in wanted.items():
        if not rows:
            continue
        names = list(dict.fromkeys(row["tokenizer"] for row in rows))
        colours = alt.Scale(domain=names, range=[_COLOURS[i % len(_COLOURS)] for i in range(len(names))])
        chart = (
            alt.Chart(alt.Data(values=rows))
            .mark_bar()
            .encode(
                x=alt.X(across, title=across.partition(":")[0], axis=alt.Axis(labelAngle=0)),
                xOffset=alt.XOffset("tokenizer:N", sort=names),
                y=alt.Y(up, title=title),
                color=alt.Color("tokenizer:N", scale=colours, sort=names, title=None),
            )
            .properties(width=560, height=240)
            .configure_view(stroke=None)
            .configure_axis(gridColor="#eef1f4", domain=False, labelColor=_GREY, titleColor=_INK)
        )
        drawn[name] = vl_convert.vegalite_to_svg(chart.to_dict())
    return drawn
