"""Parse a calibration SPEC and refuse unusable ones before any work."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from compresskit.calibration.documentation import Part, builtin_description, builtin_text
from compresskit.calibration.files import DEFAULT_COLUMN, ROW_SEPARATOR, SUFFIXES, check_file, missing_column, read_file
from compresskit.errors import CalibrationError, NetworkError, near_miss

KINDS = "FILE.txt, FILE.jsonl, FILE.parquet, hub:DATASET, self, builtin, or several joined by +"
FILE = re.compile(r"(?P<path>.*(?:" + "|".join(re.escape(suffix) for suffix in SUFFIXES) + r"))(?:#(?P<column>.+))?", re.I | re.S)
HUB = re.compile(r"hub:(?P<path>[^:#]+)(?::(?P<split>[^#]+))?(?:#(?P<column>.+))?")
HUB_BYTES = 1 << 24
"""Text read from the start of a streamed Hub data set (16 MiB)."""


@dataclass(frozen=True)
class SelfSource:
    """Text sampled from the model itself."""


@dataclass(frozen=True)
class BuiltinSource:
    """The running Python's documentation."""


@dataclass(frozen=True)
class FileSource:
    """A text file; `column` is "" if none was named."""

    path: Path
    column: str = ""


@dataclass(frozen=True)
class HubSource:
    """One text column of a data set on the Hugging Face Hub."""

    dataset: str
    config: str | None = None
    split: str = "train"
    column: str = DEFAULT_COLUMN


TextSource = BuiltinSource | FileSource | HubSource
Source = SelfSource | TextSource


class TextRequest(NamedTuple):
    """Request for text: source, amount and seed."""

    spec: str
    """SPEC, as understood by `parse`."""
    samples: int
    """Number of windows."""
    sequence_length: int
    """Tokens per window."""
    seed: int = 0
    text_only: int = 0
    """Number of last windows that are without images, of a file that has any."""


class Text(NamedTuple):
    """Text and its one-sentence description."""

    text: str
    description: str


def parse(spec: str, flag: str = "--calibration") -> list[Source]:
    """Parse a SPEC, given by `flag`, into the sources joined by `+`; raises CalibrationError if a part is of no known kind."""
    return [_parse_one(part, flag) for part in parts_of(spec, flag)]


def parts_of(spec: str, flag: str = "--calibration") -> list[str]:
    """The parts of a SPEC, given by `flag`, that are joined by `+`; raises CalibrationError if one is of no known kind."""
    parts: list[str] = []
    unfinished = ""
    # File names may contain a plus: pieces are rejoined until they form a known kind.
    for piece in spec.split("+"):
        unfinished = f"{unfinished}+{piece}" if unfinished else piece
        if unfinished in ("self", "builtin") or unfinished.startswith("hub:") or FILE.fullmatch(unfinished):
            parts.append(unfinished)
            unfinished = ""
    if unfinished or not parts or spec.startswith("+") or spec.endswith("+"):
        raise _unknown(unfinished or spec, flag)
    return parts


def _parse_one(part: str, flag: str) -> Source:
    if part == "self":
        return SelfSource()
    if part == "builtin":
        return BuiltinSource()
    if part.startswith("hub:"):
        return _parse_hub(part, flag)
    match = FILE.fullmatch(part)
    assert match is not None
    return FileSource(Path(match["path"]).expanduser(), match["column"] or "")


def _parse_hub(part: str, flag: str) -> HubSource:
    match = HUB.fullmatch(part)
    names = match["path"].split("/") if match else []
    if match is None or not 1 <= len(names) <= len(("owner", "name", "config")) or not all(names):
        raise CalibrationError(f"{flag} {part!r}: expected hub:OWNER/NAME[/CONFIG][:SPLIT][#COLUMN]; correct it")
    dataset, config = "/".join(names[:2]), names[2] if names[2:] else None
    return HubSource(dataset, config, match["split"] or "train", match["column"] or DEFAULT_COLUMN)


