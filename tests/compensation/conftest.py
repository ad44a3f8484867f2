"""Fixtures of the tests of compensation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from compresskit.quantization.rtn import RTN
from compresskit.quantization.run import quantize
from compresskit.stages import Options


@pytest.fixture(scope="session")
def text(text_file: Path) -> dict[str, Any]:
    return {"calibration": str(text_file), "samples": 6, "sequence_length": 64}


@pytest.fixture(scope="session")
def rounded(tiny: dict[str, Path], text: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny llama in 2 bits, rounded to nearest."""
    out = tmp_path_factory.mktemp("rounded") / "out"
    quantize(RTN(bits=2, group_size=16), str(tiny["llama"]), out, Options(**text))
    return out
