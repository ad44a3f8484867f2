"""Gates: limits on a report's metrics, such as `perplexity_ratio<=1.2` or `speed.prefill_speedup >= 1.1`. No torch."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pydantic import BaseModel

from compresskit.errors import RequestError, near_miss

OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "==": operator.eq,
    "<": operator.lt,
    ">": operator.gt,
}
METRICS: dict[str, str] = {
    "perplexity": "",
    "bits_per_byte": "",
    "tokens": "",
    "nuclear_norm": "",
    "parameters": "",
    "bytes": "",
    "bits_per_weight": "",
    "kl": "--against",
    "top1_agreement": "--against",
    "perplexity_ratio": "--against",
    "reference_perplexity": "--against",
    "reference_nuclear_norm": "--against",
    "size_ratio": "--against",
    "size_ratio_16bit": "--against",
    "speed.prompt_tokens": "--speed",
    "speed.decoded_tokens": "--speed",
    "speed.rounds": "--speed",
    "speed.prefill_tokens_per_second": "--speed",
    "speed.decode_tokens_per_second": "--speed",
    "speed.peak_memory_bytes": "--speed",
    "speed.prefill_speedup": "--speed and --against",
    "speed.decode_speedup": "--speed and --against",
    "speed.reference_prefill_tokens_per_second": "--speed and --against",
    "speed.reference_decode_tokens_per_second": "--speed and --against",
    "speed.reference_peak_memory_bytes": "--speed and --against",
}
"""Metrics of a report and the flags that produce them; in addition, `tasks.NAME` for any task."""
TASKS = "tasks."
FORM = "write METRIC OPERATOR NUMBER, as in perplexity_ratio<=1.2"
_PARTS = re.compile(r"\s*(?P<metric>[^\s<>=!~]*)\s*(?P<operator>[<>=!~]*)\s*(?P<limit>.*?)\s*", re.DOTALL)


class Gate(BaseModel, frozen=True):
    """One limit on a metric."""

    metric: str
    """Key of the report; dots separate levels."""
    operator: str
    limit: float

    def __str__(self) -> str:
        return f"{self.metric}{self.operator}{self.limit:g}"


class GateResult(BaseModel, frozen=True):
    """Result of one gate; a missing or non-finite metric fails."""

    metric: str
    operator: str
    limit: float
    value: float | None
    """The report's value, or None."""
    passed: bool
    missed_by: float | None
    """Distance to the limit if the gate fails; 0 if it passes, None without a value."""
    needs: str | None = None
    """Flags that would produce a missing value, if known."""

    def __str__(self) -> str:
        gate = f"{self.metric}{self.operator}{self.limit:g}"
        if self.value is None:
            return f"{gate}: not met, the report has no finite {self.metric}" + (f"; pass {self.needs}" if self.needs else "")
        return f"{gate}: " + ("met" if self.passed else f"missed by {self.missed_by:g}") + f", found {self.value:g}"


def parse_gate(text: str) -> Gate:
    """Parse a gate.

    Returns:
        The gate, with its limit in the metric's unit.

    Raises:
        RequestError: the metric or operator is missing or unknown, or the limit is not a finite number.
    """
    parts = _PARTS.fullmatch(text)
    assert parts is not None  # every part may be empty
    metric, sign, limit = parts["metric"], parts["operator"], parts["limit"]
    if not metric:
        raise RequestError(f"gate {text!r}: no metric before the operator; {FORM}")
    if not _is_known(metric):
        raise RequestError(
            f"gate {text!r}: unknown metric {metric!r};{near_miss(metric, METRICS)} Known are {', '.join(METRICS)} and tasks.NAME"
        )
    if not sign:
        raise RequestError(f"gate {text!r}: no operator after {metric}; {FORM}")
    if sign not in OPERATORS:
        raise RequestError(f"gate {text!r}: unknown operator {sign!r}, known are {' '.join(OPERATORS)}; {FORM}")
    return Gate(metric=metric, operator=sign, limit=_number(text, limit))


def _is_known(metric: str) -> bool:
    return metric in METRICS or (metric.startswith(TASKS) and all(metric.split(".")))


def _number(gate: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError as error:
        raise RequestError(f"gate {gate!r}: {text!r} is not a number; {FORM}") from error
    if not math.isfinite(number):
        raise RequestError(f"gate {gate!r}: the limit is {text}, it must be finite; {FORM}")
    return number


def check_gates(gates: Iterable[Gate], report: Mapping[str, Any]) -> list[GateResult]:
    """Check every gate against the report, in order."""
    return [_check(gate, _value(report, gate.metric)) for gate in gates]


def _check(gate: Gate, value: float | None) -> GateResult:
    if value is None:
        needs = METRICS.get(gate.metric, "--tasks") or None
        return GateResult(**gate.model_dump(), value=None, passed=False, missed_by=None, needs=needs)
    passed = OPERATORS[gate.operator](value, gate.limit)
    missed_by = 0.0 if passed else abs(value - gate.limit)
    return GateResult(**gate.model_dump(), value=value, passed=passed, missed_by=missed_by)


def _value(report: Mapping[str, Any], metric: str) -> float | None:
    """Return the finite number under a dotted name; keys of the report may contain dots."""
    if metric in report:
        found = report[metric]
        is_number = isinstance(found, (int, float)) and not isinstance(found, bool) and math.isfinite(found)
        return float(found) if is_number else None
    for cut in (place for place, character in enumerate(metric) if character == "."):
        inner = report.get(metric[:cut])
        if isinstance(inner, Mapping):
            return _value(inner, metric[cut + 1 :])
    return None
