"""models/tokenizer.py: a tokenizer opens without the code in its folder, and a fault is one line. Property test."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from compresskit.errors import CheckpointError
from compresskit.models.tokenizer import open_tokenizer

RAISES = "raise SystemExit('foreign code ran')\n"


def with_keys(path: Path, **keys: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def test_it_is_the_tokenizer_that_transformers_opens(model: Path) -> None:
    assert open_tokenizer(model)("a dog").input_ids == AutoTokenizer.from_pretrained(model)("a dog").input_ids


@pytest.mark.parametrize("trust_remote_code", [False, True])
def test_the_code_of_a_ragged_checkpoint_is_not_run(trust_remote_code: bool, model: Path) -> None:
    expected = open_tokenizer(model)("a dog").input_ids
    (model / "configuration_compresskit.py").write_text(RAISES)
    with_keys(model / "config.json", model_type="compresskit_llama", auto_map={"AutoConfig": "configuration_compresskit.C"})
    assert open_tokenizer(model, trust_remote_code)("a dog").input_ids == expected


def test_a_tokenizer_s_own_code_takes_the_flag(model: Path) -> None:
    (model / "own.py").write_text(RAISES)
    with_keys(model / "tokenizer_config.json", tokenizer_class="Own", auto_map={"AutoTokenizer": ["own.Own", None]})
    try:
        open_tokenizer(model)
    except CheckpointError as error:
        assert "\n" not in str(error)
    with pytest.raises(SystemExit, match="foreign code ran"):
        open_tokenizer(model, True)


def test_a_folder_without_a_tokenizer_is_named_in_one_line(model: Path) -> None:
    (model / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError) as caught:
        open_tokenizer(model)
    assert str(caught.value).startswith(f"{model}: no usable tokenizer (")
    assert "\n" not in str(caught.value)
