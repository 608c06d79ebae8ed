"""Charts as SVG text for the report: lines over steps, and a map of numbers. No library, no script.

Colours are classes (c0, c1, …) that the page's style sheet defines for light and dark; series also differ in dashes or
marks, so that nothing is told by colour alone. Every line, point and cell has a <title>, which browsers show as a tip
and screen readers read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

WIDTH, HEIGHT = 640, 250  # of a line chart, in units of its viewBox
LEFT, RIGHT, TOP, BOTTOM = 78, 14, 12, 46
COLOURS = 7  # classes that the style sheet has
MOST_POINTS = 400  # of a line: more cannot be told apart


@dataclass(frozen=True)
class Series:
    """One line of a chart. style: "line", "faint" (behind the others, not in the legend) or "marks" (a line with dots).

    colour: which of the page's colours; None: the next one.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    style: Literal["line", "faint", "marks"] = "line"
    colour: int | None = None


def line_chart(series: Sequence[Series], title: str, x_label: str, y_label: str, log: bool | None = None) -> str:
    """An SVG of the series; log: a logarithmic y axis (None: where the values span more than a factor of 50)."""
    shown = [_finite(one) for one in series]
    shown = [one for one in shown if len(one.x)]
    if not shown:
        return ""
    ys = [value for one in shown for value in one.y]
    xs = [value for one in shown for value in one.x]
    if log is None:
        log = min(ys) > 0 and max(ys) / min(ys) > 50
    if log:
        shown = [_finite(one, above=0.0) for one in shown]
        ys = [value for one in shown for value in one.y]
        if not ys:
            return ""
    x_axis = _Axis(min(xs), max(xs), LEFT, WIDTH - RIGHT, False, whole=all(float(x).is_integer() for x in xs))
    y_axis = _Axis(min(ys), max(ys), HEIGHT - BOTTOM, TOP, log)
    parts = [_grid(x_axis, y_axis, x_label, y_label)]
    colours = iter(range(len(shown) * 2))
    legend: list[tuple[str, str]] = []
    for one in shown:
        colour = (next(colours) if one.colour is None else one.colour) % COLOURS
        points = [(x_axis.at(x), y_axis.at(y)) for x, y in _thinned(one.x, one.y)]
        path = "M" + " L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        name = escape(one.name)
        ends = f"{name}: {number(one.y[0])} at {number(one.x[0])}, {number(one.y[-1])} at {number(one.x[-1])}"
        dashes = f"d{len(legend) % COLOURS}"
        kind = "faint" if one.style == "faint" else f"line {dashes}"
        parts.append(f'<path class="{kind} c{colour}" d="{path}"><title>{ends}</title></path>')
        if one.style == "marks":
            parts += [
                f'<circle class="mark c{colour}" cx="{x_axis.at(x):.1f}" cy="{y_axis.at(y):.1f}" r="3.2">'
                f"<title>{name}: {number(y)} at {number(x)}</title></circle>"
                for x, y in _thinned(one.x, one.y)
            ]
        if one.style != "faint":
            legend.append((f"c{colour} {dashes}", name))
    drawing = "".join(parts)
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>{_legend(legend) if len(legend) > 1 else ''}"
        f'<svg role="img" aria-label="{escape(title)}" viewBox="0 0 {WIDTH} {HEIGHT}">{drawing}</svg></figure>'
    )


