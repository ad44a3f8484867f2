"""checkpoint/small_files.py: what no JSON of ours holds is refused with one line, and no name leads out. Against literals."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from compresskit.checkpoint.small_files import DEEPEST, first_line, inside, json_value, read_json, read_text, shown
from compresskit.errors import CheckpointError, RequestError

FAULTS: dict[str, tuple[bytes, str]] = {
    "deep lists": (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "levels deep"),
    "lists a little too deep": (b'{"a": ' + b"[" * DEEPEST + b"]" * DEEPEST + b"}", "levels deep"),
    "an integer of 5,000 digits": (b'{"a": ' + b"1" * 5000 + b"}", "an integer of 5,000 digits"),
    "NaN": (b'{"a": NaN}', "NaN is no JSON number"),
    "infinity": (b'{"a": -Infinity}', "-Infinity is no JSON number"),
    "a float that overflows": (b'{"a": 1e999}', "'1e999' is too large"),
    "broken UTF-8": (b'{"a": "\xff"}', "not UTF-8 text (byte 7)"),
    "half of a surrogate pair": (b'{"a": "\\ud800"}', "half of a surrogate pair"),
    "half of one in a key": (b'{"\\udfff": 1}', "half of a surrogate pair"),
    "a null byte": (b'{"a": 1}\x00', "not valid JSON"),
    "a key twice": (b'{"a": 1, "b": {"c": 1, "c": 2}}', "'c' stands twice"),
    "a list": (b"[1]", "expected a JSON object, found list"),
    "nothing": (b"", "not valid JSON"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_line_that_names_the_file(fault: str, tmp_path: Path) -> None:
    data, words = FAULTS[fault]
    file = tmp_path / "a.json"
    file.write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        read_json(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_json_holds_is_read() -> None:
    value = {"a": [1, -2.5, "é😀", None, True, 10**30], "b": {"c": {}}}
    assert json_value(json.dumps(value)) == json_value(json.dumps(value, ensure_ascii=False)) == value
    assert json_value("[NaN, 1e999]", finite=False)[1] == float("inf")


def test_a_file_is_read_only_if_it_is_one_and_not_too_large(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_text("12345")
    for name, words in (
        ("pipe", "a pipe or a device"),
        (".", "a folder"),
        ("none", "No such file"),
        ("large", "5 bytes"),
        ("a\0", "null"),
    ):
        with pytest.raises(RequestError, match=words):
            read_text(tmp_path / name, 4, RequestError)
    assert read_text(tmp_path / "large", 5) == "12345"


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../a", "/etc/passwd", "a/b", "a\\b", "C:a", "a\0b", "a\nb", "x" * 256, None, 3, ["a"]]
)
def test_a_name_that_leads_out_of_the_folder_is_refused(name: object, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="index: names") as caught:
        inside(tmp_path, name, "index")
    assert "\n" not in str(caught.value)


def test_a_name_stays_inside_the_folder(tmp_path: Path) -> None:
    assert inside(tmp_path, "model 1.safetensors", "index") == tmp_path / "model 1.safetensors"
    assert inside(tmp_path, "adapter/a.json", "index", subfolders=True) == tmp_path / "adapter" / "a.json"
    for name in ("adapter/../../a", "/a", "a//b", "a/"):
        with pytest.raises(CheckpointError):
            inside(tmp_path, name, "index", subfolders=True)


def test_what_errors_show_is_short_and_printable() -> None:
    assert len(shown("x" * 10_000)) < 200
    assert first_line(ValueError("\n a\x00b\nc")) == "a?b"
    assert first_line(ValueError()) == "ValueError"
