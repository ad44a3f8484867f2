"""formats/archive/planning.py: every byte of a file is in one section, and codes lie with their zero points. Property."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from archive_files import low_bit_tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from compresskit.errors import CheckpointError
from compresskit.formats.archive.planning import LARGEST_CUT, SECTION_BYTES, section_bytes, sections_of
from compresskit.formats.archive.sections import Section, fault

DTYPES = (torch.float32, torch.bfloat16, torch.float8_e5m2, torch.int64, torch.uint16, torch.bool)


def check_whole(sections: list[Section], size: int) -> None:
    places = sorted(place for section in sections for place in section.places)
    assert all(sum(one) == other[0] for one, other in pairwise([(0, 0), *places, (size, 0)]))
    assert [fault(section) for section in sections] == [""] * len(sections)


@settings(max_examples=30)
@given(
    st.lists(st.tuples(st.sampled_from(range(len(DTYPES))), st.integers(0, 300), st.sampled_from(["w", "b"])), max_size=8),
    st.integers(0, 3), st.integers(8, 4000),
)  # fmt: skip
def test_every_byte_is_in_one_section(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[tuple[int, int, str]], linears: int, most: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "planned.safetensors"
    tensors = {f"t{i}.{leaf}": torch.zeros(count).to(DTYPES[d]) for i, (d, count, leaf) in enumerate(shapes)}
    for number in range(linears):
        tensors |= {f"{number}{name}": each for name, each in low_bit_tensors(2 + number % 3, rows=33 * number + 40).items()}
    save_file(tensors, path)
    most -= most % 8
    sections = sections_of(path, 0, path.stat().st_size, most)
    check_whole(sections, path.stat().st_size)
    assert sum(section.kind == "codes" for section in sections) >= linears
    assert all(section.bytes <= most for section in sections if section.kind == "planes")


def test_rows_of_codes_are_cut_where_words_of_zero_points_end(tmp_path: Path) -> None:
    save_file(low_bit_tensors(3, rows=250), tmp_path / "m.safetensors")
    found = sections_of(tmp_path / "m.safetensors", 0, (tmp_path / "m.safetensors").stat().st_size, 10_000)
    codes = [section for section in found if section.kind == "codes"]
    assert [section.places[0][1] // 96 for section in codes] == [96, 96, 58]
    assert [section.places[1][1] // 16 for section in codes] == [9, 9, 6]
    check_whole(found, (tmp_path / "m.safetensors").stat().st_size)


@pytest.mark.parametrize("change", [
    {"a.weight_zero_point": torch.zeros(5, 4, dtype=torch.int32)}, {"a.weight_zero_point": torch.zeros(6, 3, dtype=torch.int32)},
    {"a.weight_packed": torch.zeros(96, dtype=torch.int32)}, {"a.weight_zero_point": torch.zeros(96, 4, dtype=torch.int32)},
])  # fmt: skip
def test_zero_points_that_do_not_fit_leave_the_codes_to_the_planes(change: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file(low_bit_tensors(2) | change, path)
    found = sections_of(path, 0, path.stat().st_size, SECTION_BYTES)
    assert {section.kind for section in found} == {"bytes", "planes"}
    check_whole(found, path.stat().st_size)


def test_other_files_are_runs_of_bytes_and_a_damaged_safetensors_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(bytes(9 << 20))
    check_whole(sections_of(tmp_path / "a.txt", 0, 9 << 20, 1 << 20), 9 << 20)
    (tmp_path / "a.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(CheckpointError, match=r"a\.safetensors: truncated or damaged"):
        sections_of(tmp_path / "a.safetensors", 0, 100, 1 << 20)


def test_sections_of_large_folders_are_larger() -> None:
    assert [section_bytes(size) for size in (0, 10**11, 1 << 37, 1 << 50)] == [SECTION_BYTES, SECTION_BYTES, 1 << 21, LARGEST_CUT]