def heat_map(rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float | None]], title: str,
             x_label: str) -> str:  # fmt: skip
    """An SVG with a cell for each value, the darker the larger; None leaves the cell empty."""
    found = [value for line in values for value in line if value is not None and math.isfinite(value)]
    if not found:
        return ""
    low, high = min(0.0, *found), max(found)
    left = 8 + 7.4 * max(map(len, rows))
    cell = min(84.0, (WIDTH - left - 8) / len(columns))
    tall, top, roomy = 26, 4, cell >= 44
    parts = []
    for row, (name, line) in enumerate(zip(rows, values, strict=True)):
        y = top + tall * row
        parts.append(f'<text class="tick" x="{left - 8:.1f}" y="{y + 18}" text-anchor="end">{escape(name)}</text>')
        for column, value in enumerate(line):
            if value is None or not math.isfinite(value):
                continue
            x = left + cell * column
            share = 0.06 + 0.6 * ((value - low) / (high - low) if high > low else 1.0)
            tip = f"{escape(name)}, {escape(x_label)} {escape(columns[column])}: {number(value)}"
            label = (
                f'<text class="cell" x="{x + cell / 2:.1f}" y="{y + 18}" text-anchor="middle">{number(value)}</text>'
                if roomy
                else ""
            )
            parts.append(
                f'<g><title>{tip}</title><rect class="heat" x="{x + 1:.1f}" y="{y + 1}" width="{cell - 2:.1f}" '
                f'height="{tall - 2}" fill-opacity="{share:.3f}"/>{label}</g>'
            )
    bottom = top + tall * len(rows)
    every = math.ceil(26 / cell)
    for column in range(0, len(columns), every):
        x = left + cell * (column + 0.5)
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{escape(columns[column])}</text>'
        )
    middle = left + cell * len(columns) / 2
    parts.append(
        f'<text class="axis" x="{middle:.1f}" y="{bottom + 36}" text-anchor="middle">{escape(x_label)}; '
        f"{number(min(found))} to {number(high)}</text>"
    )
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg role="img" aria-label="{escape(title)}" '
        f'viewBox="0 0 {WIDTH} {bottom + 44}">{"".join(parts)}</svg></figure>'
    )


def number(value: float) -> str:
    """Three or four significant digits, as short as they go: 0.00123, 1.5, 12,300, 1.2e-7."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if abs(value) >= 10_000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.4g}"


# --- axes -----------------------------------------------------------------------------------------------------------


class _Axis:
    """Values on one axis: where they lie between two ends of the drawing, and the ticks."""

    def __init__(self, low: float, high: float, start: float, stop: float, log: bool, whole: bool = False) -> None:
        self.start, self.stop, self.log = start, stop, log
        if log:
            low, high = math.log10(low), math.log10(high)
        if high - low < 1e-12 * max(1.0, abs(high)):
            low, high = low - 0.5, high + 0.5
        if not whole:
            margin = 0.04 * (high - low)
            low, high = low - margin, high + margin
        self.low, self.high, self.whole = low, high, whole

    def at(self, value: float) -> float:
        if self.log:
            value = math.log10(value)
        return self.start + (value - self.low) / (self.high - self.low) * (self.stop - self.start)

    def ticks(self) -> list[float]:
        if self.log and self.high - self.low > 1.5:
            powers = range(math.ceil(self.low), math.floor(self.high) + 1)
            every = math.ceil(len(powers) / 6) or 1
            return [10.0**power for power in powers[::every]]
        low, high = (10**self.low, 10**self.high) if self.log else (self.low, self.high)
        rough = (high - low) / 5
        power = 10 ** math.floor(math.log10(rough))
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
        if self.whole:
            step = max(1.0, step)
        first = math.ceil(low / step)
        return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def _grid(x_axis: _Axis, y_axis: _Axis, x_label: str, y_label: str) -> str:
    bottom = HEIGHT - BOTTOM
    parts = []
    for value in y_axis.ticks():
        y = y_axis.at(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{number(value)}</text>')
    for value in x_axis.ticks():
        x = x_axis.at(value)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 17}" text-anchor="middle">{number(value)}</text>')
    parts.append(f'<line class="base" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>')
    middle = (TOP + bottom) / 2
    parts.append(
        f'<text class="axis" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">'
        f"{escape(x_label)}</text>"
        f'<text class="axis" x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})">'
        f"{escape(y_label)}</text>"
    )
    return "".join(parts)


def _legend(entries: Sequence[tuple[str, str]]) -> str:
    items = [
        f'<span><svg viewBox="0 0 30 10" aria-hidden="true"><path class="line {kind}" d="M1 5 L29 5"/></svg>'
        f"{name}</span>"
        for kind, name in entries
    ]
    return f'<div class="legend">{"".join(items)}</div>'


def _finite(series: Series, above: float = -math.inf) -> Series:
    kept = [(x, y) for x, y in zip(series.x, series.y, strict=True) if math.isfinite(y) and y > above]
    return Series(series.name, [x for x, _ in kept], [y for _, y in kept], series.style, series.colour)


def _thinned(x: Sequence[float], y: Sequence[float]) -> list[tuple[float, float]]:
    """At most MOST_POINTS points: of each stretch the lowest and the highest, in their order."""
    points = list(zip(x, y, strict=True))
    if len(points) <= MOST_POINTS:
        return points
    size = math.ceil(2 * len(points) / MOST_POINTS)
    kept = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        ends = {min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])}
        kept += sorted(ends)
    return kept
