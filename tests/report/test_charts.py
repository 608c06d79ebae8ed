"""Charts are well-formed SVG that shows the values it was given, whatever they are."""

import math
import re
from xml.etree import ElementTree

import pytest

from minilora.report.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    MOST_POINTS,
    RIGHT,
    TOP,
    WIDTH,
    Series,
    heat_map,
    line_chart,
    number,
)


def drawn(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def path_points(svg: str) -> list[tuple[float, float]]:
    path = next(part for part in drawn(svg).iter("path") if part.find("title") is not None)
    return [tuple(map(float, pair.split())) for pair in re.split("[ML]", path.attrib["d"].replace(" L", "L"))[1:]]


def test_higher_values_are_drawn_higher_and_later_steps_further_right():
    points = path_points(line_chart([Series("loss", [1, 2, 3], [4.0, 2.0, 3.0])], "t", "x", "y"))
    (x1, y1), (x2, y2), (x3, y3) = points
    assert x1 < x2 < x3
    assert y1 < y3 < y2  # an SVG's y grows downwards


def test_a_logarithmic_axis_puts_equal_factors_at_equal_distances():
    (_, a), (_, b), (_, c) = path_points(line_chart([Series("g", [1, 2, 3], [0.001, 0.1, 10.0])], "t", "x", "y"))
    assert a - b == pytest.approx(b - c, abs=0.2)
    (_, a), (_, b), (_, c) = path_points(line_chart([Series("g", [1, 2, 3], [0.001, 0.1, 10.0])], "t", "x", "y", False))
    assert a - b < 0.1 * (b - c)


def test_a_long_line_is_thinned_without_losing_its_extremes():
    values = [math.sin(step / 50) for step in range(10_000)]
    values[1234], values[8765] = 5.0, -5.0
    points = path_points(line_chart([Series("loss", list(range(10_000)), values)], "t", "x", "y"))
    assert len(points) <= 2 * MOST_POINTS
    heights = [y for _, y in points]
    assert min(heights) < sorted(heights)[1] - 20
    assert max(heights) > sorted(heights)[-2] + 20


@pytest.mark.parametrize("values", [[3.0], [2.0, 2.0], [0.0, 0.0], [1e-30, 2e-30], [-5.0, 1e9], [1.0, math.nan, 2.0]])
def test_every_line_can_be_drawn(values):
    svg = line_chart([Series("a", list(range(len(values))), values)], "t", "x", "y")
    assert "nan" not in svg
    assert drawn(svg).find("svg") is not None


def test_a_chart_of_nothing_is_left_out():
    assert line_chart([Series("a", [], [])], "t", "x", "y") == ""
    assert line_chart([Series("a", [1], [math.nan])], "t", "x", "y") == ""
    assert heat_map(["a"], ["0"], [[None]], "t", "block") == ""


def test_series_differ_in_more_than_colour_and_the_legend_names_them():
    svg = line_chart([Series(name, [1, 2], [1.0, 2.0]) for name in ("first", "second")], "t", "x", "y")
    classes = [part.attrib["class"] for part in drawn(svg).iter("path") if part.find("title") is not None]
    assert classes == ["line d0 c0", "line d1 c1"]
    assert svg.count("<span>") == 2


def test_names_cannot_break_out_of_the_drawing():
    svg = line_chart([Series("<script>&", [1, 2], [1.0, 2.0])], '"<b>', "<x>", "&y")
    assert "<script>" not in svg
    drawn(svg)
    drawn(heat_map(["<row>"], ["&"], [[1.0]], "<t>", '"'))


def test_a_cell_is_the_darker_the_larger_its_value_and_says_it():
    svg = heat_map(["q", "k"], ["0", "1"], [[1.0, 2.0], [None, 4.0]], "t", "block")
    opacity = [float(rect.attrib["fill-opacity"]) for rect in drawn(svg).iter("rect")]
    assert len(opacity) == 3
    assert opacity == sorted(opacity)
    assert "k, block 1: 4" in svg


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.00123456, "0.00123"), (1.5, "1.5"), (1234.5, "1234"), (123456.0, "123,456"), (1.2e-7, "1.2e-07")],
)
def test_numbers_are_as_short_as_they_go(value, text):
    assert number(value) == text


@pytest.mark.parametrize("log", [False, True])
def test_every_point_lies_within_the_axes(log):
    points = path_points(line_chart([Series("s", [0, 1, 2], [0.01, 1.0, 100.0])], "t", "x", "y", log))
    assert all(LEFT <= x <= WIDTH - RIGHT and TOP <= y <= HEIGHT - BOTTOM for x, y in points)
    (_, lowest), _, (_, highest) = points
    assert lowest - highest > 0.8 * (HEIGHT - BOTTOM - TOP)
