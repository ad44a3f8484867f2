"""Read small files that others made: text, JSON, and the names in them that become paths. Time and memory are bounded.

Nothing but a regular file is opened, because a pipe would wait for ever. JSON is bounded in its values, its depth and the
digits of its integers; it has no key twice, no NaN or infinity, and no half of a surrogate pair, which no file can hold.
"""

from __future__ import annotations

import json
import math
import re
import stat
from pathlib import Path
from typing import Any

from compresskit.errors import CheckpointError, CompresskitError

LARGEST_BYTES = 1 << 26
"""The largest tokenizers and indexes in use have about 35 MB."""
LARGEST_CONFIG_BYTES = 1 << 24
"""A configuration may list every linear of a model with many experts."""
MOST_VALUES = 4_000_000
"""Four times the largest tokenizer's; these many take about 700 MB as Python objects."""
DEEPEST = 200
"""A manifest holds those of all stages before it, about six levels each."""
MOST_DIGITS = 40
"""tokenizer_config.json writes "no limit" as 10**30."""
LONGEST_NAME_BYTES = 255
"""Of a file, on every usual file system."""
DEEPEST_PATH = 64
"""Folders of a path in a folder, its file included; Python makes and removes them by recursion."""
SHOWN_CHARACTERS = 120
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_RESTORE = "restore the file from its source"


def shown(value: object) -> str:
    """A value from a file as one short line, for errors."""
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "..."


def first_line(error: BaseException) -> str:
    """The first line of an error's text, printable and shortened; its type if it has none."""
    text = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    text = "".join(each if each.isprintable() else "?" for each in text[: 2 * SHOWN_CHARACTERS + 1])
    return text if len(text) <= 2 * SHOWN_CHARACTERS else text[: 2 * SHOWN_CHARACTERS] + "..."


def check_regular(path: Path, kind: type[CompresskitError] = CheckpointError) -> int:
    """Return the size of a file in bytes; raises `kind` unless it is a regular file that exists."""
    try:
        found = path.stat()
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        reason = getattr(error, "strerror", None) or str(error)
        raise kind(f"{path}: cannot be read ({reason}); check the path and its permissions") from error
    if not stat.S_ISREG(found.st_mode):
        what = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe or a device"
        raise kind(f"{path}: is {what}, expected a file; {_RESTORE}")
    return found.st_size


def read_bytes(path: Path, largest: int = LARGEST_BYTES, kind: type[CompresskitError] = CheckpointError) -> bytes:
    """Read a regular file of at most `largest` bytes; raises `kind` for anything else."""
    size = check_regular(path, kind)
    try:
        with path.open("rb") as file:
            data = file.read(largest + 1) if size <= largest else b""
    except OSError as error:
        raise kind(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from error
    if max(size, len(data)) > largest:
        raise kind(f"{path}: {max(size, len(data)):,} bytes, at most {largest:,} are read; {_RESTORE}")
    return data


def read_text(path: Path, largest: int = LARGEST_BYTES, kind: type[CompresskitError] = CheckpointError) -> str:
    """Read a UTF-8 file of at most `largest` bytes, without a byte order mark; raises `kind` for anything else."""
    try:
        return read_bytes(path, largest, kind).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise kind(f"{path}: not UTF-8 text (byte {error.start:,}); {_RESTORE}") from error


def read_json(path: Path, largest: int = LARGEST_BYTES, finite: bool = True) -> dict[str, Any]:
    """Read a JSON object from a file; CheckpointError names the file and the fault. `finite` refuses NaN and infinity."""
    return parse_json(read_text(path, largest), path, finite)


def parse_json(text: str, where: object, finite: bool = True) -> dict[str, Any]:
    """Parse a JSON object; CheckpointError names `where` it stands and the fault."""
    try:
        value = json_value(text, finite)
    except ValueError as error:
        raise CheckpointError(f"{where}: not valid JSON ({error}); {_RESTORE}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: expected a JSON object, found {type(value).__name__}; {_RESTORE}")
    return value


def json_value(text: str, finite: bool = True, whole_characters: bool = True) -> Any:
    """Parse a JSON value; raises ValueError in one line if it is none, beyond the bounds, or what the flags refuse."""
    if sum(map(text.count, ",[{")) > MOST_VALUES:
        raise ValueError(f"more than {MOST_VALUES:,} values")
    hooks: dict[str, Any] = {"parse_float": _float, "parse_constant": _constant} if finite else {}
    try:
        value = json.loads(text, parse_int=_integer, object_pairs_hook=_object, **hooks)
    except RecursionError as error:
        raise ValueError(f"nested more than {DEEPEST} levels deep") from error
    if text.count("[") + text.count("{") > DEEPEST:
        _check_depth(value)
    if whole_characters and _SURROGATE.search(text):
        _check_surrogates(value)
    return value


def _integer(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"an integer of {len(digits):,} digits")
    return int(digits)


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {shown(text)} is too large")
    return value


def _constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {shown(twice)} stands twice in an object")
    return found


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(DEEPEST):
        inside = (each.values() if isinstance(each, dict) else each for each in level)
        level = [each for values in inside for each in values if isinstance(each, (dict, list))]
        if not level:
            return
    raise ValueError(f"nested more than {DEEPEST} levels deep")


def _check_surrogates(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError("half of a surrogate pair in a text") from error


def inside(folder: Path, name: object, where: object, subfolders: bool = False) -> Path:
    """Return the path in the folder that a name from a file stands for; `subfolders` allows `adapter/model.safetensors`.

    Raises:
        CheckpointError: it is no name of a file in the folder; the message says `where` it stands.
    """
    parts = name.split("/") if isinstance(name, str) and subfolders else [name]
    if len(parts) > DEEPEST_PATH or not all(_is_plain(part) for part in parts):
        raise CheckpointError(f"{where}: names {shown(name)}, which is no file inside {folder}; {_RESTORE}")
    return folder.joinpath(*map(str, parts))


def _is_plain(part: object) -> bool:
    """Whether this is the name of a file, and no path, on every system."""
    return (
        isinstance(part, str)
        and part not in ("", ".", "..")
        and part.isprintable()
        and not set(part) & set("/\\:")
        and len(part.encode("utf-8", "replace")) <= LONGEST_NAME_BYTES
    )
