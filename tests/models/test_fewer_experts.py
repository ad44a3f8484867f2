"""models/fewer_experts.py: keys, shapes and what is refused, by the numbers of tiny models."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from families import build
from tiny_models import make_model

from compresskit.checkpoint.reader import TensorSpec
from compresskit.errors import UnsupportedArchitecture
from compresskit.models import fewer_experts as fewer
from compresskit.models.load import open_model

pytestmark = pytest.mark.usefixtures("own_structures")


def test_listed_experts_lose_the_last_numbers_and_the_router_rows(tiny: dict[str, Path]) -> None:
    model = open_model(tiny["qwen2_moe"])  # its block 1 has no experts
    assert fewer.blocks_with_experts(model) == [0, 2]
    assert (fewer.experts_count(model), fewer.chosen_count(model), fewer.router_groups(model)) == (4, 2, (1, 1))
    assert fewer.by_expert(model, 3) == {f"model.layers.{index}.mlp.gate.weight": 0 for index in (0, 2)}
    before, after = model.checkpoint.tensors, {spec.name: spec for spec in fewer.remaining_tensors(model, 3)}
    assert {name for name in before if name not in after} == {
        f"model.layers.{index}.mlp.experts.3.{part}_proj.weight" for index in (0, 2) for part in ("gate", "up", "down")
    }
    changed = {name: spec.shape for name, spec in after.items() if spec.shape != before[name].shape}
    assert changed == {f"model.layers.{index}.mlp.gate.weight": (3, 32) for index in (0, 2)}


def test_stacked_experts_router_bias_and_all_else_by_shape(tmp_path: Path) -> None:
    model = open_model(build("gpt_oss", tmp_path / "source"))
    before = model.checkpoint.tensors
    after = {spec.name: spec.shape for spec in fewer.remaining_tensors(model, 2)}
    expected = {
        name: (2, *spec.shape[1:]) if ".experts." in name or ".router." in name else spec.shape for name, spec in before.items()
    }
    assert after == expected


@pytest.mark.slow
def test_a_correction_of_the_scores_is_cut_along_its_own_axis(tmp_path: Path) -> None:
    model = open_model(build("ernie4_5_moe", tmp_path / "source"))
    axes = fewer.by_expert(model, 3)
    assert axes["model.layers.1.mlp.gate.moe_statics.e_score_correction_bias"] == 1
    assert fewer.configuration(model, 3)["moe_num_experts"] == 3


def test_the_key_that_the_file_has_is_changed(tiny: dict[str, Path]) -> None:
    """Qwen3's class calls it num_local_experts and takes num_experts, too."""
    model = open_model(tiny["qwen3_moe"])
    for key in ("num_experts", "num_local_experts"):
        config = {name: value for name, value in model.checkpoint.config.items() if name not in fewer.COUNTS} | {key: 4}
        named = replace(model, checkpoint=replace(model.checkpoint, config=config))
        assert fewer.configuration(named, 3) == config | {key: 3}


def test_a_model_without_experts_and_stray_experts_are_refused(tiny: dict[str, Path]) -> None:
    with pytest.raises(UnsupportedArchitecture, match="llama has no experts that can be removed"):
        fewer.experts_count(open_model(tiny["llama"]))
    model = open_model(tiny["mixtral"])
    stray = "model.layers.3.block_sparse_moe.experts.0.w1.weight"
    tensors = model.checkpoint.tensors | {stray: TensorSpec(stray, "F32", (4, 4))}
    with pytest.raises(UnsupportedArchitecture, match=f"{stray} is of an expert of none of the 3 blocks"):
        fewer.check_all_known(replace(model, checkpoint=replace(model.checkpoint, tensors=tensors)))


def test_a_number_that_two_tensors_share_by_chance_is_no_experts_axis(tmp_path: Path) -> None:
    """As many experts as hidden channels: the router is square, and only its rows go."""
    model = open_model(make_model(tmp_path / "square", "qwen3_moe", num_experts=32, moe_intermediate_size=8))
    specs = {spec.name: spec.shape for spec in fewer.remaining_tensors(model, 5)}
    assert specs["model.layers.0.mlp.gate.weight"] == (5, 32)
    assert json.dumps(fewer.configuration(model, 5)).count(": 5") == 1
