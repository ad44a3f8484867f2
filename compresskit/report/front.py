"""The front that a search found, on the page: points of the front, random assignments and the choice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compresskit.numerics.units import readable_bytes
from compresskit.report import charts
from compresskit.report.collecting import listed, number
from compresskit.report.markup import section, table

GROUPS = ("chosen", "front", "random assignments of equal bytes")
MOST_POINTS = 200
"""Of a group, however many a manifest lists."""


def front(name: str, facts: Mapping[str, Any]) -> str:
    """Bytes against measured KL of a search's points; "" for a step that searched nothing."""
    chosen = facts.get("chosen")
    points = [
        *_points("chosen", [{**chosen, "kl": chosen.get("kl_quick")}] if isinstance(chosen, Mapping) else [], 0),
        *_points("front", listed(facts.get("measured_front")), 1),
        *_points("random", listed(facts.get("random")), 2),
    ]
    if not points:
        return ""
    drawn = charts.scatter("Left and low is better", points, ("size, MB", "KL, nats a token"), GROUPS)
    rows = [(point.name, readable_bytes(point.x * 1e6), f"{point.y:.4f}") for point in points if point.group < len(GROUPS) - 1]
    return section(f"{name}: bytes and loss", drawn, table(("point", "size", "KL"), rows, "Front"))


def _points(name: str, found: list[Any], group: int) -> list[charts.Point]:
    """The points that a chart can show, of what a manifest lists."""
    points: list[charts.Point] = []
    for each in found[:MOST_POINTS]:
        size, loss = (number(each.get(key)) if isinstance(each, Mapping) else None for key in ("bytes", "kl"))
        if size is not None and loss is not None and size >= 0:
            label = name if group == 0 else f"{name} {len(points) + 1}"
            points.append(charts.Point(label, size / 1e6, loss, group, is_joined=group == 1))
    return points
