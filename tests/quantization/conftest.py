"""Fixtures of the tests of quantization."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from compresskit.quantization.method import QuantizeMethod
from compresskit.quantization.run import quantize
from compresskit.stages import Options


@pytest.fixture(scope="session")
def make(text_file: Path) -> Callable[[QuantizeMethod, Path, Path], dict[str, object]]:
    def run(method: QuantizeMethod, source: Path, out: Path) -> dict[str, object]:
        return quantize(method, str(source), out, Options(calibration=str(text_file), samples=4, sequence_length=64))

    return run
