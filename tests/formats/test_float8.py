"""formats/float8.py, formats/float8_configs.py: FP8 weights are read as the dense weights that they stand for.

Oracle: a loop over the blocks, and stock transformers, which dequantises on a CPU. Refusals: damaged copies.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_damage import edit_config, edit_tensors
from safetensors.torch import load_file, save_file
from stored_models import FORMS, FP8, ct_config, fp8_config, in_blocks, store_fp8
from transformers import AutoModelForCausalLM

from compresskit.checkpoint.stock import quiet
from compresskit.errors import CheckpointError, NumericalError
from compresskit.formats.stored_forms import open_dense

UP = "model.layers.1.mlp.up_proj"
NOT_STOCK = ("blocks that divide nothing", "no scales")
"""transformers dequantises no blocks that do not divide a weight, and makes no network in float8."""


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read_as_the_dense_model_that_it_stands_for(form: str, tiny: dict[str, Path], tmp_path: Path) -> None:
    stored, dense = map(open_dense, store_fp8(tiny["llama"], form, tmp_path))
    assert dense.stored_as is None and stored.stored_as
    assert stored.config == dense.config
    assert stored.tensors.keys() == dense.tensors.keys()
    for name, spec in dense.tensors.items():
        assert stored.tensors[name] == spec
        found, expected = stored.read(name), dense.read(name)
        assert found.dtype == expected.dtype and torch.equal(found, expected), name


@pytest.mark.parametrize("form", [form for form in FORMS if form not in NOT_STOCK])
def test_stock_transformers_dequantises_to_the_same_bits(form: str, tiny: dict[str, Path], tmp_path: Path) -> None:
    folder, _ = store_fp8(tiny["llama"], form, tmp_path)
    checkpoint = open_dense(folder)
    with quiet():
        network = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    weights = network.state_dict()
    assert all(torch.equal(checkpoint.read(name), weights[name]) for name in checkpoint.tensors)


def test_experts_in_one_tensor_have_blocks_of_their_own(tmp_path: Path) -> None:
    parts = [in_blocks(torch.randn(10, 12, generator=torch.Generator().manual_seed(expert)), 4, 8) for expert in range(3)]
    codes, scales, dense = (torch.stack(each) for each in zip(*parts, strict=True))
    write(tmp_path, fp8_config(weight_block_size=[4, 8]), {"a.experts.up": codes, "a.experts.up_scale_inv": scales})
    found = open_dense(tmp_path)
    assert found.spec("a.experts.up").shape == (3, 10, 12)
    assert torch.equal(found.read("a.experts.up"), dense.bfloat16())


def test_weights_taller_than_a_section_are_read_in_several(tmp_path: Path) -> None:
    codes, scales, dense = in_blocks(torch.randn(700, 9, generator=torch.Generator().manual_seed(0)), 300, 4)
    write(tmp_path, fp8_config(weight_block_size=[300, 4]), {"a.weight": codes, "a.weight_scale_inv": scales})
    assert torch.equal(open_dense(tmp_path).read("a.weight"), dense.bfloat16())


def test_groups_of_the_configuration_that_differ_are_told_apart_by_their_targets(tmp_path: Path) -> None:
    config = ct_config("channel")
    groups = config["config_groups"]
    block = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [2, 8]}
    groups["first"] = {"targets": ["re:.*down.*"], "weights": block, "format": "naive-quantized"}
    config["config_groups"] = {"first": groups["first"], "group_0": groups["group_0"]}
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    down, rows = in_blocks(weight, 2, 8), in_blocks(weight, 1, 8)
    tensors = {"b.down.weight": down[0], "b.down.weight_scale": down[1], "b.up.weight": rows[0], "b.up.weight_scale": rows[1]}
    write(tmp_path, config, tensors)
    found = open_dense(tmp_path)
    assert found.stored_as == "FP8, blocks of 2 x 8, one scale for each output, read as BF16"
    assert torch.equal(found.read("b.down.weight"), down[2].bfloat16()) and torch.equal(
        found.read("b.up.weight"), rows[2].bfloat16()
    )


def write(folder: Path, config: dict[str, Any] | None, tensors: dict[str, torch.Tensor]) -> None:
    stated = {"model_type": "llama"} | ({} if config is None else {"quantization_config": config})
    (folder / "config.json").write_text(json.dumps(stated))
    save_file(tensors, folder / "model.safetensors")


def tensor(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    return lambda folder: edit_tensors(folder, lambda tensors: (change(tensors), None)[1])


def quantization(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())["quantization_config"]
        edit_config(folder, quantization_config=config | changes)

    return change


def group(targets: tuple[str, ...] = ("Linear",), **weights: object) -> Callable[[Path], None]:
    stated = {"num_bits": 8, "type": "float", "strategy": "tensor"} | weights
    return quantization(config_groups={"group_0": {"targets": targets, "weights": stated}})


ROTATED = {"config_groups": {"R1": {}}}
SCALE, CT_SCALE = f"{UP}.weight_scale_inv", f"{UP}.weight_scale"
REFUSED: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "no scale": ("blocks", tensor(lambda t: t.pop(SCALE)), f"{UP}.weight is F8_E4M3 and has no scale {SCALE}"),
    "two scales": ("blocks", tensor(lambda t: t.update({CT_SCALE: torch.ones(1)})), "two scales"),
    "a scale of another shape": (
        "blocks", tensor(lambda t: t.update({SCALE: torch.ones(4, 6)})), f"{SCALE} is F32 [4, 6]",
    ),
    "a scale of whole numbers": ("blocks", tensor(lambda t: t.update({SCALE: torch.ones(6, 4).int()})), f"{SCALE} is I32"),
    "a scale without weight": ("blocks", tensor(lambda t: t.pop(f"{UP}.weight")), f"scale of {UP}.weight, which is missing"),
    "codes of 4 bits": (
        "blocks", tensor(lambda t: t.update({f"{UP}.weight": torch.ones(96, 16).char()})), "of dtype I8, expected F8_E4M3",
    ),
    "one number for blocks": ("blocks", tensor(lambda t: t.update({SCALE: torch.ones(())})), f"{SCALE} is F32 []"),
    "blocks that are no numbers": ("blocks", quantization(weight_block_size=[16, "8"]), "weight_block_size is [16, '8']"),
    "blocks of nothing": ("blocks", quantization(weight_block_size=[0, 8]), "weight_block_size is [0, 8]"),
    "an unknown dtype": ("blocks", lambda f: edit_config(f, dtype="int8"), "dtype is 'int8'"),
    "an unknown strategy": ("compressed-tensors tensor", group(strategy="token"), "strategy 'token'"),
    "no target": ("compressed-tensors tensor", group(("x",)), "no config group targets it"),
    "4 bits": ("compressed-tensors tensor", group(num_bits=4), "known are pack-quantized"),
    "rotated weights": (
        "compressed-tensors tensor", quantization(transform_config=ROTATED), "rotated weights are not known",
    ),
    "zero points": (
        "compressed-tensors tensor", tensor(lambda t: t.update({f"{UP}.weight_zero_point": torch.ones(1)})), "has no such tensor",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_when_it_is_opened(case: str, tiny: dict[str, Path], tmp_path: Path) -> None:
    form, change, said = REFUSED[case]
    folder, _ = store_fp8(tiny["llama"], form, tmp_path)
    change(folder)
    with pytest.raises(CheckpointError) as caught:
        open_dense(folder)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_scale_that_is_not_finite_and_a_product_beyond_the_dtype_are_named(tiny: dict[str, Path], tmp_path: Path) -> None:
    folder, _ = store_fp8(tiny["llama"], "blocks of 128 unstated", tmp_path)
    edit_tensors(folder, lambda tensors: tensors[SCALE].fill_(float("nan")))
    with pytest.raises(NumericalError, match=SCALE):
        open_dense(folder).read(f"{UP}.weight")
    edit_tensors(folder, lambda tensors: tensors[SCALE].fill_(1e4))  # float16 ends at 65504
    with pytest.raises(NumericalError, match=rf"{UP}\.weight holds NaN or infinity"):
        open_dense(folder).read(f"{UP}.weight")


def test_a_code_that_is_not_a_number_is_named(tiny: dict[str, Path], tmp_path: Path) -> None:
    folder, _ = store_fp8(tiny["llama"], "blocks", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{UP}.weight"].view(torch.uint8)[3, 5] = 0x7F
    assert tensors[f"{UP}.weight"].dtype == FP8
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(NumericalError, match=rf"{UP}\.weight holds NaN"):
        open_dense(folder).read(f"{UP}.weight")
