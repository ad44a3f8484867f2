"""models/pair.py: the original's weights, cut to what was kept, are the unrefitted pruned weights. Oracle."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from compresskit.errors import RequestError
from compresskit.models.load import open_model
from compresskit.models.meta import read_plain
from compresskit.models.pair import pair, same_weights
from compresskit.pruning.cfsp import CFSP
from compresskit.pruning.run import prune
from compresskit.quantization.rtn import RTN
from compresskit.quantization.run import quantize
from compresskit.stages import Options

pytestmark = pytest.mark.usefixtures("own_structures")


@pytest.mark.parametrize("family", ["llama", "phi3", "opt", "gpt2", "mixtral"])
@pytest.mark.parametrize("layout", ["ragged", "padded"])
def test_the_original_cut_to_the_kept_channels_is_the_pruned_model(
    family: str, layout: str, tiny: dict[str, Path], text_file: Path, tmp_path: Path
) -> None:
    if family == "mixtral" and layout == "ragged":
        pytest.skip("mixtures of experts cannot be ragged")
    options = Options(calibration=str(text_file), samples=4, sequence_length=64)
    method = CFSP(sparsity=0.3, layout=layout, refit=False, round_to=16)  # type: ignore[arg-type]
    prune(method, str(tiny[family]), tmp_path / "out", options)
    found = pair(open_model(tmp_path / "out"), open_model(tiny[family]))
    for name in found.compressed.linears:
        stored = read_plain(found.compressed, f"{name}.weight").float()
        assert torch.equal(found.original_weight(name), stored), name
        column = read_plain(found.original, f"{name}.weight").float()[:, 0]
        if not found.lost_inputs(name):
            assert torch.equal(found.cut_outputs(name, column), stored[:, 0]), name
    (tmp_path / "out" / "compresskit.json").unlink()
    if found.compressed.linear_shape(found.compressed.linears[-1]) == found.original.linear_shape(found.original.linears[-1]):
        return  # padded to the original's width: without a manifest nothing tells that channels are missing
    with pytest.raises(RequestError, match="records 0 prunings"):
        pair(open_model(tmp_path / "out"), open_model(tiny[family]))


def test_weights_are_the_same_only_where_every_bit_is(tiny: dict[str, Path], text_file: Path, tmp_path: Path) -> None:
    options = Options(calibration=str(text_file), samples=4, sequence_length=64)
    prune(CFSP(sparsity=0), str(tiny["llama"]), tmp_path / "same", options)
    prune(CFSP(sparsity=0.3), str(tiny["llama"]), tmp_path / "other", options)
    original = open_model(tiny["llama"])
    assert same_weights(pair(open_model(tmp_path / "same"), original))
    assert not same_weights(pair(open_model(tmp_path / "other"), original))


def test_experts_in_one_tensor_pair_with_those_that_a_later_step_stored_one_by_one(
    tiny: dict[str, Path], text_file: Path, tmp_path: Path
) -> None:
    """Blocks with several kinds of networks: the manifest counts them in one order, however they are stored."""
    options = Options(calibration=str(text_file), samples=4, sequence_length=64)
    packed = tmp_path / "packed"
    shutil.copytree(tiny["qwen2_moe"], packed)
    AutoModelForCausalLM.from_pretrained(tiny["qwen2_moe"]).save_pretrained(packed, save_original_format=False)
    prune(CFSP(sparsity=0.25, allocation="uniform", refit=False, round_to=8), str(packed), tmp_path / "pruned", options)
    quantize(RTN(bits=8), str(tmp_path / "pruned"), tmp_path / "low", options)
    found = pair(open_model(tmp_path / "low"), open_model(packed))
    assert any(".experts." in name for name in found.compressed.linears)
    for name in found.compressed.linears:
        codes, original = read_plain(found.compressed, f"{name}.weight").float(), found.original_weight(name)
        assert (codes - original).abs().max() <= original.abs().max() / 100, name
