"""pruning/flap.py: its score and its bias by their formulas (oracle), the bias in stored files (end to end)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from feed_forward import HIDDEN, WIDTH, Ffn
from safetensors.torch import load_file
from small_runs import prune
from stock_tools import tokens, walked_logits
from transformers import AutoModelForCausalLM

from compresskit.pruning.flap import FLAP, fluctuation, output_bias


def test_flaps_bias_is_zero_in_blocks_that_keep_every_channel(tiny: dict[str, Path], text_file: Path, tmp_path: Path) -> None:
    result = prune(tiny["llama"], tmp_path / "out", text_file, FLAP(sparsity=0.03, round_to=8))
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    widths = [block[0] for block in result["widths"]]  # type: ignore[attr-defined]
    assert sorted(widths) == [88, 96, 96]
    for index, width in enumerate(widths):
        bias = tensors[f"model.layers.{index}.mlp.down_proj.bias"]
        assert bool(bias.any()) == (width < 96)


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "qwen2"])
def test_flaps_bias_is_stored_where_the_family_has_one(
    family: str, tiny: dict[str, Path], text_file: Path, tmp_path: Path
) -> None:
    result = prune(tiny[family], tmp_path / "out", text_file, FLAP(sparsity=0.3, round_to=4))
    assert result["output_bias"] == (family != "qwen2")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, trust_remote_code=True).eval()
    with torch.no_grad():
        assert (stock(tokens()).logits - walked_logits(tmp_path / "out")).abs().max() < 1e-4


def test_flap_is_the_variance_times_the_squared_column(ffn: Ffn) -> None:
    _, _, down, x = ffn
    expected = [float(x[:, j].var(correction=0)) * float(down[:, j].norm()) ** 2 for j in range(WIDTH)]
    assert fluctuation(x.var(dim=0, correction=0), down).tolist() == pytest.approx(expected, rel=1e-5)


def test_flaps_bias_makes_the_mean_output_exact(ffn: Ffn) -> None:
    _, _, down, x = ffn
    kept = torch.tensor([0, 2, 5])
    new = torch.randn(HIDDEN, 3, generator=torch.Generator().manual_seed(1))
    pruned = x[:, kept] @ new.T + output_bias(x.mean(dim=0), down, kept, new)
    assert torch.allclose(pruned.mean(dim=0), (x @ down.T).mean(dim=0), atol=1e-5)
