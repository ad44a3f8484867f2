"""Others' sizes and qualities, for the chart of size and quality: a JSON file that a person gives.

    {"AutoRound": [{"bytes": 157200000, "perplexity_ratio": 1.33, "name": "3 bits"}], "GPTQ": [...]}

Each name is a line through its points, in order of size.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compresskit.checkpoint.kinds import NUMBER, TEXT, Stated, is_number
from compresskit.checkpoint.small_files import read_json, shown
from compresskit.errors import RequestError
from compresskit.report import collecting

LARGEST_BYTES = 1 << 20
MOST_SERIES = 12
"""More lines than colours and dashes can tell apart are no comparison."""
References = Mapping[str, list[dict[str, Any]]]


def read_points(path: Path, result: Mapping[str, Any]) -> References:
    """Read the points; their quality is in the figure that the run's chart shows, perplexity_ratio or perplexity.

    Returns:
        Points by name, each with "bytes", the figure, and perhaps a "name".

    Raises:
        RequestError: the run measured nothing that they could stand beside, or there are too many.
        CheckpointError: the file cannot be read, or a value in it is no number; the message names it.
    """
    key = collecting.quality_key(result)
    if key is None:
        raise RequestError(f"{path}: the run has no evaluation beside which its points could stand; add an evaluate step")
    found = read_json(path, LARGEST_BYTES)
    remedy = f'write {{"NAME": [{{"bytes": 157200000, "{key}": 1.33, "name": "3 bits"}}]}}'
    if len(found) > MOST_SERIES:
        raise RequestError(f"{path}: names {len(found)} series, at most {MOST_SERIES} are drawn; leave some out")
    for name, points in found.items():
        if not isinstance(points, list) or not points or not all(isinstance(point, dict) for point in points):
            raise RequestError(f"{path}: states {shown(points)} for {shown(name)}, expected a list of points; {remedy}")
        for number, point in enumerate(points, start=1):
            stated = Stated(path, f"of point {number} of {shown(name)}", remedy)
            stated.check(point, {"bytes": NUMBER.always, key: NUMBER.always, "name": TEXT})
            if not (is_number(point["bytes"]) and point["bytes"] > 0 and point[key] > 0):
                raise RequestError(f"{path}: point {number} of {shown(name)} is not above 0 in size and {key}; {remedy}")
    return found
