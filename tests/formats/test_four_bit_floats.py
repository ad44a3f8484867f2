"""formats/four_bit_floats.py: linears in floats of 4 bits. Oracles: the library's own unpacking, and all scales tried."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoint_damage import edit_tensors
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme

from compresskit.errors import CheckpointError
from compresskit.formats import fixed
from compresskit.formats.four_bit_floats import grids, stored_linear, tensor_specs
from compresskit.machine.precision import TORCH_NAMES
from compresskit.models.load import open_model
from compresskit.numerics.grid import Grid, from_codes, to_codes
from compresskit.quantization.rtn import RTN
from compresskit.quantization.run import quantize
from compresskit.stages import Options

NAMES = ("nvfp4", "mxfp4")
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def weights(seed: int = 0) -> list[torch.Tensor]:
    """Two linears with a shared input, one ten times as large, with a group of zeros."""
    generator = torch.Generator().manual_seed(seed)
    found = [torch.randn(24, 64, generator=generator), torch.randn(8, 64, generator=generator) * 10]
    found[0][3, 32:] = 0
    return found


@pytest.mark.parametrize("name", NAMES)
def test_what_is_stored_is_what_the_library_unpacks(name: str) -> None:
    scheme = fixed.fixed_scheme(name, None)
    stated = QuantizationScheme(**fixed.configuration(scheme, [])["config_groups"]["group_0"])
    assert stated.format is not None
    compressor = BaseCompressor.get_value_from_registry(stated.format)
    both = weights()
    for weight, grid in zip(both, grids(both, scheme, torch.float16), strict=True):
        tensors, unpacked = stored_linear(to_codes(weight, grid, scheme), grid, scheme, torch.float16)
        planned = tensor_specs("a", (len(weight), 64), scheme, "F16")
        found = [(f"a.{leaf}", str(tensor.dtype)[len("torch.") :], tuple(tensor.shape)) for leaf, tensor in tensors.items()]
        assert found == [(spec.name, TORCH_NAMES[spec.dtype], spec.shape) for spec in planned]
        assert torch.equal(compressor.decompress(dict(tensors), stated)["weight"].float(), unpacked)
        assert float((unpacked - weight).abs().max()) <= float(weight.abs().max()) / 6 * 1.05


def test_linears_with_a_shared_input_share_the_divisor_and_every_scale_fits_e4m3() -> None:
    first, second = grids(weights(), fixed.SCHEMES["nvfp4"], torch.float16)
    assert first.divisor is not None and second.divisor is not None
    assert torch.equal(first.divisor, second.divisor)
    for grid in (first, second):
        stored = grid.scale * first.divisor
        assert torch.allclose(stored.to(torch.float8_e4m3fn).float(), stored, rtol=1e-6) and float(stored.max()) <= 448


@pytest.mark.parametrize("name", NAMES)
def test_no_scale_next_to_the_rule_s_gives_a_smaller_error(name: str) -> None:
    """The rules: OCP Microscaling Formats v1.0, section 6.3, or one exponent more; arXiv 2512.02010, 6 or 4."""
    scheme, (weight, _) = fixed.SCHEMES[name], weights(2)
    grid = grids([weight], scheme, torch.float16)[0]
    parts = weight.reshape(24, -1, scheme.group_size)
    largest = parts.abs().amax(dim=-1)
    if name == "mxfp4":
        tried = [2.0 ** (largest.log2().floor() - 2), 2.0 ** (largest.log2().floor() - 1)]
    else:
        assert grid.divisor is not None
        tried = [(largest / top * grid.divisor).to(torch.float8_e4m3fn).float() / grid.divisor for top in (6, 4)]
    zeros = largest == 0
    distances = [(parts[..., None].abs() / s[..., None, None] - E2M1).abs().amin(dim=-1) * s[..., None] for s in tried]
    errors = torch.stack([distance.square().sum(dim=-1) for distance in distances])
    found = from_codes(to_codes(weight, grid, scheme), grid, scheme)
    error = (found - weight).square().reshape(parts.shape).sum(dim=-1)
    assert torch.allclose(error[~zeros], errors.amin(dim=0)[~zeros], rtol=1e-4)
    assert float(found.reshape(parts.shape)[zeros].abs().max()) == 0


def test_a_weight_on_the_grid_is_stored_exactly() -> None:
    scheme = fixed.SCHEMES["mxfp4"]
    codes = E2M1[torch.randint(0, 8, (4, 64), generator=torch.Generator().manual_seed(3))]
    codes[:, ::32] = 6.0
    grid = Grid(torch.full((4, 2), 2.0**-5), torch.zeros(4, 2))
    weight = from_codes(codes, grid, scheme)
    found = grids([weight], scheme, torch.float16)[0]
    assert torch.equal(from_codes(to_codes(weight, found, scheme), found, scheme), weight)


@pytest.mark.parametrize("name", NAMES)
def test_a_scale_that_does_not_fit_is_refused(name: str, tiny: dict[str, Path], text_file: Path, tmp_path: Path) -> None:
    options = Options(calibration=str(text_file), sequence_length=32)
    quantize(RTN(format=name), str(tiny["llama"]), tmp_path / "out", options)  # type: ignore[arg-type]
    scale = "model.layers.1.mlp.up_proj.weight_scale"
    edit_tensors(tmp_path / "out", lambda tensors: tensors.update({scale: tensors[scale][:-1].clone()}))
    with pytest.raises(CheckpointError, match=r"up_proj\.weight_scale is \w+ \[95, \d\], expected \w+ \[96, \d\]"):
        open_model(tmp_path / "out")
