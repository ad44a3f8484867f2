"""models/architectures.py: the tests know every family of the table."""

from __future__ import annotations

from tiny_models import FAMILIES

from compresskit.models.architectures import ARCHITECTURES


def test_the_table_covers_every_family_of_the_tests() -> None:
    assert set(FAMILIES) == set(ARCHITECTURES)
