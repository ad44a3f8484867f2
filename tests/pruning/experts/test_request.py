"""pruning/experts/request.py: what cannot be done is refused with the remedy, before any weight is read; what a plan says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from checkpoint_damage import edit_config
from small_runs import options
from tiny_models import make_model

from compresskit.errors import CompresskitError
from compresskit.models.load import open_model
from compresskit.pruning.experts.reap import REAP
from compresskit.pruning.experts.request import ExpertsRequest, open_request


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"experts": 1}, "--experts 1: would keep 1 of 4 experts, and a token gets 2; keep at least 2"),
        ({"sparsity": 0.75}, "--sparsity 0.75: would keep 1 of 4 experts, and a token gets 2"),
        ({"experts": 5}, "--experts 5: the model has 4 experts in a block; keep at most as many"),
        ({"sparsity": 0.1}, "--sparsity 0.1: is less than half of what can go of 4 experts; pass --experts 3"),
    ],
)
def test_too_few_and_too_many_are_refused(
    settings: dict[str, Any], said: str, tiny: dict[str, Path], text_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(CompresskitError, match=said):
        open_request(REAP(**settings), str(tiny["mixtral"]), tmp_path / "out", options(text_file))


def test_models_without_experts_low_bits_and_eight_bit_tensors_are_refused(
    tiny: dict[str, Path], text_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(CompresskitError, match="llama has no experts that can be removed; prune its channels or blocks"):
        open_request(REAP(), str(tiny["llama"]), tmp_path / "out", options(text_file))
    source = make_model(tmp_path / "source", "mixtral")
    request = ExpertsRequest(REAP(), open_model(source), tmp_path / "out", options(text_file))
    name, spec = next(iter(request.model.checkpoint.tensors.items()))
    tensors = request.model.checkpoint.tensors | {name: replace(spec, dtype="F8_E4M3")}
    eight = replace(request.model, checkpoint=replace(request.model.checkpoint, tensors=tensors))
    with pytest.raises(CompresskitError, match="holds F8_E4M3 tensors; prune a 16- or 32-bit checkpoint"):
        replace(request, model=eight).check()
    groups = {
        "group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "channel"}}
    }
    edit_config(
        source, quantization_config={"quant_method": "compressed-tensors", "config_groups": groups, "format": "pack-quantized"}
    )
    with pytest.raises(CompresskitError, match="is quantized already; prune the dense checkpoint"):
        open_request(REAP(), str(source), tmp_path / "out", options(text_file))


@pytest.mark.parametrize(
    ("kept", "groups", "said"),
    [
        (
            3,
            {"n_group": 2, "topk_group": 1},
            "would keep 3 experts, and the router chooses among 2 groups of equal size; keep a mul",
        ),
        (2, {"n_group": 2, "topk_group": 1}, "would leave 1 experts in each of 2 groups, of which a token takes 2 from 1 groups"),
        (4, {"n_group": 2, "topk_group": 1}, ""),
    ],
)
def test_groups_of_the_router_stay_equal(
    kept: int, groups: dict[str, int], said: str, tiny: dict[str, Path], text_file: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """The keys stand for those of DeepSeek-V3, whose tiny model takes seconds to trace."""
    request = ExpertsRequest(REAP(experts=kept), open_model(tiny["mixtral"]), tmp_path / "out", options(text_file))
    config = request.model.checkpoint.config | groups
    request = replace(request, model=replace(request.model, checkpoint=replace(request.model.checkpoint, config=config)))
    if not said:
        request.check()
        return
    with pytest.raises(CompresskitError, match=said):
        request.check()


def test_a_share_of_grouped_experts_is_a_multiple_of_the_groups() -> None:
    assert [REAP(sparsity=share).kept_of(8, 2) for share in (0.0, 0.25, 0.5, 0.6)] == [8, 6, 4, 4]
    assert [REAP(sparsity=share).kept_of(8) for share in (0.25, 0.5, 0.6)] == [6, 4, 3]


def test_the_planned_model_has_the_shapes_that_are_written(tiny: dict[str, Path], text_file: Path, tmp_path: Path) -> None:
    request = open_request(REAP(experts=3), str(tiny["qwen2_moe"]), tmp_path / "out", options(text_file))
    planned, model = request.result_model(), request.model
    expert = sum(s.elements for name, s in model.checkpoint.tensors.items() if "layers.0.mlp.experts.3." in name)
    assert planned.parameters == model.parameters - 2 * (expert + model.hidden_size)
    assert request.passes() > 4 * request.options.samples and request.peak_bytes() > 0
