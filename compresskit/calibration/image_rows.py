"""Rows with images in .jsonl and .parquet files, and the images they name. Neither torch nor Pillow is imported to check.

A row has a text and a list `images`: paths relative to the file, that lie in its folder, or what Hugging Face data sets
store, {"bytes": ..., "path": ...}. Files, their size, their pixels and their formats are bounded: PIL knows formats that start
other programs.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from compresskit.calibration.files import (
    DEFAULT_COLUMN,
    IMAGES_COLUMN,
    PARQUET_BATCH_ROWS,
    PART_BYTES,
    has_images,
    json_rows,
    open_parquet,
    reading_parquet,
    text_of_row,
)
from compresskit.calibration.sources import FileSource, Source, TextRequest, check, parse, shares
from compresskit.checkpoint.small_files import first_line, inside, read_bytes, shown
from compresskit.errors import CalibrationError, CheckpointError
from compresskit.models.model import Model
from compresskit.models.processor import check_processor

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
LARGEST_IMAGE_BYTES = 1 << 26
MOST_PIXELS = 1 << 26
"""Of one image; processors make it smaller, but it is unpacked first."""
MOST_IMAGES = 64
"""Of one row."""
IMAGE_BATCH_ROWS = 16
"""Rows of a parquet file whose images are in memory together."""


class Row(NamedTuple):
    """A row of a file."""

    place: str
    """The file and the row, for errors."""
    text: str
    images: int
    """How many there are."""
    stored: Sequence[Any]
    """The images as a .jsonl file has them."""


class Share(NamedTuple):
    """Windows of one source of a SPEC."""

    source: Source
    windows: int
    text_only: int
    """How many of them, the last ones, are without images."""


def shares_of(request: TextRequest) -> list[Share]:
    """The windows of each source; of all windows together the last `text_only` are without images."""
    sources = parse(request.spec)
    found, text_only = [], request.text_only
    for source, windows in reversed(list(zip(sources, shares(request.samples, len(sources)), strict=True))):
        found.append(Share(source, windows, min(windows, text_only)))
        text_only -= found[-1].text_only
    return found[::-1]


def check_request(request: TextRequest, model: Model) -> None:
    """`check`, and refuse images for a model that takes none; raises as `check` and `check_processor`."""
    check(request.spec, request.samples, request.sequence_length)
    if any(takes_images(share) for share in shares_of(request)):
        check_processor(model)


def takes_images(share: Share) -> bool:
    """Whether windows with images are to be made: the file has a column `images`."""
    return share.windows > share.text_only and isinstance(share.source, FileSource) and has_images(share.source.path)


def read_rows(path: Path, column: str) -> list[Row]:
    """Read the rows of a file from its start, up to `PART_BYTES` of text (of a .jsonl file, in all).

    Returns:
        The rows, those without images too.

    Raises:
        CalibrationError: the file, or a row of it, is not as it should be.
    """
    column = column or DEFAULT_COLUMN
    if path.suffix.lower() == ".parquet":
        return list(_parquet_rows(path, column))
    with path.open("rb") as file:
        data = file.read(PART_BYTES)
    data = data if len(data) < PART_BYTES else data[: data.rfind(b"\n") + 1]
    rows = []
    for place, row in json_rows(path, data, 1):
        text, images = text_of_row(place, row, column) or "", row.get(IMAGES_COLUMN)
        images = [] if images is None else images
        if not isinstance(images, list) or len(images) > MOST_IMAGES:
            what = f"{len(images)} images" if isinstance(images, list) else f"{IMAGES_COLUMN!r} {shown(images)}"
            raise CalibrationError(f"{place}: {what}, expected a list of at most {MOST_IMAGES} paths; mend the row")
        rows.append(Row(place, text, len(images), images))
    return rows


def _parquet_rows(path: Path, column: str) -> Iterator[Row]:
    """The rows with the number of their images, without the images themselves where the file allows it."""
    from pyarrow import types

    file, counted = open_parquet(path, column), _counted_columns(path)
    kind = file.schema_arrow.field(IMAGES_COLUMN).type
    if not (types.is_list(kind) or types.is_large_list(kind)):
        raise CalibrationError(
            f"{path}: column {IMAGES_COLUMN!r} holds {str(kind)[:60]}, expected a list of images; store it as a list"
        )
    number, taken = 0, 0
    for batch in _batches(path, file, PARQUET_BATCH_ROWS, [column, *counted]):
        for text, images in zip(batch.column(column), batch.column(IMAGES_COLUMN), strict=True):
            number += 1
            value, count = text.as_py() or "", len(images) if images.is_valid else 0
            taken += len(value)
            if count > MOST_IMAGES:
                raise CalibrationError(f"{path}, row {number}: {count} images, at most {MOST_IMAGES} are read; split the row")
            yield Row(f"{path}, row {number}", value, count, ())
            if taken >= PART_BYTES:
                return


def _counted_columns(path: Path) -> list[str]:
    """Stored columns from which the number of images can be counted: their paths, if there are any, and else all."""
    from pyarrow import parquet

    with reading_parquet(path):
        schema = parquet.ParquetFile(path).schema
    names = [schema.column(index).path for index in range(len(schema))]
    paths = [name for name in names if name.startswith(f"{IMAGES_COLUMN}.") and name.endswith(".path")]
    return paths or [IMAGES_COLUMN]


def _batches(path: Path, file: Any, rows: int, columns: list[str]) -> Iterator[Any]:
    with reading_parquet(path):
        yield from file.iter_batches(rows, columns=columns)


def stored_images(path: Path, rows: Sequence[Row], numbers: Sequence[int]) -> dict[int, Sequence[Any]]:
    """The images of some rows, by number, as the file has them."""
    if path.suffix.lower() != ".parquet":
        return {number: rows[number].stored for number in numbers}
    from pyarrow import parquet

    with reading_parquet(path):
        file = parquet.ParquetFile(path)
    found: dict[int, Sequence[Any]] = {}
    wanted, before = set(numbers), 0
    for batch in _batches(path, file, IMAGE_BATCH_ROWS, [IMAGES_COLUMN]):
        for number in wanted.intersection(range(before, before + len(batch))):
            found[number] = batch.column(0)[number - before].as_py()
        before += len(batch)
        if len(found) == len(wanted):
            break
    return found


def opened(place: str, stored: Any, folder: Path) -> Image:
    """Open one image of a row.

    Returns:
        The image in RGB, the right way up.

    Raises:
        CalibrationError: it is missing, outside the folder, too large, or no image.
    """
    data = stored.get("bytes") if isinstance(stored, dict) else None
    name = stored.get("path") if isinstance(stored, dict) else stored
    if data is None:
        data = _read(place, name, folder)
    if not isinstance(data, bytes):
        raise CalibrationError(f"{place}: image {shown(data)}, expected bytes; mend the row")
    if len(data) > LARGEST_IMAGE_BYTES:
        raise CalibrationError(
            f"{place}: an image of {len(data):,} bytes, at most {LARGEST_IMAGE_BYTES:,} are read; make it smaller"
        )
    return _decoded(f"{place}: image {shown(name)}" if name else f"{place}: an image", data)


def _read(place: str, name: Any, folder: Path) -> bytes:
    if not isinstance(name, str):
        raise CalibrationError(f"{place}: image {shown(name)}, expected a path; mend the row")
    try:
        path = inside(folder, name, place, subfolders=True)
    except CheckpointError as error:
        raise CalibrationError(
            f"{place}: names the image {shown(name)}, which is no file inside {folder}; move it there"
        ) from error
    try:
        return read_bytes(path, LARGEST_IMAGE_BYTES, CalibrationError)
    except CalibrationError as error:
        raise CalibrationError(f"{place}: image {error}") from error


def _decoded(what: str, data: bytes) -> Image:
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # PIL warns of what would unpack to very much
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            size = image.size
        if size[0] * size[1] <= MOST_PIXELS:
            return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # PIL raises errors of every kind
        raise CalibrationError(f"{what} is none ({first_line(error)}); give one of {', '.join(FORMATS)}") from error
    raise CalibrationError(f"{what} has {size[0]} x {size[1]} pixels, at most {MOST_PIXELS:,} are read; make it smaller")
