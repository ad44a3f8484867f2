"""formats/ternary/container.py, formats/ternary/sections.py: what is read is what was written, in the smaller coding. Oracle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from ternary_files import random_signs, write

from compresskit.formats.ternary.reading import open_container
from compresskit.formats.ternary.sections import SECTION, Coding


@pytest.mark.parametrize("coding", ["auto", "golomb", "bitmask"])
@pytest.mark.parametrize("density", [0.0, 0.001, 0.05, 0.5, 0.9, 1.0])
def test_what_is_read_is_what_was_written(coding: Coding, density: float, tmp_path: Path) -> None:
    vectors = {f"t{n}": random_signs(n, density, n) for n in (0, 1, 8191, 8192, 8193, 1_000_000)}
    write(tmp_path / "file.safetensors", vectors, coding)
    found = open_container(tmp_path / "file.safetensors")
    for name, signs in vectors.items():
        assert np.array_equal(np.concatenate([p.signs for p in found.parts(name)] or [np.zeros(0, np.int8)]), signs)


def test_tensors_longer_than_a_section_keep_their_order(tmp_path: Path) -> None:
    signs = np.concatenate([random_signs(SECTION, 0.01), random_signs(9000, 0.7)])
    write(tmp_path / "file", {"long": signs}, values=True)
    parts = list(open_container(tmp_path / "file").parts("long"))
    assert [len(part.signs) for part in parts] == [SECTION, 9000]
    assert np.array_equal(np.concatenate([part.signs for part in parts]), signs)
    assert parts[1].values == b"ab" * np.count_nonzero(signs[SECTION:])


@pytest.mark.parametrize("density", [0.05, 0.1, 0.2, 0.3, 0.5])
def test_auto_takes_the_smaller_coding_and_stays_within_5_percent_of_the_entropy(density: float, tmp_path: Path) -> None:
    from compresskit.formats.ternary.golomb import entropy

    signs, sizes = {"t": random_signs(1 << 20, density)}, {}
    for coding in ("auto", "golomb", "bitmask"):
        write(tmp_path / coding, signs, coding)  # type: ignore[arg-type]
        sizes[coding] = open_container(tmp_path / coding).tensors["t"].bytes
    assert sizes["auto"] == min(sizes.values())
    bits = 8 * sizes["auto"] / (1 << 20)
    assert bits < 1.05 * entropy(density)
    assert density > 0.05 or 16 / bits > 45
