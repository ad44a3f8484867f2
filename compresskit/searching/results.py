"""What a search writes: the front, the baseline and the choice as JSON, a recipe to run and edit, and the reasons."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from compresskit.calibration.sources import parts_of
from compresskit.models.model import BITS_PER_BYTE
from compresskit.numerics.scheme import Scheme
from compresskit.numerics.units import readable_bytes
from compresskit.searching.candidates import Unit
from compresskit.searching.knapsack import Assignment, Table, front, total
from compresskit.searching.request import SearchRequest
from compresskit.searching.strategy import Found
from compresskit.searching.switches import Space, ladders

JSON, RECIPE = "search.json", "recipe.yaml"
MEGABYTE = 1e6


def described(request: SearchRequest, found: Found, scores: Table, losses: dict[str, Any]) -> dict[str, Any]:
    """The content of search.json. `scores`: before any correction. `losses`: what was measured of the chosen assignment.

    Returns:
        Bytes of the weight files at most, stored bits a weight, KL in nats a token.
    """
    sizes, units = request.sizes, request.units

    def point(assignment: Assignment) -> dict[str, Any]:
        size = total(sizes, assignment)
        bits = BITS_PER_BYTE * size / sum(unit.weights for unit in units)
        return {
            "bytes": int(size) + request.fixed_bytes,
            "bits": bits,
            "predicted_kl": total(scores, assignment),
            "corrected_kl": total(found.costs, assignment),
        }

    measured = [point(each) | {"kl": loss} for each, loss in found.measured.items()]
    random = [point(each) | {"kl": loss} for each, loss in found.random]
    return {
        "target": {name: getattr(request.options, name) for name in ("bytes", "bits", "max_loss")},
        "chosen": point(found.chosen) | {"units": request.bits_by(found.chosen)} | losses,
        "predicted_best": point(found.start),
        "front": [point(each) for each in found.front],
        "measured_front": measured,
        "rank_correlation": _rank_correlation(measured, "predicted_kl"),
        "rank_correlation_at_equal_bytes": _rank_correlation(random, "predicted_kl"),
        "rank_correlation_corrected": _rank_correlation(measured, "corrected_kl"),
        "random": random,
        "quick_windows": request.options.quick_windows,
        "generations": found.generations,
        "reasons": reasons(units, found),
    }


def _rank_correlation(points: list[dict[str, Any]], key: str) -> float:
    return rank_correlation([each[key] for each in points], [each["kl"] for each in points])


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's rank correlation of two lists; 0 where one of them is constant."""
    if min(len(set(first)), len(set(second))) < 2:
        return 0.0
    return statistics.correlation(_ranks(first), _ranks(second))


