"""Pages and charts: well-formed, self-contained, and safe with any text."""

import math
import re
from html import unescape
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from molcli.report.charts import bar_chart, heatmap, line_chart
from molcli.report.html import Markup, figure, heading, page, paragraph, table

VOID = {"meta"}
TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=30)
NASTY = "<script>alert('\"&amp;')</script>"


class Checker(HTMLParser):
    """Collects tags, attributes and text; refuses a page whose tags do not nest."""

    def __init__(self, document: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self.feed(document)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def everything(text: str) -> list[Markup]:
    return [
        heading(text),
        paragraph(text),
        table([text, text], [[text, text]], prose=True),
        figure(line_chart({text: [(0, 1), (1, 2)]}, x_label=text, y_label=text), text),
        figure(bar_chart({text: 1.0}, label=text), text),
        figure(heatmap([[1.0]], row_labels=[text], x_label=text, y_label=text), text),
    ]


def test_a_page_is_self_contained() -> None:
    found = Checker(page("Title", everything("words")))
    assert not {"script", "link", "img", "iframe", "object"} & set(found.tags)
    assert not {"src", "href", "onload", "onclick"} & {name for name, _ in found.attributes}
    assert not re.search(r"https?:|@import|url\(", page("Title", everything("words")))


@given(TEXT)
def test_text_is_escaped(text: str) -> None:
    plain, found = (Checker(page(t, everything(t))) for t in ("a", text))
    assert found.tags == plain.tags
    assert [name for name, _ in found.attributes] == [name for name, _ in plain.attributes]
    assert text in unescape("".join(found.texts))


def test_markup_in_text_is_shown_not_run() -> None:
    found = Checker(page(NASTY, everything(NASTY)))
    assert "script" not in found.tags
    assert "".join(found.texts).count(NASTY) >= 8


def coordinates(chart: str) -> list[tuple[float, float]]:
    """Every point of every line."""
    lines = re.findall(r'<polyline points="([^"]*)"', chart)
    return [(float(x), float(y)) for line in lines for x, y in (p.split(",") for p in line.split())]


VALUES = st.floats(-1e12, 1e12, allow_subnormal=False) | st.sampled_from([math.nan, math.inf])


@given(st.lists(st.lists(st.tuples(VALUES, VALUES), max_size=8), max_size=8), st.booleans())
def test_lines_stay_inside_their_chart(lines: list[list[tuple[float, float]]], log: bool) -> None:
    series = {str(i): line for i, line in enumerate(lines)}
    chart = line_chart(series, x_label="x", y_label="y", log=log)
    root = ElementTree.fromstring(chart)
    width, height = map(float, root.attrib["viewBox"].split()[2:])
    drawn = [
        (x, y)
        for line in lines
        for x, y in line
        if math.isfinite(x) and math.isfinite(y) and (y > 0 or not log)
    ]
    assert len(coordinates(chart)) == len(drawn)
    assert all(0 <= x <= width and 0 <= y <= height for x, y in coordinates(chart))


def test_larger_is_higher_and_longer() -> None:
    line = coordinates(line_chart({"a": [(0, 1), (1, 5), (2, 3)]}, x_label="x", y_label="y"))
    assert line[1][1] < line[2][1] < line[0][1]  # y counts downwards
    assert line[0][0] < line[1][0] < line[2][0]
    bars = bar_chart({"a": 3.0, "b": 110.0, "c": math.inf, "d": 7.0}, label="nats", log=True)
    ElementTree.fromstring(bars)
    a, b, c, d = (float(w) for w in re.findall(r'width="([\d.]+)"', bars))
    assert 0 == c < a < d < b
    assert "110" in bars and "inf" in bars


@pytest.mark.parametrize("bars", [{}, {"a": 0.0}])
def test_empty_charts_are_well_formed(bars: dict[str, float]) -> None:
    for log in (False, True):
        ElementTree.fromstring(bar_chart(bars, label="x", log=log))
    ElementTree.fromstring(line_chart({}, x_label="x", y_label="y"))
    ElementTree.fromstring(heatmap([], row_labels=[], x_label="x", y_label="y"))


def test_heatmap_shades_are_proportional_to_the_values() -> None:
    chart = heatmap(
        [[0.0, 1.0], [4.0, math.nan, 2.0]], row_labels=["0", "1"], x_label="x", y_label="y"
    )
    ElementTree.fromstring(chart)
    shades = re.findall(r'<path d="([^"]*)" fill="[^"]*" fill-opacity="([\d.]+)"', chart)
    assert [(cells.count("M"), float(shade)) for cells, shade in shades] == [
        (1, 0.25),
        (1, 0.5),
        (1, 1.0),
    ]
    assert "darkest: 4" in chart


def test_many_cells_make_a_small_chart() -> None:
    cells = [[(i * j) % 17 for j in range(64)] for i in range(80)]
    chart = heatmap(cells, row_labels=[str(i) for i in range(80)], x_label="x", y_label="y")
    assert len(chart) < 120_000
