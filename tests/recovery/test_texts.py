"""recovery/texts.py: plain texts beside instructions, or instead of them. End to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from recovery_data import options

from compresskit.checkpoint.reader import sha256
from compresskit.errors import RequestError
from compresskit.quantization.rtn import RTN
from compresskit.quantization.run import quantize
from compresskit.recovery.method import SelectionMethod
from compresskit.recovery.run import recover
from compresskit.recovery.selection.paser import Paser
from compresskit.recovery.selection.random import Full, Random
from compresskit.stages import Options

pytest.importorskip("scipy")
pytest.importorskip("peft")

ALONE: dict[str, Any] = {"data": (), "sequence_length": 64, "held_back": 0.25}


@pytest.fixture
def low(tiny: dict[str, Path], tmp_path: Path) -> Path:
    quantize(RTN(bits=2, group_size=16), str(tiny["llama"]), tmp_path / "low", Options(samples=2, sequence_length=64))
    return tmp_path / "low"


def test_texts_alone_are_learned_and_a_share_of_each_kind_is_held_back(
    low: Path, tiny: dict[str, Path], data: Path, text_file: Path, tmp_path: Path
) -> None:
    asked = options(
        tiny["llama"], data, **ALONE, update="grid", self_samples=8, text_samples=12, calibration=str(text_file), epochs=4,
        learning_rate=1e-2,
    )  # fmt: skip
    result = recover(Full(), str(low), tmp_path / "out", asked)
    report = json.loads((tmp_path / "out" / "recover.json").read_text())
    assert (report["selected"], report["self_samples"], report["text_samples"]) == (0, 6, 9)
    assert report["tokens_learned"] == 4 * (6 + 9) * 63
    assert set(report["held_back_before"]["by_file"]) == {"self", "text"}
    assert report["kept"] == "trained" and result["held_back_after"]["loss"] < result["held_back_before"]["loss"]
    assert (tmp_path / "out" / "selection.jsonl").read_text() == ""


def test_the_same_command_gives_the_same_bytes(low: Path, tiny: dict[str, Path], data: Path, tmp_path: Path) -> None:
    asked = options(tiny["llama"], data, **ALONE, update="grid", self_samples=8)
    for name, method in {"one": Full(), "two": Random()}.items():
        recover(method, str(low), tmp_path / name, asked)
    assert len({sha256(tmp_path / name / "model.safetensors") for name in ("one", "two")}) == 1


def test_with_instructions_all_texts_are_trained_on(damaged: Path, tiny: dict[str, Path], data: Path, tmp_path: Path) -> None:
    asked = options(tiny["llama"], data, self_samples=4, held_back=0.25, steps=1)
    result = recover(Random(budget=0.1), str(damaged), tmp_path / "out", asked)
    assert result["self_samples"] == 4
    assert set(result["held_back_before"]["by_file"]) == {data.name}


@pytest.mark.parametrize(
    ("method", "changes", "said"),
    [
        (Full(), {}, "--self-samples or --text-samples"),
        (Full(), {"self_samples": 4, "select_only": True}, "no instruction data"),
        (Full(), {"self_samples": 4, "show": 1}, "no instruction data"),
        (Paser(), {"self_samples": 4}, "no instruction data given for paser to choose from"),
    ],
)
def test_a_method_that_chooses_needs_data(
    method: SelectionMethod, changes: dict[str, Any], said: str, damaged: Path, tiny: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    with pytest.raises(RequestError, match=said):
        recover(method, str(damaged), tmp_path / "out", options(tiny["llama"], data, **ALONE | changes))
    assert not (tmp_path / "out").exists()
