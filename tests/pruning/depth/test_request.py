"""pruning/depth/request.py: what cannot be done is refused with the remedy, before any weight is read; what a plan says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from checkpoint_damage import edit_config
from hypothesis import given
from hypothesis import strategies as st
from small_runs import options
from tiny_models import BLOCKS, make_model

from compresskit.errors import CompresskitError
from compresskit.models.load import open_model
from compresskit.pruning.depth.method import Depth
from compresskit.pruning.depth.request import DepthRequest, greedy_passes, open_request


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"blocks": BLOCKS}, f"--blocks {BLOCKS}: the model has {BLOCKS} blocks, of which one at least has to stay"),
        ({"sparsity": 0.99}, "--sparsity 0.99: the model has 3 blocks"),
        ({"sparsity": 0.1}, "--sparsity 0.1: is less than half of one of 3 blocks; pass --blocks 1"),
    ],
)
def test_no_block_or_every_block_is_refused(
    settings: dict[str, Any], said: str, model: Path, text_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(CompresskitError, match=said):
        open_request(Depth(**settings), str(model), tmp_path / "out", options(text_file))


def test_a_quantized_source_is_refused(model: Path, text_file: Path, tmp_path: Path) -> None:
    groups = {
        "group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "channel"}}
    }
    edit_config(
        model, quantization_config={"quant_method": "compressed-tensors", "config_groups": groups, "format": "pack-quantized"}
    )
    with pytest.raises(CompresskitError, match="is quantized already; prune the dense checkpoint"):
        open_request(Depth(blocks=1), str(model), tmp_path / "out", options(text_file))


def test_one_block_of_each_kind_stays(text_file: Path, tmp_path: Path) -> None:
    """Of two sliding blocks around a full one only one may go."""
    source = make_model(tmp_path / "source", "gemma3_text")
    request = open_request(Depth(blocks=1), str(source), tmp_path / "out", options(text_file))
    assert [index for index in range(BLOCKS) if request.allows([index])] == [0, 2]
    with pytest.raises(CompresskitError, match="of its 3 blocks at most 1 can go, because one of each kind has to stay"):
        open_request(Depth(blocks=2), str(source), tmp_path / "out", options(text_file))


@given(st.integers(2, 12), st.data())
def test_the_passes_of_a_greedy_choice_are_those_of_its_loops(blocks: int, data: st.DataObject) -> None:
    """By the loops themselves: the model's own stream, and each candidate's from its block on."""
    removed = data.draw(st.integers(1, blocks - 1))
    runs = 0
    for left in range(blocks, blocks - removed, -1):
        for streams in range(left):
            runs += 1 + streams
    assert greedy_passes(blocks, removed, 0, 0.0) == pytest.approx(runs / blocks)


@pytest.mark.parametrize("choose", ["angle", "run", "loss"])
def test_the_planned_model_is_the_one_that_comes_out(choose: Any, tiny: dict[str, Path], text_file: Path, tmp_path: Path) -> None:
    request = DepthRequest(Depth(blocks=2, choose=choose), open_model(tiny["llama"]), tmp_path / "out", options(text_file))
    request.check()
    planned = request.result_model()
    assert planned.block_count == BLOCKS - 2
    assert planned.parameters == request.model.parameters - 2 * sum(
        spec.elements for name, spec in request.model.checkpoint.tensors.items() if name.startswith("model.layers.0.")
    )
    assert request.passes() > 0 and request.peak_bytes() > 0
