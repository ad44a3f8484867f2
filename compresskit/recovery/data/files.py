"""Read the rows of instruction data files: JSON lines, a JSON list, or parquet."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from compresskit.checkpoint.small_files import first_line, json_value, read_text
from compresskit.errors import RequestError

SUFFIXES = (".jsonl", ".json", ".parquet")
LARGEST_BYTES = 1 << 31
"""OpenHermes 2.5, a million conversations, has 1.9 GB."""
PARQUET_BATCH_ROWS = 64
"""A column may repeat one long text in every row."""

Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """Read all rows of a file.

    Returns:
        Objects as the file has them. Their texts may hold halves of surrogate pairs, which JSON can spell and no file can hold.

    Raises:
        RequestError: the file is missing, does not match its suffix, is damaged, or holds anything but objects.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise RequestError(f"{path}: instruction data is read from {', '.join(SUFFIXES)} files; convert or unpack it")
    if not path.is_file():
        raise RequestError(f"{path}: no such file; give instruction data as --data FILE.jsonl")
    if path.suffix.lower() == ".parquet":
        return _parquet_rows(path)
    text = read_text(path, LARGEST_BYTES, RequestError)
    if path.suffix.lower() == ".json":
        return _checked_rows(_parsed(text, path, 1), path)
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    return _checked_rows([_parsed(line, path, number) for number, line in lines], path)


def _parsed(text: str, path: Path, line: int) -> Any:
    try:
        return json_value(text, finite=False, whole_characters=False)
    except ValueError as error:
        line += getattr(error, "lineno", 1) - 1
        raise RequestError(f"{path}: line {line} is not JSON ({first_line(error)}); mend or remove it") from error


def _checked_rows(value: Any, path: Path) -> list[Row]:
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        raise RequestError(f"{path}: expected JSON objects, one a sample; give a list of objects, or one object a line")
    return value


def _parquet_rows(path: Path) -> list[Row]:
    if importlib.util.find_spec("pyarrow") is None:
        raise RequestError(f"{path}: reading parquet takes pyarrow; pip install 'compresskit[data]'")
    from pyarrow import parquet

    rows: list[Row] = []
    size = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches(PARQUET_BATCH_ROWS):
            size += batch.nbytes
            if size > LARGEST_BYTES:
                break
            rows += [without_nulls(row) for row in batch.to_pylist()]
    except Exception as error:  # pyarrow raises errors of every kind
        raise RequestError(f"{path}: not a readable parquet file ({first_line(error)}); write it again") from error
    if size > LARGEST_BYTES:
        raise RequestError(f"{path}: unpacks to more than {LARGEST_BYTES:,} bytes; give a part of it")
    return rows


def without_nulls(value: Any) -> Any:
    """Leave out keys without a value: a column of objects gives every object the keys of all."""
    if isinstance(value, dict):
        return {key: without_nulls(each) for key, each in value.items() if each is not None}
    return [without_nulls(each) for each in value] if isinstance(value, list) else value
