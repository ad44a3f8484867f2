"""calibration/sources.py: specs, shares, data sets and the check before any work. Oracles written another way, properties."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compresskit.calibration import check, parse, read_text, sources
from compresskit.calibration.sources import BuiltinSource, FileSource, HubSource, SelfSource, shares
from compresskit.errors import CalibrationError

PROSE = "some words that make up a line\n" * 100


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("self", [SelfSource()]),
        ("builtin", [BuiltinSource()]),
        ("a.txt", [FileSource(Path("a.txt"))]),
        ("a.jsonl#body", [FileSource(Path("a.jsonl"), "body")]),
        ("a/b.parquet", [FileSource(Path("a/b.parquet"))]),
        ("c++.txt", [FileSource(Path("c++.txt"))]),
        ("self+c++.txt+builtin", [SelfSource(), FileSource(Path("c++.txt")), BuiltinSource()]),
        ("hub:name", [HubSource("name")]),
        ("hub:owner/name", [HubSource("owner/name")]),
        ("hub:owner/name/config:test#body", [HubSource("owner/name", "config", "test", "body")]),
        ("hub:owner/name:test+self", [HubSource("owner/name", None, "test"), SelfSource()]),
    ],
)
def test_a_spec_means_its_sources(spec: str, expected: list[object]) -> None:
    assert parse(spec) == expected


@pytest.mark.parametrize("spec", ["", "+", "self+", "+self", "slef", "a.csv", "self+a.csv", "hub:", "hub:a/b/c/d", "hub:/name"])
def test_a_spec_of_no_known_kind_is_refused(spec: str) -> None:
    with pytest.raises(CalibrationError):
        check(spec, 4, 4)


def test_a_near_miss_is_suggested() -> None:
    with pytest.raises(CalibrationError, match="Did you mean 'self'"):
        check("slef", 4, 4)


@given(st.integers(1, 1000), st.integers(1, 8))
def test_shares_are_equal_and_the_remainder_goes_to_the_first(samples: int, sources: int) -> None:
    found = shares(samples, sources)
    assert sum(found) == samples
    assert set(found[1:]) <= {samples // sources}


@pytest.mark.parametrize(("samples", "length"), [(0, 5), (5, 0), (-1, 5)])
def test_sizes_below_one_are_refused(samples: int, length: int) -> None:
    with pytest.raises(CalibrationError, match="at least 1"):
        check("builtin", samples, length)


def test_more_texts_than_samples_and_too_large_requests_are_refused() -> None:
    with pytest.raises(CalibrationError, match="fewer than the 2 texts"):
        check("self+builtin", 1, 8)
    with pytest.raises(CalibrationError, match=r"builtin: .* bytes of text"):
        check("builtin", 10_000, 1000)


@pytest.mark.parametrize(("package", "spec"), [("pyarrow", "a.parquet"), ("datasets", "hub:owner/name")])
def test_a_missing_package_is_named_with_its_extra(
    package: str, spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.parquet").write_bytes(b"PAR1")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    with pytest.raises(CalibrationError, match=r"compresskit\[data\]"):
        check(spec, 1, 1)


def test_the_check_loads_no_torch(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"text": PROSE}))
    program = f"import sys; from compresskit.calibration import check; check({f'self+builtin+{file}'!r}, 9, 9)"
    program += "; assert not {'torch', 'transformers'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_a_data_set_is_streamed_up_to_a_bound_and_its_faults_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # `datasets` opens a folder the way it opens a data set of the Hub.
    monkeypatch.chdir(tmp_path)
    Path("set").mkdir()
    rows = [f"row {number}" for number in range(50)]
    Path("set/train.jsonl").write_text("".join(json.dumps({"text": row, "number": 1}) + "\n" for row in rows))
    assert read_text(HubSource("set")) == ("\n\n".join(rows), "hub:set:train#text")
    monkeypatch.setattr(sources, "HUB_BYTES", 100)
    text, description = read_text(HubSource("set"))
    assert "\n\n".join(rows).startswith(text)
    assert "first" in description
    faults = {"tekst": "Did you mean 'text'", "number": "does not hold text"}
    for column, message in faults.items():
        with pytest.raises(CalibrationError, match=message):
            read_text(HubSource("set", column=column))
    with pytest.raises(CalibrationError, match="Bad split"):
        read_text(HubSource("set", split="test"))
