"""numerics/units.py: what is read is the value to three digits, never 0 for something. Oracle: the text read back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compresskit.numerics.units import BYTE_UNITS, COUNT_UNITS, readable_bytes, readable_count

NEAR = 0.0051
"""Three digits of a number from 1.00 on."""


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"), (999, "999 B"), (1000, "1.00 KB"), (36_480, "36.5 KB"), (999_499, "999 KB"), (999_500, "1.00 MB"),
        (292_600_000, "293 MB"), (4_830_000_000, "4.83 GB"), (2.5e15, "2500 TB"),
    ],
)  # fmt: skip
def test_bytes_have_fitting_units(size: float, text: str) -> None:
    assert readable_bytes(size) == text


@pytest.mark.parametrize(("count", "text"), [(12, "12"), (230_720, "231K"), (134_515_008, "135M"), (7_241_732_096, "7.24B")])
def test_parameters_have_fitting_units(count: int, text: str) -> None:
    assert readable_count(count) == text


@given(st.integers(1, 10**17))
def test_what_is_read_is_the_value(value: int) -> None:
    for text, units in ((readable_bytes(value), BYTE_UNITS), (readable_count(value), COUNT_UNITS)):
        number = text.rstrip("BKMGT ")
        unit = text.removeprefix(number).strip()
        assert abs(float(number) * 1000 ** units.index(unit) / value - 1) <= NEAR
