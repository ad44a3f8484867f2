"""calibration/files.py: text, JSON lines and parquet, whole or in part, and every refusal of a file. Oracle, property."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from compresskit.calibration import check, files, read_text
from compresskit.calibration.sources import FileSource
from compresskit.errors import CalibrationError

PROSE = "some words that make up a line\n" * 100


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


def test_parquet_columns_are_checked(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"body": [PROSE, None, "end"], "number": [1, 2, 3]}), file)
    check(f"{file}#body", 10, 10)
    assert read_text(FileSource(file, "body")).text == PROSE + "\n\nend"
    with pytest.raises(CalibrationError, match="found are body, number"):
        check(str(file), 1, 1)
    with pytest.raises(CalibrationError, match="holds int64, not text"):
        check(f"{file}#number", 1, 1)


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


@pytest.mark.slow
def test_a_text_that_a_small_parquet_file_repeats_is_read_in_part(tmp_path: Path) -> None:
    file, text = tmp_path / "a.parquet", "a b " * (1 << 18)
    places = pyarrow.array([0, None] * 1500, pyarrow.int32())
    column = pyarrow.DictionaryArray.from_arrays(places, pyarrow.array([text]))
    parquet.write_table(pyarrow.table({"text": column}), file, compression="zstd", store_schema=False)
    assert file.stat().st_size < 10_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = files.read_file(file, "", 3)
    assert files.PART_BYTES <= len(found.text) <= files.PART_BYTES + 2 * len(text)
    assert "1500 MiB" in found.part
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 19  # KiB


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"[" * 100_000, "levels deep"),
        (b'{"text": "\\ud800"}', "surrogate"),
        (b'{"text": "a", "n": ' + b"1" * 5000 + b"}", "5,000 digits"),
    ],
)
def test_json_that_no_file_of_texts_holds_is_refused_by_line(line: bytes, words: str, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "a"}\n' + line + b"\n")
    with pytest.raises(CalibrationError, match=f"line 2: not JSON .*{words}"):
        check(str(file), 1, 1)
