"""Charts as inline SVG, without scripts or network; colours come from the page's CSS and follow light and dark mode.

Every mark has a <title>, which browsers show as a tooltip and screen readers read.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 560, 270
LEFT, RIGHT, TOP, BOTTOM = 74, 20, 14, 48
TICKS = 5
MOST_LABELS = 12
"""Number of category labels that fit under a chart."""
COLOURS = 8
CHARACTER, LINE = 6.6, 14
"""Room that a name beside a mark takes."""
WIDE_RATIO = 10
"""Between the largest and the smallest value, from which on a scale is logarithmic."""
HIDDEN = 50
"""A bar of a fiftieth of a chart's height can hardly be seen."""
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
    is_joined: bool = False
    """Whether a line leads through the points of its group, in order of x."""


class Scale(NamedTuple):
    """How values become places on the vertical axis."""

    marks: Sequence[float]
    """Values with a label, from the lowest to the highest place."""
    is_logarithmic: bool = False

    def place(self, value: float) -> float:
        """Height of a value in the chart."""
        low, high = self.marks[0], self.marks[-1]
        value = min(max(value, low), high)
        if self.is_logarithmic:
            low, high, value = map(math.log10, (low, high, value))
        return _place(value, low, high, HEIGHT - BOTTOM, TOP)


def scale_of(values: Sequence[float]) -> Scale:
    """A scale of round numbers over these values; logarithmic where they are far apart and all above 0."""
    low, high = min(values), max(values)
    if low < SMALLEST or high / low < WIDE_RATIO or high > LARGEST:
        return Scale(ticks(low, high))
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    step = math.ceil((last - first) / TICKS)
    return Scale([10.0**power for power in range(first, last + step, step)], is_logarithmic=True)


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


