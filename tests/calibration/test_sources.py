"""Specs, files and the check before any work: oracles written another way, properties, and every refusal."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from compresskit.calibration import builtin_text, check, files, parse, read_text, sources
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


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "holds no text"),
        ("a.txt", b" \n\n ", "holds no text"),
        ("a.txt", b"\xff\xfea\x00", "not UTF-8"),
        ("a.txt", b"short", "fewer than the 100 tokens"),
        ("a.jsonl", b'{"body": "x"}\n', r"no column 'text', found are body"),
        ("a.jsonl", b'{"tekst": "x"}\n', "Did you mean 'tekst'"),
        ("a.jsonl", b'{"text": "x"}\nnonsense\n', "line 2: not JSON"),
        ("a.jsonl", b'{"text": ["x"]}\n', "holds list, not text"),
        ("a.jsonl", b'["text"]\n', "expected a JSON object"),
        ("a.jsonl", b'{"text": "\xff"}\n', "not UTF-8"),
        ("a.jsonl", json.dumps({"text": "x", "other": "y" * 1000}).encode(), "fewer than the 100 tokens"),
        ("a.parquet", b"nonsense", "not a readable parquet file"),
        ("a.csv", b"text\nx\n", "ends in none of"),
    ],
)
def test_an_unusable_file_is_refused_by_name(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(CalibrationError, match=message) as caught:
        check(str(file), 10, 10)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_a_folder_and_a_column_of_plain_text_are_refused(tmp_path: Path) -> None:
    for spec, message in ((f"{tmp_path}/absent.txt", "no such file"), (f"{tmp_path}/dir.txt", "not a file")):
        (tmp_path / "dir.txt").mkdir(exist_ok=True)
        with pytest.raises(CalibrationError, match=message):
            check(spec, 1, 1)
    (tmp_path / "a.txt").write_text(PROSE)
    with pytest.raises(CalibrationError, match="has no columns"):
        check(f"{tmp_path}/a.txt#text", 1, 1)


@pytest.mark.parametrize(("samples", "length"), [(0, 5), (5, 0), (-1, 5)])
def test_sizes_below_one_are_refused(samples: int, length: int) -> None:
    with pytest.raises(CalibrationError, match="at least 1"):
        check("builtin", samples, length)


def test_more_texts_than_samples_and_too_large_requests_are_refused() -> None:
    with pytest.raises(CalibrationError, match="fewer than the 2 texts"):
        check("self+builtin", 1, 8)
    with pytest.raises(CalibrationError, match=r"builtin: .* bytes of text"):
        check("builtin", 10_000, 1000)


def test_parquet_columns_are_checked(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"body": [PROSE, None, "end"], "number": [1, 2, 3]}), file)
    check(f"{file}#body", 10, 10)
    assert read_text(FileSource(file, "body")).text == PROSE + "\n\nend"
    with pytest.raises(CalibrationError, match="found are body, number"):
        check(str(file), 1, 1)
    with pytest.raises(CalibrationError, match="holds int64, not text"):
        check(f"{file}#number", 1, 1)


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


@given(
    st.lists(st.one_of(st.none(), st.text(min_size=1)), min_size=1, max_size=6).filter(lambda r: any(t and t.strip() for t in r))
)
def test_rows_come_back_joined_by_blank_lines(tmp_path_factory: pytest.TempPathFactory, rows: list[str | None]) -> None:
    file = tmp_path_factory.mktemp("rows") / "a.jsonl"
    file.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    assert read_text(FileSource(file)).text == "\n\n".join(row for row in rows if row is not None)


@given(st.text(alphabet="aé漢😀\n ", min_size=1).filter(str.strip))
def test_plain_text_comes_back_whole(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    file = tmp_path_factory.mktemp("text") / "a.txt"
    file.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read_text(FileSource(file)).text == text


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_of_a_large_file_the_seed_picks_a_contiguous_part(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PART_BYTES", 1000)
    rows = [f"row {number} — é漢😀" for number in range(500)]
    file = tmp_path / f"a{suffix}"
    whole = ("\n" if suffix == ".txt" else "\n\n").join(rows)
    if suffix == ".parquet":
        parquet.write_table(pyarrow.table({"text": rows}), file, row_group_size=7)
    elif suffix == ".jsonl":
        file.write_text("".join(json.dumps({"text": row}, ensure_ascii=False) + "\n" for row in rows))
    else:
        file.write_text(whole)
    found = [read_text(FileSource(file), seed) for seed in (1, 1, 2, 3)]
    assert all(text in whole and 300 < len(text.encode()) <= 1400 for text, _ in found)
    assert found[0] == found[1]
    assert len({text for text, _ in found}) > 1
    assert "MiB from byte" in found[0].description


def test_the_parts_of_the_documentation_share_no_topic() -> None:
    parts = [builtin_text("calibration"), builtin_text("evaluation")]
    for text in topics.values():
        assert sum(text in part for part in parts) == 1
    assert 0.6 < len(parts[0]) / sum(map(len, parts)) < 0.85


def test_the_documentations_description_names_the_python() -> None:
    version = ".".join(map(str, sys.version_info[:3]))
    assert version in read_text(BuiltinSource()).description
    assert len(read_text(BuiltinSource()).text) > 100_000


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
