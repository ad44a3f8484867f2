"""quantization/for_client.py: `--for` picks what is open, refuses what has no kernel, and says so before any work."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import SMALL, Run

from compresskit.checkpoint.small_files import read_json
from compresskit.errors import RequestError
from compresskit.quantization.nf4 import NF4
from compresskit.quantization.rtn import RTN
from compresskit.stages import Options


def test_symmetry_is_chosen_where_it_is_left_open() -> None:
    assert RTN(bits=8, for_client="vllm-cuda").symmetric is True
    assert RTN(bits=4, for_client="vllm-cuda").symmetric is None
    assert RTN(bits=8, symmetric=False, for_client="vllm-cuda").symmetric is False
    assert RTN(bits=8).symmetric is None


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (RTN(bits=3, for_client="vllm-cpu"), "it runs 4 bits"),
        (RTN(bits=8, symmetric=False, for_client="vllm-cuda"), "8 bits --symmetric"),
        (RTN(bits=2.5, for_client="vllm-cuda"), "has no kernel for"),
        (NF4(for_client="vllm-cpu"), "no kernel for nf4"),
    ],
)
def test_a_form_without_a_kernel_is_refused_before_any_work(
    method: RTN | NF4, words: str, tiny: dict[str, Path], tmp_path: Path
) -> None:
    from compresskit.quantization.run import quantize

    with pytest.raises(RequestError, match=words):
        quantize(method, str(tiny["llama"]), tmp_path / "out", Options())
    assert not (tmp_path / "out").exists()


def test_the_flag_stores_a_form_that_the_client_runs(run: Run, tiny: dict[str, Path], text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    given = ("--calibration", text_file, *SMALL, "--bits", 8, "--for", "vllm-cuda", "--group-size", 32)
    code, _, words = run("quantize", "rtn", tiny["llama"], out, *given)
    assert code == 0, words
    (group,) = read_json(out / "config.json")["quantization_config"]["config_groups"].values()
    assert group["weights"]["symmetric"] is True
    assert read_json(out / "compresskit.json")["settings"]["for_client"] == "vllm-cuda"


def test_an_unknown_client_is_refused(run: Run, tiny: dict[str, Path], tmp_path: Path) -> None:
    code, _, words = run("quantize", "rtn", tiny["llama"], tmp_path / "out", "--for", "ollama")
    assert code == 2
    assert "for-client" in words