def _frame(
    title: str, xs: list[tuple[float, str]], marks: list[str], labels: tuple[str, str], scale: Scale, note: str = ""
) -> str:
    """Draw a chart: axes, grid, labels, marks."""
    parts = []
    for value in scale.marks:
        y = scale.place(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{number(value)}</text>')
    parts += [f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{escape(label)}</text>' for x, label in xs]
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="axis" x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{escape(labels[0])}</text>')
    turned = f'transform="rotate(-90 13 {HEIGHT / 2 - 10})"'
    parts.append(f'<text class="axis" x="13" y="{HEIGHT / 2 - 10}" text-anchor="middle" {turned}>{escape(labels[1])}</text>')
    small = f"<small>{escape(note)}</small>" if note else ""
    spoken = f"{title}: {note}" if note else title
    return (
        f'<figure><figcaption>{escape(title)}{small}</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(spoken)}">{"".join(parts)}<g class="marks">{"".join(marks)}</g></svg>'
    )


def _place(value: float, low: float, high: float, start: float, end: float) -> float:
    """Place of a value on an axis; what lies beyond the axis stands at its end."""
    return start + (min(max(value, low), high) - low) / ((high - low) or 1) * (end - start)


def _legend(names: Sequence[str]) -> str:
    items = "".join(f'<span><i class="c{i % COLOURS}"></i>{escape(name)}</span>' for i, name in enumerate(names))
    return f'<div class="legend">{items}</div></figure>' if len(names) > 1 else "</figure>"


def bars(title: str, categories: Sequence[str], series: Sequence[Series], labels: tuple[str, str]) -> str:
    """Draw one bar per category and series, side by side; below the title stands how far the last series spreads."""
    found = [value for each in series for value in each.values if value is not None]
    # Where most bars would be too low to see beside the highest, powers of ten show them.
    hidden = min(found) > SMALLEST and statistics.median(found) * HIDDEN < max(found)
    scale = scale_of(found) if hidden else Scale(ticks(min(0.0, *found), max(0.0, *found)))
    room = (WIDTH - RIGHT - LEFT) / len(categories)
    thick = room * 0.8 / len(series)
    zero = scale.place(scale.marks[0] if hidden else 0)
    marks = []
    for number_, each in enumerate(series):
        for index, value in enumerate(each.values):
            if value is None:
                continue
            x = LEFT + room * (index + 0.1) + thick * number_
            y = scale.place(value)
            tip = (
                f"{categories[index]}, {each.name}: {number(value)}"
                if len(series) > 1
                else f"{categories[index]}: {number(value)}"
            )
            box = f'x="{x:.2f}" y="{min(y, zero):.2f}" width="{thick:.2f}" height="{max(abs(zero - y), 0.5):.2f}"'
            marks.append(f'<rect class="c{number_ % COLOURS}" {box}><title>{escape(tip)}</title></rect>')
    every = math.ceil(len(categories) / MOST_LABELS)
    shown = [(LEFT + room * (i + 0.5), name) for i, name in enumerate(categories) if i % every == 0]
    note = spread(categories, series[-1].values, labels[0])
    note = f"{series[-1].name}: {note}" if len(series) > 1 else note
    return _frame(title, shown, marks, labels, scale, note) + _legend([each.name for each in series])


def line(title: str, points: Sequence[tuple[float, float]], labels: tuple[str, str]) -> str:
    """Draw a curve with a dot at every point."""
    scale = Scale(ticks(min(y for _, y in points), max(y for _, y in points)))
    low, high = min(x for x, _ in points), max(x for x, _ in points)
    placed = [(_place(x, low, high, LEFT, WIDTH - RIGHT), scale.place(y)) for x, y in points]
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in placed)
    marks = [f'<path class="line" d="{path}"/>']
    for (x, y), (shown_x, shown_y) in zip(placed, points, strict=True):
        tip = f"{labels[0]} {number(shown_x)}: {number(shown_y)}"
        marks.append(f'<circle class="c0" cx="{x:.1f}" cy="{y:.1f}" r="2.5"><title>{escape(tip)}</title></circle>')
    xs = [(_place(x, low, high, LEFT, WIDTH - RIGHT), number(x)) for x in ticks(low, high) if low <= x <= high]
    return _frame(title, xs, marks, labels, scale) + "</figure>"


def scatter(title: str, points: Sequence[Point], labels: tuple[str, str], groups: Sequence[str]) -> str:
    """Draw one dot per point, with its name beside it if there is room; the first points have the choice."""
    xs, scale = ticks(0.0, max(p.x for p in points)), scale_of([p.y for p in points])
    placed = [(_place(p.x, xs[0], xs[-1], LEFT, WIDTH - RIGHT), scale.place(p.y)) for p in points]
    marks = _joining(points, placed)
    taken = [Box(x - 7, y - 7, x + 7, y + 7) for x, y in placed]
    for point, (x, y) in zip(points, placed, strict=True):
        colour, radius = point.group % COLOURS, 4 if point.is_joined else 7
        tip = f"{point.name}: {number(point.x)}, {number(point.y)}"
        marks.append(f'<circle class="c{colour}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"><title>{escape(tip)}</title></circle>')
        if box := _room(x, y, len(point.name) * CHARACTER, taken):
            marks.append(f'<text x="{box.left:.1f}" y="{box.bottom - 3:.1f}">{escape(point.name)}</text>')
            taken.append(box)
    shown = [(_place(x, xs[0], xs[-1], LEFT, WIDTH - RIGHT), number(x)) for x in xs]
    return _frame(title, shown, marks, labels, scale) + _legend(groups)


class Box(NamedTuple):
    """A part of a chart that something takes."""

    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: Box) -> bool:
        """Whether the two overlap."""
        return self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom


def _room(x: float, y: float, width: float, taken: Sequence[Box]) -> Box | None:
    """Room for a name of this width beside, above or below a mark; None if there is none."""
    half = width / 2
    for left, middle in ((x + 10, y), (x - 10 - width, y), (x - half, y - 15), (x - half, y + 15)):
        box = Box(left, middle - LINE / 2, left + width, middle + LINE / 2)
        if box.left > LEFT and box.right < WIDTH - 2 and box.top > 0 and not any(map(box.meets, taken)):
            return box
    return None


def _joining(points: Sequence[Point], placed: Sequence[tuple[float, float]]) -> list[str]:
    """A line through the joined points of each group that has several."""
    found = []
    for group in sorted({point.group for point in points if point.is_joined}):
        through = sorted(at for point, at in zip(points, placed, strict=True) if point.group == group)
        if len(through) > 1:
            path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in through)
            found.append(f'<path class="joining s{group % COLOURS}" d="{path}"/>')
    return found


def spread(categories: Sequence[str], values: Sequence[float | None], what: str) -> str:
    """The lowest and the highest of a chart's values in words, and where they are."""
    known = [(value, name) for value, name in zip(values, categories, strict=True) if value is not None]
    (low, first), (high, last) = min(known, key=lambda each: each[0]), max(known, key=lambda each: each[0])
    if low == high:
        return f"{number(low)} in every {what}"
    return f"{number(low)} in {what} {first} to {number(high)} in {what} {last}"
