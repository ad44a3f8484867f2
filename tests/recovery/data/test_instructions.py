"""Instruction data: four shapes, three kinds of file, what is dropped, what is refused. Against rows written by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from compresskit.errors import RequestError
from compresskit.recovery.data.duplicates import drop_duplicates
from compresskit.recovery.data.encoding import (
    ALPACA_PROMPT,
    check_same_tokenizer,
    encode,
    encode_samples,
    is_truncated,
    open_tokenizer,
)
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


def test_duplicates_are_found_whatever_their_case_and_near_ones_by_their_shingles() -> None:
    words = [f"word{i}" for i in range(60)]
    text = " ".join(words)
    near = " ".join([*words[:-1], "other"])
    far = " ".join(words[30:] + [f"new{i}" for i in range(30)])
    kept, dropped = drop_duplicates([text, text.upper() + "!", near, far])
    assert kept == [0, 3]
    assert dropped == {"duplicate": 1, "near duplicate": 1}


@pytest.mark.parametrize(("response", "cut"), [("Done.", False), ("```python\nx", True), ("```x```", False), ("first,", True)])
def test_a_response_that_was_cut_off_is_recognised(response: str, cut: bool) -> None:
    assert is_truncated(response) is cut


def test_without_a_chat_template_the_prompt_is_alpacas_and_the_response_ends_with_the_end_of_text(
    tiny: dict[str, Path], tmp_path: Path
) -> None:
    tokenizer = open_tokenizer(tiny["llama"])
    sample = encode(read_instructions([write(tmp_path / "d.jsonl", [ROWS["alpaca"]])]).samples[0], tokenizer)
    assert tokenizer.decode(sample.tokens[: sample.response_start]) == ALPACA_PROMPT.format(asked="Add.\n\n1 and 2")
    assert tokenizer.decode(sample.tokens[sample.response_start :]) == "3</s>"


def test_a_chat_template_decides_what_stands_before_and_after_the_response(tiny: dict[str, Path], tmp_path: Path) -> None:
    tokenizer = open_tokenizer(tiny["llama"])
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}[end]\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    sample = encode(read_instructions([write(tmp_path / "d.jsonl", [ROWS["alpaca"]])]).samples[0], tokenizer)
    assert tokenizer.decode(sample.tokens[: sample.response_start]) == "[user]Add.\n\n1 and 2[end]\n[assistant]"
    assert tokenizer.decode(sample.tokens[sample.response_start :]) == "3[end]"


def test_data_of_which_nothing_is_left_is_refused_with_the_counts(tiny: dict[str, Path], tmp_path: Path) -> None:
    reading = read_instructions([write(tmp_path / "d.jsonl", [ROWS["alpaca"]])])
    with pytest.raises(RequestError, match="1 are longer than 16 tokens"):
        encode_samples(reading, open_tokenizer(tiny["llama"]), 16)


def test_an_original_with_another_tokenizer_is_refused(tiny: dict[str, Path], tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (other / name).write_text((tiny["llama"] / name).read_text().replace("</s>", "<stop>"))
    with pytest.raises(RequestError, match="another tokenizer"):
        check_same_tokenizer(tiny["llama"], other)