def _ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 0; equal values share the mean of theirs."""
    order = sorted(values)
    return [order.index(value) + (order.count(value) - 1) / 2 for value in values]


def reasons(units: Sequence[Unit], found: Found) -> list[dict[str, Any]]:
    """For every unit what it got, what the next options would have saved or cost, and the price of a byte they were judged by."""
    sizes = [unit.sizes for unit in units]
    price, space = _price(found, sizes), Space(ladders(found.costs, sizes), sizes, found.budget)
    rows = []
    for number, (unit, costs, option) in enumerate(zip(units, found.costs, found.chosen, strict=True)):
        row: dict[str, Any] = {"unit": unit.name, **_grid(unit.schemes[option]), "cost": costs[option]}
        row["price_per_megabyte"] = price
        for key, other in (("less", space.lowered(number, option)), ("more", space.raised(number, option))):
            if other is not None:
                row[key] = {
                    **_grid(unit.schemes[other]),
                    "bytes": unit.sizes[other] - unit.sizes[option],
                    "cost": costs[other] - costs[option],
                }
        if found.start[number] != option:
            row["predicted"] = _grid(unit.schemes[found.start[number]])
        rows.append(row)
    return rows


def _grid(scheme: Scheme) -> dict[str, int]:
    return {"bits": scheme.bits, "group_size": scheme.group_size}


def _price(found: Found, sizes: Table) -> float:
    """Nats that the last megabyte of the budget saves: the slope of the corrected front there."""
    points = [each for each in front(found.costs, sizes) if total(sizes, each) <= found.budget][-2:]
    if len(points) == 1:
        return 0.0
    first, last = points
    return MEGABYTE * (total(found.costs, first) - total(found.costs, last)) / (total(sizes, last) - total(sizes, first))


def explained(row: Mapping[str, Any]) -> str:
    """One line of `--explain`."""
    parts = [f"{row['unit']}: {_words(row)}, cost {row['cost']:.4f} nats"]
    for key, verb in (("less", "fewer"), ("more", "more")):
        if key in row:
            other = row[key]
            size, change = readable_bytes(abs(other["bytes"])), other["cost"]
            rate = MEGABYTE * abs(change / other["bytes"])
            parts.append(f"{_words(other)} takes {size} {verb} and {change:+.4f} nats ({rate:.3g} a MB)")
    parts.append(f"a MB is worth {row['price_per_megabyte']:.3g} nats")
    if "predicted" in row:
        parts.append(f"the trials overruled the scores, which gave {_words(row['predicted'])}")
    return "; ".join(parts)


def _words(grid: Mapping[str, Any]) -> str:
    group = f"groups of {grid['group_size']}" if grid["group_size"] else "a row a group"
    return f"{grid['bits']} bits in {group}"


def baseline(random: list[dict[str, Any]], chosen: float) -> str:
    """The line about the random assignments, with every one of them."""
    losses = sorted(each["kl"] for each in random)
    verdict = "the choice beats all of them" if chosen < losses[0] else "the choice does not beat the best of them"
    listed = " ".join(f"{loss:.3f}" for loss in losses)
    return (
        f"{len(losses)} random assignments of equal bytes: KL {losses[0]:.4f} to {losses[-1]:.4f}, median "
        f"{statistics.median(losses):.4f}; chosen {chosen:.4f}: {verdict} ({listed})"
    )


def recipe(request: SearchRequest, assignment: Assignment) -> str:
    """A recipe that stores the model with these options and measures it."""
    options = request.options
    settings = {key: list(value) if isinstance(value, tuple) else value for key, value in request.method_settings(None).items()}
    text = {"calibration": "+".join(map(_absolute, parts_of(options.calibration))), "samples": options.samples}
    text |= {"sequence_length": options.sequence_length, "seed": options.seed}
    text |= options.model_dump(include={"dtype", "trust_remote_code"}, exclude_defaults=True)
    head = {
        "description": "Bits and groups of every unit as `compresskit search` chose them; edit bits_by to taste.\n",
        "source": _absolute(request.source_name),
    }
    step = {"quantize": options.quantizer, **settings, **text}
    lines = [yaml.safe_dump(head, sort_keys=False, width=1000), "steps:\n"]
    lines += _item(yaml.safe_dump(step, sort_keys=False, width=1000).splitlines())
    lines.append("    bits_by:\n")
    lines += [
        f"      {name}: {{bits: {grid['bits']}, group_size: {grid['group_size']}}}\n"
        for name, grid in request.bits_by(assignment).items()
    ]
    return "".join([*lines, *_item(["evaluate:", "against: source", "data: builtin"])])


def _item(lines: list[str]) -> list[str]:
    """Lines of one item of a list."""
    return [f"  {'- ' if number == 0 else '  '}{line}\n" for number, line in enumerate(lines)]


def _absolute(name: str) -> str:
    """A path, with `#COLUMN` or without, that is found from every folder; a name that is no path here stays."""
    before, mark, column = name.partition("#")
    path = Path(before).expanduser()
    return f"{path.resolve()}{mark}{column}" if before and path.exists() else name