def _unknown(part: str, flag: str) -> CalibrationError:
    first = part.split("+", maxsplit=1)[0]
    if Path(first).is_file():
        return CalibrationError(f"{flag} {first!r}: its name ends in none of {', '.join(SUFFIXES)}; convert or rename it")
    return CalibrationError(
        f"{flag} {first!r}: unknown kind of text; give {KINDS}.{near_miss(first, ('self', 'builtin', 'hub:'))}"
    )


def shares(samples: int, sources: int) -> list[int]:
    """Number of samples per source: equal shares, the remainder goes to the first."""
    share, rest = divmod(samples, sources)
    return [share + rest] + [share] * (sources - 1)


def check(spec: str, samples: int, sequence_length: int, flag: str = "--calibration") -> None:
    """Refuse a request that cannot be served; does not import torch and reads little.

    Raises:
        CalibrationError: unknown kind, unusable file, missing package, sizes below 1, or certainly too little text.
    """
    for name, value in (("--samples", samples), ("--sequence-length", sequence_length)):
        if value < 1:
            raise CalibrationError(f"{name} {value}: must be at least 1; raise it")
    sources = parse(spec, flag)
    if samples < len(sources):
        raise CalibrationError(f"--samples {samples}: fewer than the {len(sources)} texts of {spec!r}; raise it")
    for source, share in zip(sources, shares(samples, len(sources)), strict=True):
        needed_bytes = share * sequence_length
        if isinstance(source, FileSource):
            check_file(source.path, source.column, needed_bytes)
        elif isinstance(source, HubSource):
            _need_datasets(source)
        elif isinstance(source, BuiltinSource) and (size := len(builtin_text("calibration").encode())) < needed_bytes:
            raise CalibrationError(
                f"builtin: {size:,} bytes of text, fewer than the {needed_bytes:,} tokens asked for; "
                "lower --samples or --sequence-length, or give a file"
            )


def _need_datasets(source: HubSource) -> None:
    if importlib.util.find_spec("datasets") is None:
        raise CalibrationError(f"hub:{source.dataset}: needs the package datasets; pip install 'compresskit[data]'")


def read_text(source: TextSource, seed: int = 0, purpose: Part = "calibration") -> Text:
    """Read the text of a source; the seed picks a part of large ones, `purpose` picks the part of `builtin`.

    Returns:
        The text, and a sentence that describes it and its part.

    Raises:
        CalibrationError: the text is unusable.
        NetworkError: the Hub is unreachable.
    """
    if isinstance(source, BuiltinSource):
        return Text(builtin_text(purpose), builtin_description(purpose))
    if isinstance(source, HubSource):
        return _read_hub(source)
    text, part = read_file(source.path, source.column, seed)
    column = f", column {source.column!r}" if source.column else ""
    return Text(text, f"{source.path.name}{column}" + (f" ({part})" if part else ""))


def _read_hub(source: HubSource) -> Text:
    """Read the first `HUB_BYTES` of a streamed data set."""
    _need_datasets(source)
    import datasets
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    place = f"hub:{source.dataset}"
    rows: list[str] = []
    taken = 0
    try:
        stream = datasets.load_dataset(source.dataset, source.config, split=source.split, streaming=True)
        for row in stream:
            if source.column not in row:
                raise missing_column(place, source.column, list(row))
            if not isinstance(row[source.column], str | None):
                raise CalibrationError(f"{place}: column {source.column!r} does not hold text; name a text column with #COLUMN")
            if row[source.column] is not None:
                rows.append(row[source.column])
                taken += len(row[source.column].encode())
            if taken >= HUB_BYTES:
                break
    except (ConnectionError, TimeoutError, HfHubHTTPError, OfflineModeIsEnabled) as error:
        raise NetworkError(f"{place}: the Hub cannot be reached ({_line(error)}); connect, or use --calibration FILE") from error
    except (ValueError, OSError) as error:
        raise CalibrationError(
            f"{place}: cannot be read ({_line(error)}); write hub:OWNER/NAME/CONFIG:SPLIT, all as the Hub spells them"
        ) from error
    name = place + (f"/{source.config}" if source.config else "") + f":{source.split}#{source.column}"
    part = f" (the first {taken / (1 << 20):.0f} MiB)" if taken >= HUB_BYTES else ""
    return Text(ROW_SEPARATOR.join(rows), name + part)


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
