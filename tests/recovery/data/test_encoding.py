"""recovery/data/encoding.py: what stands before and after a response, what is refused. Oracle: the tokenizer's decoding."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from compresskit.errors import RequestError
from compresskit.models.tokenizer import open_tokenizer
from compresskit.recovery.data.encoding import (
    ALPACA_PROMPT,
    check_same_tokenizer,
    encode,
    encode_samples,
    is_truncated,
)
from compresskit.recovery.data.instructions import Reading, read_instructions


@pytest.fixture
def reading(tmp_path: Path) -> Reading:
    """One sample, read from a file."""
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"instruction": "Add.", "input": "1 and 2", "output": "3"}) + "\n")
    return read_instructions([path])


@pytest.mark.parametrize(("response", "cut"), [("Done.", False), ("```python\nx", True), ("```x```", False), ("first,", True)])
def test_a_response_that_was_cut_off_is_recognised(response: str, cut: bool) -> None:
    assert is_truncated(response) is cut


def test_without_a_chat_template_the_prompt_is_alpacas_and_the_response_ends_with_the_end_of_text(
    tiny: dict[str, Path], reading: Reading
) -> None:
    tokenizer = open_tokenizer(tiny["llama"])
    sample = encode(reading.samples, tokenizer, reading)[0]
    assert tokenizer.decode(sample.tokens[: sample.response_start]) == ALPACA_PROMPT.format(asked="Add.\n\n1 and 2")
    assert tokenizer.decode(sample.tokens[sample.response_start :]) == "3</s>"


def test_a_chat_template_decides_what_stands_before_and_after_the_response(tiny: dict[str, Path], reading: Reading) -> None:
    tokenizer = open_tokenizer(tiny["llama"])
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}[end]\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    sample = encode(reading.samples, tokenizer, reading)[0]
    assert tokenizer.decode(sample.tokens[: sample.response_start]) == "[user]Add.\n\n1 and 2[end]\n[assistant]"
    assert tokenizer.decode(sample.tokens[sample.response_start :]) == "3[end]"


def test_data_of_which_nothing_is_left_is_refused_with_the_counts(tiny: dict[str, Path], reading: Reading) -> None:
    with pytest.raises(RequestError, match="1 are longer than 16 tokens"):
        encode_samples(reading, open_tokenizer(tiny["llama"]), 16)


ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}"
    "{% endif %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def test_a_row_that_the_template_does_not_take_is_dropped_and_named(tiny: dict[str, Path], tmp_path: Path) -> None:
    tokenizer = open_tokenizer(tiny["llama"])
    tokenizer.chat_template = ALTERNATING
    good, user = {"instruction": "Add.", "output": "3"}, {"role": "user", "content": "Add."}
    bad = {"messages": [user, user, {"role": "assistant", "content": "3"}]}
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (good, bad, bad, good)))
    reading = read_instructions([path])
    assert [sample.instruction.row for sample in encode_samples(reading, tokenizer, 256)] == [0, 3]
    assert reading.dropped["not taken by the chat template"] == 2
    assert reading.complaints() == ["2 rows left out: not taken by the chat template (first d.jsonl row 1: roles must alternate)"]


@pytest.mark.parametrize("template", ["{% if %}", "{{ raise_exception('no') }}"])
def test_a_template_that_takes_no_row_is_refused_with_the_reason(template: str, tiny: dict[str, Path], reading: Reading) -> None:
    tokenizer = open_tokenizer(tiny["llama"])
    tokenizer.chat_template = template
    with pytest.raises(RequestError, match=r"none is left; 1 row left out: .* \(first d.jsonl row 0: .*; mend .* chat_template"):
        encode_samples(reading, tokenizer, 256)


def test_without_a_template_tool_calls_are_dropped(tiny: dict[str, Path], tmp_path: Path) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {}}}]}
    path = tmp_path / "d.jsonl"
    rows = [{"instruction": "Add.", "output": "3"}, {"messages": [{"role": "user", "content": "Add."}, call]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    reading = read_instructions([path])
    assert [sample.instruction.row for sample in encode_samples(reading, open_tokenizer(tiny["llama"]), 256)] == [0]
    assert "there is none, and tools are called" in reading.complaints()[0]


def test_an_original_with_another_tokenizer_is_refused(tiny: dict[str, Path], tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (other / name).write_text((tiny["llama"] / name).read_text().replace("</s>", "<stop>"))
    with pytest.raises(RequestError, match="another tokenizer"):
        check_same_tokenizer(tiny["llama"], other)
