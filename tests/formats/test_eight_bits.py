"""formats/eight_bits.py: linears in 8 bits. Oracles: the library's own decompression, and loops over outputs and blocks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoint_damage import edit_tensors
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme

from compresskit.errors import CheckpointError
from compresskit.formats import fixed
from compresskit.formats.eight_bits import grids, stored_linear, tensor_specs
from compresskit.machine.precision import TORCH_NAMES
from compresskit.models.load import open_model
from compresskit.numerics.grid import to_codes
from compresskit.quantization.rtn import RTN
from compresskit.quantization.run import quantize
from compresskit.stages import Options

NAMES = ("fp8", "fp8-block", "int8")
LARGEST = {"e4m3": 448, "int8": 127.5}


def library_scheme(name: str) -> QuantizationScheme:
    """A format as the library reads it from config.json."""
    return QuantizationScheme(**fixed.configuration(fixed.fixed_scheme(name, None), [])["config_groups"]["group_0"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_what_is_stored_is_what_the_library_unpacks(name: str, dtype: torch.dtype) -> None:
    scheme, weight = fixed.fixed_scheme(name, None), torch.randn(200, 256, generator=torch.Generator().manual_seed(0))
    (grid,) = grids([weight], scheme, dtype)
    tensors, unpacked = stored_linear(to_codes(weight, grid, scheme), grid, scheme, dtype)
    planned = tensor_specs("a", (200, 256), scheme, "BF16" if dtype == torch.bfloat16 else "F16")
    found = [(f"a.{leaf}", str(tensor.dtype)[len("torch.") :], tuple(tensor.shape)) for leaf, tensor in tensors.items()]
    assert found == [(spec.name, TORCH_NAMES[spec.dtype], spec.shape) for spec in planned]
    stated = library_scheme(name)
    assert stated.format is not None
    compressor = BaseCompressor.get_value_from_registry(stated.format)
    assert torch.equal(compressor.decompress(dict(tensors), stated)["weight"].float(), unpacked)


@pytest.mark.parametrize("name", NAMES)
def test_scales_span_the_largest_weight_of_their_output_or_block(name: str) -> None:
    scheme, weight = fixed.SCHEMES[name], torch.randn(200, 256, generator=torch.Generator().manual_seed(1))
    (grid,) = grids([weight], scheme, torch.float16)
    size = scheme.group_size or 256
    for row in range(0, 200, 7):
        for group in range(256 // size):
            top = row // scheme.rows * scheme.rows
            block = weight[top : top + scheme.rows, group * size : (group + 1) * size]
            expected = block.abs().max() / LARGEST[scheme.element]
            assert torch.isclose(grid.scale[row, group], expected, rtol=1e-6)


def test_a_scale_that_does_not_fit_is_refused(tiny: dict[str, Path], text_file: Path, tmp_path: Path) -> None:
    options = Options(calibration=str(text_file), sequence_length=32)
    quantize(RTN(format="int8"), str(tiny["llama"]), tmp_path / "out", options)
    name = "model.layers.1.mlp.up_proj.weight_scale"
    edit_tensors(tmp_path / "out", lambda tensors: tensors.update({name: tensors[name][:-1].clone()}))
    with pytest.raises(CheckpointError, match=r"up_proj\.weight_scale is F32 \[95, 1\], expected floats \[96, 1\] or \[1\]"):
        open_model(tmp_path / "out")


@pytest.mark.parametrize("form", [["int-quantized"], {}, None, "float-sparse"], ids=str)
def test_a_format_that_is_no_known_name_is_refused(form: object, tiny: dict[str, Path], text_file: Path, tmp_path: Path) -> None:
    quantize(RTN(format="int8"), str(tiny["llama"]), tmp_path / "out", Options(calibration=str(text_file), sequence_length=32))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["format"] = form
    config["quantization_config"]["format"] = form
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="quantization_config: format"):
        open_model(tmp_path / "out")
