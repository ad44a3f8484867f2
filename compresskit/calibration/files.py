"""Read text from UTF-8 .txt, .jsonl and .parquet files, reporting every fault.

From a file above `PART_BYTES`, only a contiguous part of that size is read; the seed picks its position. Rows are joined
by a blank line; null rows are skipped.
"""

from __future__ import annotations

import codecs
import importlib.util
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from compresskit.checkpoint.small_files import first_line, json_value
from compresskit.errors import CalibrationError, near_miss

SUFFIXES = (".txt", ".jsonl", ".parquet")
DEFAULT_COLUMN = "text"
PART_BYTES = 1 << 26
"""Maximum text read from one file (64 MiB)."""
CHECKED_BYTES = 1 << 22
"""Part of a file that `check_file` inspects (4 MiB, so that it is instant); reading inspects all of it."""
IMAGES_COLUMN = "images"
ROW_SEPARATOR = "\n\n"
PARQUET_BATCH_ROWS = 1024
SHOWN_COLUMNS = 50
SHOWN_COLUMN = 60
"""Names of columns, and characters of each, that an error lists."""


class FileText(NamedTuple):
    """Text of one file and, if it is only a part, which part."""

    text: str
    part: str


def check_file(path: Path, column: str, needed_bytes: int) -> None:
    """Refuse an unusable file; `column` is "" if none was named.

    Raises:
        CalibrationError: the file is missing, empty, not text, lacks the column, or has fewer bytes than `needed_bytes`.
    """
    suffix = path.suffix.lower()
    if not path.exists():
        raise CalibrationError(f"{path}: no such file; give a .txt, .jsonl or .parquet file, or use --calibration self")
    if not path.is_file():
        raise CalibrationError(f"{path}: not a file; give one .txt, .jsonl or .parquet file")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(CHECKED_BYTES)
    except OSError as error:
        raise CalibrationError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
    if not start.strip():
        raise CalibrationError(f"{path}: holds no text; give a file with text in it")
    whole = len(start) == size
    if suffix == ".parquet":
        size = _parquet_bytes(path, column or DEFAULT_COLUMN, needed_bytes)
    elif suffix == ".txt":
        if column:
            raise CalibrationError(f"{path}#{column}: a .txt file has no columns; leave out '#{column}'")
        _decode(path, start, whole)
    else:
        lines = start if whole else start[: start.rfind(b"\n") + 1]
        rows = list(_jsonl_rows(path, lines, column or DEFAULT_COLUMN, 1))
        if whole:
            size = len(ROW_SEPARATOR.join(rows).encode("utf-8", "surrogatepass"))
    if size < needed_bytes and not has_images(path):  # images make tokens too
        raise CalibrationError(
            f"{path}: {size:,} bytes of text, fewer than the {needed_bytes:,} tokens asked for (samples times "
            "sequence length); give more text, or lower --samples or --sequence-length"
        )


def has_images(path: Path) -> bool:
    """Whether the rows at the start of a file that `check_file` took have a column `images`."""
    if path.suffix.lower() == ".parquet":
        from pyarrow import parquet

        with reading_parquet(path):
            return IMAGES_COLUMN in parquet.ParquetFile(path).schema_arrow.names
    if path.suffix.lower() != ".jsonl":
        return False
    with path.open("rb") as file:
        start = file.read(CHECKED_BYTES)
    start = start if len(start) < CHECKED_BYTES else start[: start.rfind(b"\n") + 1]
    return f'"{IMAGES_COLUMN}"'.encode() in start and any(IMAGES_COLUMN in row for _, row in json_rows(path, start, 1))


def read_file(path: Path, column: str, seed: int) -> FileText:
    """Read a file, or a part of it if it is above `PART_BYTES`; `column` is "" if none was named.

    Returns:
        The text, and which part of the file it is, "" for the whole file.

    Raises:
        CalibrationError: as in `check_file`, for everything that is read.
    """
    check_file(path, column, 0)
    if path.suffix.lower() == ".parquet":
        return _read_parquet(path, column or DEFAULT_COLUMN, seed)
    size = path.stat().st_size
    offset = 0 if size <= PART_BYTES else random.Random(seed).randrange(size - PART_BYTES + 1)  # noqa: S311
    with path.open("rb") as file:
        file.seek(offset)
        data = file.read(PART_BYTES)
    part = "" if size <= PART_BYTES else f"{_mib(len(data))} of its {_mib(size)} from byte {offset:,} on"
    if path.suffix.lower() == ".txt":
        if offset:
            # A part may start inside a character, whose continuation bytes are 10xxxxxx.
            while data and data[0] & 0xC0 == 0x80:
                data = data[1:]
        return FileText(_decode(path, data, whole=not part), part)
    if offset:
        data = data[data.find(b"\n") + 1 :]
    if part and offset + PART_BYTES < size:
        data = data[: data.rfind(b"\n") + 1]
    rows = list(_jsonl_rows(path, data, column or DEFAULT_COLUMN, 0 if offset else 1))
    return FileText(_joined(path, rows), part)


def _mib(size: int) -> str:
    return f"{size / (1 << 20):.0f} MiB"


def _joined(path: Path, rows: list[str]) -> str:
    text = ROW_SEPARATOR.join(rows)
    if not text.strip():
        raise CalibrationError(f"{path}: its rows hold no text; give a file with text in it")
    return text


def _decode(path: Path, data: bytes, whole: bool) -> str:
    """Decode UTF-8 without a byte order mark; an incomplete last character is dropped unless `whole`."""
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(data, final=whole)
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path}: not UTF-8 text (byte {error.start:,}); convert the file to UTF-8") from error
    return text.removeprefix("\ufeff")


