"""models/fewer_blocks.py and models/same_blocks.py: configurations cut by hand (oracle), blocks that are made by their number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_models import make_model

from compresskit.checkpoint.reader import Checkpoint, TensorSpec
from compresskit.errors import UnsupportedArchitecture
from compresskit.models.architectures import ARCHITECTURES
from compresskit.models.fewer_blocks import _changed, renumbered
from compresskit.models.load import open_model
from compresskit.models.model import Model
from compresskit.models.same_blocks import check_same_blocks


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"num_hidden_layers": 4, "hidden_size": 4}, {"num_hidden_layers": 2}),
        ({"n_layer": 4, "eos_token_id": [1, 2, 3, 4], "architectures": list("abcd")}, {"n_layer": 2}),
        ({"layer_types": list("abcd"), "no_rope_layers": [1, 1, 1, 0]}, {"layer_types": ["b", "d"], "no_rope_layers": [1, 0]}),
        ({"mlp_only_layers": [0, 3], "moe_layers": [1, 2]}, {"mlp_only_layers": [1], "moe_layers": [0]}),
        ({"first_k_dense_replace": 3, "num_dense_layers": 1, "max_window_layers": 28},
         {"first_k_dense_replace": 1, "num_dense_layers": 0}),
        ({"moe_layer_start_index": 1, "moe_layer_end_index": 2}, {"moe_layer_start_index": 0, "moe_layer_end_index": 0}),
        ({"attention_types": [[["g", "l"], 2]], "attention_layers": list("glgl")},
         {"attention_types": [[["l"], 1], [["l"], 1]], "attention_layers": list("ll")}),
        ({"block_configs": [{"n": i} for i in range(4)], "time_step_limit": [0.0, 1.0]}, {"block_configs": [{"n": 1}, {"n": 3}]}),
    ],
)  # fmt: skip
def test_the_second_and_the_last_of_four_blocks(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert _changed(before, 4, [1, 3]) == after


def test_tensors_get_the_new_numbers_and_those_after_the_last_block_follow_on() -> None:
    names = ["model.embed.weight", *(f"model.layers.{i}.mlp.experts.{i}.w" for i in range(5)), "model.norm.weight"]
    tensors = {name: TensorSpec(name, "F32", (1,)) for name in names}
    config = {"num_hidden_layers": 4, "num_nextn_predict_layers": 1}
    model = Model(Checkpoint(Path("nowhere"), config, tensors, {}), "llama", ARCHITECTURES["llama"])
    assert renumbered(model, [0, 2]) == {
        "model.embed.weight": "model.embed.weight",
        "model.layers.0.mlp.experts.1.w": "model.layers.1.mlp.experts.1.w",
        "model.layers.1.mlp.experts.3.w": "model.layers.3.mlp.experts.3.w",
        "model.layers.2.mlp.experts.4.w": "model.layers.4.mlp.experts.4.w",
        "model.norm.weight": "model.norm.weight",
    }


def test_a_block_that_its_number_scales_is_another_one_at_another_place(tmp_path: Path) -> None:
    """GPT-2 may divide the attention's scores by the block's number."""
    usual = open_model(make_model(tmp_path / "usual", "gpt2"))
    check_same_blocks(usual, [0])
    scaled = open_model(make_model(tmp_path / "scaled", "gpt2", scale_attn_by_inverse_layer_idx=True))
    check_same_blocks(scaled, [2])
    with pytest.raises(
        UnsupportedArchitecture, match=r"block 1 would be another one as block 0 \(attn.scaling is .*prune its ch"
    ):
        check_same_blocks(scaled, [0])
