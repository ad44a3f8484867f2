"""recovery/request.py: what cannot be asked for is refused before any work. End to end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from recovery_data import options

from compresskit.errors import RequestError
from compresskit.quantization.rtn import RTN
from compresskit.quantization.run import quantize
from compresskit.recovery.run import recover
from compresskit.recovery.selection.random import Random
from compresskit.stages import Options

pytest.importorskip("scipy")


def test_a_full_update_of_low_bit_weights_is_refused(tiny: dict[str, Path], data: Path, text_file: Path, tmp_path: Path) -> None:
    text = Options(calibration=str(text_file), samples=2, sequence_length=64)
    quantize(RTN(bits=4, group_size=16), str(tiny["llama"]), tmp_path / "low", text)
    with pytest.raises(RequestError, match="--update low-rank"):
        recover(Random(), str(tmp_path / "low"), tmp_path / "out", options(tiny["llama"], data, update="full"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": ()}, "--data"),
        ({"data": ("/nowhere.jsonl",)}, "no such file"),
        ({"sequence_length": 16}, "longer than 16 tokens"),
        ({"sequence_length": 4096}, "--sequence-length"),
        ({"data_weight": 0.5, "loss": "response"}, "--loss distill"),
    ],
)
def test_unusable_requests_are_refused_before_any_work(
    changes: dict[str, Any], said: str, tiny: dict[str, Path], damaged: Path, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(RequestError, match=said):
        recover(Random(), str(damaged), tmp_path / "out", options(tiny["llama"], data, **changes))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("budget", ["0", "1.5"])
def test_a_budget_outside_0_to_1_is_wrong_usage(budget: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from compresskit.cli.main import main

    with pytest.raises(SystemExit) as caught:
        main(["recover", "paser", "a", str(tmp_path / "b"), "--original", "c", "--data", "d.jsonl", "--budget", budget])
    assert caught.value.code == 2
    assert f"--budget {budget}" in capsys.readouterr().err
