"""calibration/windows.py: cutting and drawing windows, mixes, determinism, refusals. Oracle and property tests."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import make_model
from tokenizers import Tokenizer

from compresskit.calibration import Calibration, calibrate
from compresskit.calibration.sources import TextRequest
from compresskit.calibration.windows import draw
from compresskit.errors import CalibrationError, CheckpointError
from compresskit.machine.device import Where
from compresskit.models.load import open_model

CPU = torch.device("cpu")


def run(spec: str, folder: Path, samples: int = 6, length: int = 32, seed: int = 0) -> Calibration:
    return calibrate(TextRequest(spec, samples, length, seed), open_model(folder), Where(CPU, torch.float32))


@given(st.integers(1, 200), st.integers(1, 20), st.integers(1, 10), st.integers(0, 3))
def test_windows_are_distinct_consecutive_cuts(count: int, length: int, samples: int, seed: int) -> None:
    ids = torch.arange(count)
    cuts = [tuple(range(start, start + length)) for start in range(0, count - length + 1, length)]
    if len(cuts) < samples:
        with pytest.raises(CalibrationError, match=f"make {len(cuts)} windows of {length}"):
            draw(ids, samples, length, seed, "text")
        return
    found = [tuple(row) for row in draw(ids, samples, length, seed, "text").tolist()]
    assert len(set(found)) == samples
    assert set(found) <= set(cuts)


def test_the_seed_decides_which_windows_and_in_which_order(tiny: dict[str, Path], text_file: Path) -> None:
    first, again, other = (run(str(text_file), tiny["llama"], seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.tokens, again.tokens)
    assert first.digest == again.digest != other.digest
    assert first.tokens.shape == (6, 32)
    assert first.tokens.dtype == torch.int64


def test_windows_are_the_files_own_text(tiny: dict[str, Path], text_file: Path) -> None:
    tokenizer = Tokenizer.from_file(str(tiny["llama"] / "tokenizer.json"))
    text = text_file.read_text()
    for window in run(str(text_file), tiny["llama"]).tokens.tolist():
        place = text.index(tokenizer.decode(window))
        assert place % 32 == 0


def test_a_file_of_other_format_gives_the_same_tokens(tiny: dict[str, Path], text_file: Path, tmp_path: Path) -> None:
    lines = tmp_path / "a.jsonl"
    lines.write_text(json.dumps({"body": text_file.read_text()}))
    assert run(f"{lines}#body", tiny["llama"]).digest == run(str(text_file), tiny["llama"]).digest


def test_a_mix_is_its_parts_in_order(tiny: dict[str, Path], text_file: Path) -> None:
    mixed = run(f"builtin+{text_file}+self", tiny["llama"], samples=7)
    parts = [run("builtin", tiny["llama"], 3), run(str(text_file), tiny["llama"], 2), run("self", tiny["llama"], 2)]
    assert torch.equal(mixed.tokens, torch.cat([part.tokens for part in parts]))
    for word in ("3 windows of documentation", f"2 windows of {text_file.name}", "2 windows of text sampled"):
        assert word in mixed.description


def test_too_little_text_says_which_number_of_samples_fits(tiny: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    # Two bytes a character of UTF-8 are two tokens, so the bytes alone do not give it away: windows do not divide evenly.
    file.write_text("x" * 100)
    with pytest.raises(CalibrationError, match="make 2 windows of 33, 3 are needed; --samples 2 or fewer"):
        run(str(file), merging(tiny["llama"], tmp_path), 3, 33)


def merging(source: Path, tmp_path: Path) -> Path:
    """The model with a tokenizer that writes 'xxxx...' in few tokens, but never under 66 for 100 characters."""
    folder = tmp_path / "merging"
    shutil.copytree(source, folder)
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"]["xx"] = content["model"]["vocab"].pop("Ń")
    content["model"]["merges"] = [["x", "x"]]
    content["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [{"type": "FixedLength", "length": 3}, content["pre_tokenizer"]],
    }
    file.write_text(json.dumps(content))
    return folder


def test_a_sequence_beyond_the_models_context_is_refused(tiny: dict[str, Path], text_file: Path) -> None:
    with pytest.raises(CalibrationError, match="at most 256 tokens"):
        run(str(text_file), tiny["llama"], 2, 257)


def test_a_tokenizer_of_another_model_is_refused(text_file: Path, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "small", "llama")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["e"] = 300
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="gives token 300, the model knows 259"):
        run(str(text_file), folder)
