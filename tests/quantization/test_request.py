"""quantization/request.py: what cannot be stored is refused before any work. End to end."""

from __future__ import annotations

from pathlib import Path

import pytest

from compresskit.errors import RequestError, UnsupportedArchitecture
from compresskit.quantization.gptq import GPTQ
from compresskit.quantization.method import QuantizeMethod
from compresskit.quantization.rtn import RTN
from compresskit.quantization.run import quantize
from compresskit.stages import Options


def test_what_cannot_be_stored_is_refused_before_any_work(tiny: dict[str, Path], text_file: Path, tmp_path: Path) -> None:
    options = Options(calibration=str(text_file), samples=4, sequence_length=64)
    out = tmp_path / "out"
    cases: list[tuple[QuantizeMethod, str, type[Exception], str]] = [
        (RTN(bits=3.5, symmetric=False), "llama", RequestError, "--bits 3.5"),
        (RTN(bits=3, group_size=64), "llama", RequestError, "group-size 64: model.layers.0.self_attn.q_proj has 32"),
        (RTN(bits=3, ignore=("layers",)), "llama", RequestError, "leaves nothing"),
        (GPTQ(bits=3), "gpt2", UnsupportedArchitecture, "nf4"),
        (GPTQ(bits=2.5), "mixtral", UnsupportedArchitecture, "whole --bits"),
        (GPTQ(bits=3, symmetric=False), "mixtral", UnsupportedArchitecture, "--symmetric"),
        (
            RTN(bits=4, ignore=("experts",)),
            "mixtral",
            UnsupportedArchitecture,
            "leaves model.layers.0.mlp.experts.0.gate_proj dense",
        ),
        (GPTQ(bits=4, ignore=("down_proj",)), "qwen3_moe", UnsupportedArchitecture, "ignore others"),
    ]
    for method, family, kind, said in cases:
        with pytest.raises(kind, match=said.replace(".", r"\.")):
            quantize(method, str(tiny[family]), out, options)
    quantize(RTN(bits=4), str(tiny["llama"]), out, options)
    with pytest.raises(RequestError, match="quantized already"):
        quantize(RTN(bits=4), str(out), tmp_path / "again", options)
    assert not (tmp_path / "again").exists()
