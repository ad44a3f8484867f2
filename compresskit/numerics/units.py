"""Numbers of bytes and of parameters as people read them: three digits and a fitting unit."""

from __future__ import annotations

THOUSAND = 1000
BYTE_UNITS = ("B", "KB", "MB", "GB", "TB")
COUNT_UNITS = ("", "K", "M", "B", "T")
DIGITS = 3


def readable_bytes(size: float) -> str:
    """A size in bytes: 1234567 -> "1.23 MB"; units of a thousand, as `--max-shard-size` takes them."""
    number, unit = _scaled(size, BYTE_UNITS)
    return f"{number} {unit}"


def readable_count(count: float) -> str:
    """A number of parameters or tokens: 134515008 -> "135M"."""
    return "".join(_scaled(count, COUNT_UNITS))


def _scaled(value: float, units: tuple[str, ...]) -> tuple[str, str]:
    """(the number of units with three digits, or whole below a thousand, the unit)."""
    if value < THOUSAND:
        return f"{value:.0f}", units[0]
    power = 0
    while power < len(units) - 1 and float(f"{value:.{DIGITS}g}") >= THOUSAND:
        value, power = value / THOUSAND, power + 1
    whole = len(str(int(float(f"{value:.{DIGITS}g}"))))
    return f"{value:.{max(DIGITS - whole, 0)}f}", units[power]
