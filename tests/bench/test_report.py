"""The report: one file that needs nothing else and says what the lines say."""

from __future__ import annotations

import html.parser
import re
from dataclasses import replace
from pathlib import Path

import pytest

from tests.bench.test_result import LINE
from tokenmill.bench import report
from tokenmill.bench._plot import HEIGHT, WIDTH, label_places, span
from tokenmill.bench.result import FILE, Result, append
from tokenmill.errors import LimitError, MissingExtraError


def _line(method: str, ratio: float, agree: float, **changes: object) -> Result:
    return replace(
        LINE,
        method=method,
        params={},
        quality={"identical": float(agree == 1), "agree": agree},
        cost={"ms_p50": 100 * ratio, "model_calls": 7.5, "tokens_per_call": 1 / ratio},
        ratio={"ms_p50": [ratio, ratio * 0.9, ratio * 1.1]},
        **changes,  # pyright: ignore[reportArgumentType]
    )


LINES = [
    _line("plain", 1.0, 1.0),
    _line("fast", 0.5, 0.8),
    _line("dominated", 0.7, 0.6),
    replace(LINE, method="broke", status="failed", message="k = 3 <b>", cost={}, ratio={}, quality={}),
]


class _Page(html.parser.HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "link", "img", "br", "path", "line", "rect"):
            self.open.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            assert self.open.pop() == tag


def test_the_page_stands_alone(tmp_path: Path) -> None:
    for line in LINES:
        append(tmp_path / FILE, line)
    path = report.write_report(tmp_path, tmp_path / "deep" / "report.html")
    text = path.read_text(encoding="utf-8")
    page = _Page(text)
    assert page.links == []
    assert "<script" not in text
    assert set(re.findall(r"https?://([^/\"]+)", text)) <= {"www.w3.org"}
    assert "url(http" not in text


def test_the_page_says_what_the_lines_say() -> None:
    text = report.render(LINES)
    assert text.count("<svg") == 1
    assert "2.00×" in text
    assert "1.82–2.22" in text
    assert "k = 3 &lt;b&gt;" in text
    assert "tokenmill bench generate" in text
    rows = {m: row for row in text.split("<tr")[1:] for m in ("plain", "fast", "dominated") if f">{m}<" in row}
    assert {m for m, row in rows.items() if "●" in row} == {"plain", "fast"}
    assert text.index(">fast<") < text.index(">dominated<", text.index("<table"))


def test_kinds_and_models_are_separate_groups_and_the_last_line_of_a_key_counts() -> None:
    other = replace(LINES[0], data={**LINE.data, "kind": "b"})
    newer = _line("fast", 0.25, 0.9)
    groups = report.groups([*LINES, other])
    assert [len(group.results) for group in groups] == [4, 1]
    assert {group.metric for group in groups} == {"agree"}
    text = report.render([*LINES, newer])
    assert "4.00×" in text
    assert "2.00×" not in text


def test_sampling_is_drawn_by_its_own_metric() -> None:
    line = replace(LINES[0], quality={"log_likelihood": -1.25})
    assert report.groups([line])[0].metric == "log_likelihood"
    assert "-1.250" in report.render([line])


def test_pareto() -> None:
    points = [(1.0, 1.0), (0.5, 0.8), (0.7, 0.6), (0.5, 0.7), (0.4, 0.8)]
    assert report.pareto(points) == [4, 0]
    assert report.pareto(points, better="lower") == [4, 3, 2]
    assert report.pareto([(1.0, 0.5)]) == [0]


def test_labels_do_not_cover_each_other() -> None:
    spots = [(100.0, 100.0), (110.0, 100.0), (105.0, 103.0)]
    places = label_places(["a long label", "another label", "third label"], spots)
    for i, (x, y) in enumerate(places):
        assert 0 <= x <= WIDTH
        assert -20 <= y <= HEIGHT + 20
        for u, v in places[:i]:
            assert abs(y - v) >= 13 or abs(x - u) >= 11 * 6


def test_span_has_room_on_both_sides_also_for_one_value() -> None:
    for values in ([1.0], [0.0], [0.2, 0.9]):
        low, high = span(values)
        assert low < min(values) <= max(values) < high


def test_no_results_and_missing_packages_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / FILE).touch()
    with pytest.raises(LimitError, match="at least one result"):
        report.write_report(tmp_path, tmp_path / "report.html")
    monkeypatch.setitem(__import__("sys").modules, "vl_convert", None)
    with pytest.raises(MissingExtraError, match=r"tokenmill\[bench\]"):
        report.render(LINES)
