"""Charts as inline SVG, without scripts or network; colours come from the page's CSS and follow light and dark mode.

Every mark has a <title>, which browsers show as a tooltip and screen readers read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 560, 260
LEFT, RIGHT, TOP, BOTTOM = 74, 14, 14, 44
TICKS = 5
MOST_LABELS = 12
"""Number of category labels that fit under a chart."""
LARGEST, SMALLEST = 1e300, 1e-300
"""Beyond these a difference of two numbers may be infinite, or a fifth of one 0."""


class Series(NamedTuple):
    """Named values, one per category."""

    name: str
    values: Sequence[float | None]


class Point(NamedTuple):
    """A mark of a scatter plot."""

    name: str
    x: float
    y: float
    group: int = 0
    """Number of the mark's colour."""


def ticks(low: float, high: float) -> list[float]:
    """Round numbers that span low to high, which may be any finite numbers."""
    low, high = (0.0 if abs(each) < SMALLEST else min(max(each, -LARGEST), LARGEST) for each in (low, high))
    high = high if high - low > SMALLEST else low + (abs(low) or 1.0)
    span = high - low
    step = 10 ** math.floor(math.log10(span / TICKS))
    step *= next((factor for factor in (1, 2, 2.5, 5) if span / (step * factor) <= TICKS), 10)
    first = math.floor(low / step)
    return [round((first + i) * step, 12) for i in range(math.ceil(high / step - first - 1e-9) + 1)]


def number(value: float) -> str:
    """Format a number as a label."""
    return f"{value:.4g}" if value == 0 or abs(value) >= 1e-3 else f"{value:.1e}"


def _frame(title: str, xs: list[tuple[float, str]], marks: list[str], labels: tuple[str, str], scale: list[float]) -> str:
    """Draw a chart: axes, grid, labels, marks."""
    low, high = scale[0], scale[-1]
    parts = []
    for value in scale:
        y = _place(value, low, high, HEIGHT - BOTTOM, TOP)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{number(value)}</text>')
    parts += [f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{escape(label)}</text>' for x, label in xs]
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="axis" x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(labels[0])}</text>')
    turned = f'transform="rotate(-90 13 {HEIGHT / 2 - 10})"'
    parts.append(f'<text class="axis" x="13" y="{HEIGHT / 2 - 10}" text-anchor="middle" {turned}>{escape(labels[1])}</text>')
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)}">{"".join(parts)}<g class="marks">{"".join(marks)}</g></svg>'
    )


def _place(value: float, low: float, high: float, start: float, end: float) -> float:
    """Place of a value on an axis; what lies beyond the axis stands at its end."""
    return start + (min(max(value, low), high) - low) / ((high - low) or 1) * (end - start)


def _legend(names: Sequence[str]) -> str:
    items = "".join(f'<span><i class="c{i % 4}"></i>{escape(name)}</span>' for i, name in enumerate(names))
    return f'<div class="legend">{items}</div></figure>' if len(names) > 1 else "</figure>"


def bars(title: str, categories: Sequence[str], series: Sequence[Series], labels: tuple[str, str]) -> str:
    """Draw one bar per category and series, side by side."""
    found = [value for each in series for value in each.values if value is not None]
    scale = ticks(min(0.0, *found), max(0.0, *found))
    room = (WIDTH - RIGHT - LEFT) / len(categories)
    thick = room * 0.8 / len(series)
    zero = _place(0, scale[0], scale[-1], HEIGHT - BOTTOM, TOP)
    marks = []
    for number_, each in enumerate(series):
        for index, value in enumerate(each.values):
            if value is None:
                continue
            x = LEFT + room * (index + 0.1) + thick * number_
            y = _place(value, scale[0], scale[-1], HEIGHT - BOTTOM, TOP)
            tip = (
                f"{categories[index]}, {each.name}: {number(value)}"
                if len(series) > 1
                else f"{categories[index]}: {number(value)}"
            )
            box = f'x="{x:.2f}" y="{min(y, zero):.2f}" width="{thick:.2f}" height="{max(abs(zero - y), 0.5):.2f}"'
            marks.append(f'<rect class="c{number_ % 4}" {box}><title>{escape(tip)}</title></rect>')
    every = math.ceil(len(categories) / MOST_LABELS)
    shown = [(LEFT + room * (i + 0.5), name) for i, name in enumerate(categories) if i % every == 0]
    return _frame(title, shown, marks, labels, scale) + _legend([each.name for each in series])


def line(title: str, points: Sequence[tuple[float, float]], labels: tuple[str, str]) -> str:
    """Draw a curve with a dot at every point."""
    scale = ticks(min(y for _, y in points), max(y for _, y in points))
    low, high = min(x for x, _ in points), max(x for x, _ in points)
    placed = [
        (_place(x, low, high, LEFT, WIDTH - RIGHT), _place(y, scale[0], scale[-1], HEIGHT - BOTTOM, TOP)) for x, y in points
    ]
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in placed)
    marks = [f'<path class="line" d="{path}"/>']
    for (x, y), (shown_x, shown_y) in zip(placed, points, strict=True):
        tip = f"{labels[0]} {number(shown_x)}: {number(shown_y)}"
        marks.append(f'<circle class="c0" cx="{x:.1f}" cy="{y:.1f}" r="2.5"><title>{escape(tip)}</title></circle>')
    xs = [(_place(x, low, high, LEFT, WIDTH - RIGHT), number(x)) for x in ticks(low, high) if low <= x <= high]
    return _frame(title, xs, marks, labels, scale) + "</figure>"


def scatter(title: str, points: Sequence[Point], labels: tuple[str, str], groups: Sequence[str]) -> str:
    """Draw one dot per point, with its name beside it if there is room."""
    xs, ys = ticks(0.0, max(p.x for p in points)), ticks(min(p.y for p in points), max(p.y for p in points))
    marks = []
    taken: list[tuple[float, float]] = []
    for point in points:
        x = _place(point.x, xs[0], xs[-1], LEFT, WIDTH - RIGHT)
        y = _place(point.y, ys[0], ys[-1], HEIGHT - BOTTOM, TOP)
        tip = f"{point.name}: {number(point.x)}, {number(point.y)}"
        marks.append(f'<circle class="c{point.group % 4}" cx="{x:.1f}" cy="{y:.1f}" r="6"><title>{escape(tip)}</title></circle>')
        if all(abs(x - a) > 90 or abs(y - b) > 14 for a, b in taken):
            right = x < WIDTH * 0.7
            anchor = f'x="{x + 9 if right else x - 9:.1f}" y="{y + 4:.1f}" text-anchor="{"start" if right else "end"}"'
            marks.append(f"<text {anchor}>{escape(point.name)}</text>")
            taken.append((x, y))
    shown = [(_place(x, xs[0], xs[-1], LEFT, WIDTH - RIGHT), number(x)) for x in xs]
    return _frame(title, shown, marks, labels, ys) + _legend(groups)