def _jsonl_rows(path: Path, data: bytes, column: str, first_line: int) -> Iterator[str]:
    """Yield the text of every row; `first_line` is the number of the first line, 0 if unknown."""
    for place, row in json_rows(path, data, first_line):
        text = text_of_row(place, row, column)
        if text is not None:
            yield text


def json_rows(path: Path, data: bytes, first_line: int) -> Iterator[tuple[str, Any]]:
    """Yield (where it stands, the JSON value) of every row; `first_line` is the number of the first line, 0 if unknown."""
    # Split only at newlines: text may contain Unicode's other line ends.
    for index, line in enumerate(data.split(b"\n")):
        if not line.strip():
            continue
        place = f"{path}, line {first_line + index}" if first_line else f"{path}, {line[:40]!r}"
        try:
            row = json_value(_decode(path, line, whole=True), finite=False)
        except ValueError as error:
            raise CalibrationError(f"{place}: not JSON ({error}); give one JSON object a line") from error
        yield place, row


def text_of_row(place: str, row: Any, column: str) -> str | None:
    """The text of a JSON row, None for null; raises CalibrationError if it has none."""
    if not isinstance(row, dict):
        raise CalibrationError(f"{place}: expected a JSON object, found {type(row).__name__}; give one object a line")
    if column not in row:
        raise missing_column(place, column, list(row))
    value = row[column]
    if value is not None and not isinstance(value, str):
        raise CalibrationError(f"{place}: {column!r} holds {type(value).__name__}, not text; name a text column with FILE#COLUMN")
    return value


def missing_column(place: str, column: str, found: list[str]) -> CalibrationError:
    """Error for a column that is not among those found."""
    found = [name[:SHOWN_COLUMN] for name in found[:SHOWN_COLUMNS] if name.isprintable()]
    names = ", ".join(found) or "none"
    return CalibrationError(f"{place}: no column {column!r}, found are {names}; name one with #COLUMN.{near_miss(column, found)}")


def open_parquet(path: Path, column: str) -> Any:
    """Open a pyarrow ParquetFile that has this text column."""
    if importlib.util.find_spec("pyarrow") is None:
        raise CalibrationError(f"{path}: reading parquet needs the package pyarrow; pip install 'compresskit[data]'")
    from pyarrow import parquet, types

    with reading_parquet(path):
        file = parquet.ParquetFile(path)
        names = file.schema_arrow.names
        kinds = [file.schema_arrow.field(index).type for index, name in enumerate(names) if name == column]
    if len(kinds) != 1:
        raise missing_column(str(path), column, names)
    kind = kinds[0]
    if not (types.is_string(kind) or types.is_large_string(kind)):
        what = " ".join(str(kind).split())[:SHOWN_COLUMN]
        raise CalibrationError(f"{path}: column {column!r} holds {what}, not text; name a text column with FILE#COLUMN")
    with reading_parquet(path):
        # As a dictionary, because a file of 300 bytes can repeat a text of a megabyte a million times.
        return parquet.ParquetFile(path, read_dictionary=[column])


def _parquet_bytes(path: Path, column: str, enough: int) -> int:
    """Count text bytes of the first rows, up to `enough`; stored sizes are of encoded, compressed pages."""
    file = open_parquet(path, column)
    if file.metadata.num_rows == 0:
        raise CalibrationError(f"{path}: holds no rows; give a file with text in it")
    total = 0
    with reading_parquet(path):
        sizes = (_utf8_bytes(batch) for batch in file.iter_batches(PARQUET_BATCH_ROWS, columns=[column]))
        while total < enough and (size := next(sizes, -1)) >= 0:
            total += size
    return total


def _read_parquet(path: Path, column: str, seed: int) -> FileText:
    """Read all rows, or `PART_BYTES` of rows from a position that the seed picks."""
    file = open_parquet(path, column)
    with reading_parquet(path):
        total = sum(_utf8_bytes(batch) for batch in file.iter_batches(PARQUET_BATCH_ROWS, columns=[column]))
        offset = 0 if total <= PART_BYTES else random.Random(seed).randrange(total - PART_BYTES + 1)  # noqa: S311
        rows = list(_rows_from(file.iter_batches(PARQUET_BATCH_ROWS, columns=[column]), offset))
    part = "" if total <= PART_BYTES else f"{_mib(PART_BYTES)} of its {_mib(total)} from byte {offset:,} on"
    return FileText(_joined(path, rows), part)


@contextmanager
def reading_parquet(path: Path) -> Iterator[None]:
    """Turn whatever pyarrow raises for a damaged file into a CalibrationError."""
    try:
        yield
    except Exception as error:
        reason = f"not a readable parquet file ({first_line(error)})"
        raise CalibrationError(f"{path}: {reason}; download it again") from error


def _rows_from(batches: Iterable[Any], offset: int) -> Iterator[str]:
    """Yield rows from the one at byte `offset` of the text, up to `PART_BYTES`."""
    position = 0
    for batch in batches:
        size = _utf8_bytes(batch)
        if position + size <= offset:
            position += size
            continue
        for value in batch.column(0):
            if position >= offset + PART_BYTES:
                return
            row, start = value.as_py(), position
            position += len((row or "").encode())
            if row is not None and max(start, position - 1) >= offset:
                yield row


def _utf8_bytes(batch: Any) -> int:
    from pyarrow import compute

    texts = batch.column(0)
    sizes = compute.take(compute.binary_length(texts.dictionary), texts.indices)
    return int(compute.sum(sizes.cast("int64")).as_py() or 0)
