"""recovery/data/shapes.py and recovery/data/turns.py: what is learned of data as other tools write it, and what is not.

Oracle: the texts of tests/instruction_corpus.py, written by hand, and `apply_chat_template` of transformers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from instruction_corpus import ANSWER, DROPPED, FILES, PLAIN, ROWS, TEMPLATE, TOOL, TOOL_TURNS, USER, lines
from pyarrow import parquet

from compresskit.errors import RequestError
from compresskit.models.tokenizer import open_tokenizer
from compresskit.recovery.data.encoding import encode_samples
from compresskit.recovery.data.instructions import read_instructions

LENGTH = 1000
GOOD = ROWS["alpaca"][0]


@pytest.fixture(scope="module")
def tokenizer(tiny: dict[str, Path]) -> Any:
    """One token a byte, and a template that shows everything."""
    found = open_tokenizer(tiny["llama"])
    found.chat_template = TEMPLATE
    return found


def learned(path: Path, tokenizer: Any) -> list[tuple[str, str]]:
    """What stands before the responses of a file, and the responses."""
    samples = encode_samples(read_instructions([path]), tokenizer, LENGTH)
    return [
        (tokenizer.decode(sample.tokens[: sample.response_start]), tokenizer.decode(sample.tokens[sample.response_start :]))
        for sample in samples
    ]


@pytest.mark.parametrize("name", ROWS)
def test_of_every_shape_the_text_is_learned_that_its_tool_means(name: str, tokenizer: Any, tmp_path: Path) -> None:
    row, expected = ROWS[name]
    path = tmp_path / "d.jsonl"
    path.write_bytes(lines(row))
    assert learned(path, tokenizer) == [expected]


@pytest.mark.parametrize("name", [name for name in ROWS if "pandas" not in name])
def test_a_table_of_it_reads_as_the_lines(name: str, tokenizer: Any, tmp_path: Path) -> None:
    """Arrow gives all objects of a column the same keys, null where a row has none."""
    row, expected = ROWS[name]
    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "d.parquet")
    assert learned(tmp_path / "d.parquet", tokenizer) == [expected]


def test_rows_of_all_shapes_in_one_file_are_each_read_by_its_own(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(lines(*(row for row, _ in reversed(ROWS.values()))))
    assert learned(path, tokenizer) == [expected for _, expected in reversed(ROWS.values())]
    assert read_instructions([path]).shapes == {"d.jsonl": "alpaca, messages, prompt-response, dolly"}


@pytest.mark.parametrize("name", FILES)
def test_files_of_other_systems_read_the_same(name: str, tokenizer: Any, tmp_path: Path) -> None:
    suffix, data = FILES[name]
    path = tmp_path / f"d.{suffix}"
    path.write_bytes(data)
    assert learned(path, tokenizer) == [PLAIN]


@pytest.mark.parametrize("name", DROPPED)
def test_what_is_no_text_is_counted_by_its_reason_and_never_learned(name: str, tmp_path: Path) -> None:
    row, reason = DROPPED[name]
    path = tmp_path / "d.jsonl"
    path.write_bytes(lines(GOOD, row, GOOD, row))
    reading = read_instructions([path])
    assert [sample.row for sample in reading.samples] == [0, 2]
    assert {key: count for key, count in reading.dropped.items() if count} == {reason: 2}
    assert reading.first[reason].startswith("d.jsonl row 1")
    assert reading.first[reason].isprintable()
    with pytest.raises(RequestError, match=f"{path}: none of its 1 rows can be learned: 1 {reason} ") as caught:
        path.write_bytes(lines(row))
        read_instructions([path])
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("row", [GOOD, DROPPED["an image"][0], ROWS["OpenAI tools"][0]])
def test_the_first_row_is_a_row_like_the_others(row: dict[str, Any], tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(lines(row, *[GOOD] * 3, ROWS["trl messages"][0]))
    assert learned(path, tokenizer)[-2:] == [PLAIN, ROWS["trl messages"][1]]


@pytest.mark.parametrize("name", ["d.jsonl.gz", "d.csv", "d.txt"])
def test_packed_and_other_files_are_refused_by_name(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"\x1f\x8b")
    with pytest.raises(RequestError, match=f"{name}: instruction data is read from .jsonl, .json, .parquet files"):
        read_instructions([tmp_path / name])


@pytest.mark.parametrize("data", [b"\x1f\x8b\x08\x00", "{}".encode("utf-16"), "caf\xe9".encode("latin-1")])
def test_bytes_that_are_no_utf_8_are_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_bytes(data)
    with pytest.raises(RequestError, match=r"d.jsonl: not UTF-8 text"):
        read_instructions([tmp_path / "d.jsonl"])


def test_tool_rows_are_what_transformers_makes_of_them(tokenizer: Any, tmp_path: Path) -> None:
    """Templates of transformers take the arguments of a call as an object; OpenAI stores their JSON."""
    path = tmp_path / "d.jsonl"
    path.write_bytes(lines({"messages": [*TOOL_TURNS, ANSWER], "tools": [TOOL]}))
    calls = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}]
    turns = [USER, {"role": "assistant", "content": "", "tool_calls": calls}, {"role": "tool", "content": "3"}, ANSWER]
    assert "".join(learned(path, tokenizer)[0]) == tokenizer.apply_chat_template(turns, tools=[TOOL], tokenize=False)


def test_a_chosen_sample_is_read_back_as_it_was(tmp_path: Path) -> None:
    """A selection is written as messages with their tools, thoughts and calls."""
    first = read_instructions([_written(tmp_path / "d.jsonl", [row for row, _ in ROWS.values()])])
    rows = [{"messages": [*each.turns, each.message], "tools": each.tools, "source": each.source} for each in first.samples]
    again = read_instructions([_written(tmp_path / "e.jsonl", rows)])
    for before, after in zip(first.samples, again.samples, strict=True):
        assert (before.turns, before.message, before.tools) == (after.turns, after.message, after.tools)


def _written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
