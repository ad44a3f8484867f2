"""recovery/data/instructions.py: four shapes in three kinds of file, what is dropped, what is refused. Against rows by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from compresskit.errors import RequestError
from compresskit.recovery.data.instructions import read_instructions

ROWS: dict[str, dict[str, Any]] = {
    "alpaca": {"instruction": "Add.", "input": "1 and 2", "output": "3"},
    "dolly": {"instruction": "Add.", "context": "1 and 2", "response": "3", "category": "maths"},
    "messages": {"messages": [{"role": "user", "content": "Add.\n\n1 and 2"}, {"role": "assistant", "content": "3"}]},
    "prompt-response": {"prompt": "Add.\n\n1 and 2", "completion": "3"},
}
SHAREGPT = {"conversations": [{"from": "human", "value": "Add.\n\n1 and 2"}, {"from": "gpt", "value": "3"}]}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize("shape", ROWS)
def test_every_shape_in_every_kind_of_file_reads_as_the_same_sample(shape: str, suffix: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"data{suffix}", [ROWS[shape]])
    reading = read_instructions([path])
    assert reading.shapes == {path.name: shape}
    assert reading.samples[0].turns == [{"role": "user", "content": "Add.\n\n1 and 2"}]
    assert reading.samples[0].response == "3"


def test_sharegpt_is_a_conversation_whose_last_answer_is_the_response(tmp_path: Path) -> None:
    more = [{"from": "human", "value": "And 4?"}, {"from": "gpt", "value": "7"}]
    sample = read_instructions([write(tmp_path / "d.jsonl", [{"conversations": SHAREGPT["conversations"] + more}])]).samples[0]
    assert [turn["role"] for turn in sample.turns] == ["user", "assistant", "user"]
    assert sample.response == "7"


def test_empty_samples_are_dropped_and_counted(tmp_path: Path) -> None:
    rows = [ROWS["alpaca"], {**ROWS["alpaca"], "output": "  "}, {"instruction": "", "input": "", "output": "3"}]
    reading = read_instructions([write(tmp_path / "d.jsonl", rows)])
    assert len(reading.samples) == 1
    assert reading.dropped == {"empty": 2}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"instruction": "a"}', "no response field"),
        ('{"output": "a"}', "no instruction or prompt field"),
        ('{"instruction": "a", "output": "b"}\nnot json', "line 2 is not JSON"),
        ("[1, 2]", "expected JSON objects"),
        ("", "holds no rows"),
    ],
)
def test_unusable_files_are_refused_by_name(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(text)
    with pytest.raises(RequestError, match=said) as caught:
        read_instructions([path])
    assert str(path) in str(caught.value)
