"""pruning/request.py: what stock tools would read as something else is refused before any work. Oracle: stock's own reading."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoint_damage import edit_tensors
from families import build
from family_stages import stock, write_tokenizer
from safetensors.torch import load_file
from small_runs import prune

from compresskit.errors import UnsupportedArchitecture
from compresskit.pruning.magnitude import Magnitude

EXPERTS = "model.language_model.layers.1.mlp.experts.gate_up_proj"


@pytest.mark.parametrize("transposed", [True, False])
def test_matrices_are_not_made_square_where_stock_tells_by_their_shape_that_they_are_transposed(
    transposed: bool, text_file: Path, tmp_path: Path
) -> None:
    """Qwen3-VL's experts are published as (in, out), written as (out, in), and read either way."""
    source, out = build("qwen3_vl_moe", tmp_path / "source"), tmp_path / "out"
    write_tokenizer(source)
    expected = stock("qwen3_vl_moe", source)

    def turn(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("experts.gate_up_proj")]:
            tensors[name] = tensors[name].transpose(1, 2).contiguous()

    if transposed:
        edit_tensors(source, turn)
    assert torch.equal(stock("qwen3_vl_moe", source), expected)
    half = Magnitude(sparsity=0.5, refit=False, round_to=8)
    if transposed:
        with pytest.raises(UnsupportedArchitecture, match=rf"at width 32 the matrices of {EXPERTS} are square.*--sparsity"):
            prune(source, out, text_file, half)
        assert not out.exists()
        prune(source, out, text_file, Magnitude(sparsity=0.25, refit=False, round_to=8))
        assert load_file(out / "model.safetensors")[EXPERTS].shape == (4, 64, 96)
        return
    prune(source, out, text_file, half)
    assert load_file(out / "model.safetensors")[EXPERTS].shape == (4, 64, 64)
