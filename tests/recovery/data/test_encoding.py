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
    sample = encode(reading.samples, tokenizer)[0]
    assert tokenizer.decode(sample.tokens[: sample.response_start]) == ALPACA_PROMPT.format(asked="Add.\n\n1 and 2")
    assert tokenizer.decode(sample.tokens[sample.response_start :]) == "3</s>"


def test_a_chat_template_decides_what_stands_before_and_after_the_response(tiny: dict[str, Path], reading: Reading) -> None:
    tokenizer = open_tokenizer(tiny["llama"])
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}[end]\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    sample = encode(reading.samples, tokenizer)[0]
    assert tokenizer.decode(sample.tokens[: sample.response_start]) == "[user]Add.\n\n1 and 2[end]\n[assistant]"
    assert tokenizer.decode(sample.tokens[sample.response_start :]) == "3[end]"


def test_data_of_which_nothing_is_left_is_refused_with_the_counts(tiny: dict[str, Path], reading: Reading) -> None:
    with pytest.raises(RequestError, match="1 are longer than 16 tokens"):
        encode_samples(reading, open_tokenizer(tiny["llama"]), 16)


def test_an_original_with_another_tokenizer_is_refused(tiny: dict[str, Path], tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (other / name).write_text((tiny["llama"] / name).read_text().replace("</s>", "<stop>"))
    with pytest.raises(RequestError, match="another tokenizer"):
        check_same_tokenizer(tiny["llama"], other)
