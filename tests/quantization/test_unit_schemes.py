"""quantization/unit_schemes.py: what is stored is what was asked for, planned, and read by stock tools. Property, end to end."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run
from hypothesis import given
from hypothesis import strategies as st
from stock_tools import tokens, walked_logits
from transformers import AutoModelForCausalLM

from compresskit.api import quantize as quantize_by_name
from compresskit.errors import RequestError, UnsupportedArchitecture
from compresskit.formats.packed_configuration import configuration
from compresskit.models.load import open_model
from compresskit.models.model import is_expert
from compresskit.models.units import units_of
from compresskit.numerics.scheme import Scheme
from compresskit.quantization.apiq.method import ApiQ
from compresskit.quantization.gptq import GPTQ
from compresskit.quantization.method import GridMethod, QuantizeMethod
from compresskit.quantization.request import QuantizeRequest
from compresskit.quantization.rtn import RTN
from compresskit.quantization.run import quantize
from compresskit.quantization.unit_schemes import UnitScheme
from compresskit.stages import Options

GRIDS: dict[str, dict[str, int]] = {
    "0.self_attn.q_proj+k_proj+v_proj": {"bits": 3, "group_size": 16},
    "0.mlp.down_proj": {"bits": 8, "group_size": 0},
    "1.mlp.gate_proj+up_proj": {"bits": 3, "group_size": 16},
}
LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")
SCHEMES = (Scheme(2, 32, True), Scheme(3, 32, True), Scheme(3, 16, True))


def options(text: Path) -> Options:
    return Options(calibration=str(text), samples=4, sequence_length=32)


def own(grids: dict[str, Any] = GRIDS) -> dict[str, UnitScheme]:
    return {name: UnitScheme(**grid) for name, grid in grids.items()}


METHODS: tuple[GridMethod, ...] = (
    RTN(bits=4, group_size=8, bits_by=own()),
    GPTQ(bits=4, group_size=8, bits_by=own()),
    ApiQ(bits=4, group_size=8, bits_by=own(), epochs=1),
)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_every_unit_is_stored_on_its_grid_as_planned_and_stock_tools_read_it(
    method: GridMethod, tiny: dict[str, Path], text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = quantize(method, str(tiny["llama"]), out, options(text_file))
    low, dense = open_model(out), open_model(tiny["llama"])
    for unit, names in units_of(dense, set(dense.linears)).items():
        grid = GRIDS.get(unit, {"bits": 4, "group_size": 8})
        for name in names:
            assert low.format is not None
            assert low.format.bits(name) == grid["bits"]
            groups = dense.linear_shape(name)[1] // grid["group_size"] if grid["group_size"] else 1
            assert low.checkpoint.tensors[f"{name}.weight_scale"].shape == (dense.linear_shape(name)[0], groups)
    planned = QuantizeRequest(method, dense, tmp_path / "other", options(text_file)).outputs()
    assert planned.bytes(10**9) == result["bytes_after"]
    stock = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    with torch.no_grad():
        found = stock(tokens()).logits
    assert float((found - walked_logits(out)).abs().max()) < 1e-3 * float(found.abs().max())


@pytest.mark.parametrize(
    ("family", "method"),
    [("mixtral", RTN(bits=8, group_size=16, expert_bits=3)), ("qwen2_moe", GPTQ(bits=4, group_size=8, expert_bits=2))],
)
def test_experts_have_bits_of_their_own_and_stock_tools_read_them(
    family: str, method: GridMethod, tiny: dict[str, Path], text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = quantize(method, str(tiny[family]), out, options(text_file))
    low, dense = open_model(out), open_model(tiny[family])
    assert low.format is not None
    found = {name: low.format.bits(low.stored_name(name)) for name in dense.linears}
    assert found == {name: method.expert_bits if is_expert(name) else method.average for name in dense.linears}
    planned = QuantizeRequest(method, dense, tmp_path / "other", options(text_file)).outputs()
    assert planned.bytes(10**9) == result["bytes_after"]
    stock = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = stock(tokens()).logits
    assert float((expected - walked_logits(out)).abs().max()) < 1e-3 * float(expected.abs().max())


def test_a_file_and_a_table_of_one_grid_for_all_are_the_same_as_the_flags(
    run: Run, tiny: dict[str, Path], text_file: Path, tmp_path: Path
) -> None:
    model = open_model(tiny["llama"])
    table = {unit: {"bits": 3} for unit in units_of(model, set(model.linears))}
    (tmp_path / "units.json").write_text(json.dumps(table))
    common = ["--group-size", "8", "--symmetric", "--calibration", str(text_file), "--sequence-length", "32", "--json"]
    source = str(tiny["llama"])
    assert run("quantize", "rtn", source, str(tmp_path / "a"), "--bits-by", str(tmp_path / "units.json"), *common)[0] == 0
    assert run("quantize", "rtn", source, str(tmp_path / "b"), "--bits", "3", *common)[0] == 0
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    configs = [(tmp_path / name / "config.json").read_text() for name in "ab"]
    assert files[0] == files[1]
    assert configs[0] == configs[1]
    short = {"calibration": str(text_file), "sequence_length": 32}
    again = quantize_by_name(source, tmp_path / "c", "rtn", True, bits_by=table, group_size=8, symmetric=True, **short)
    assert again["settings"]["bits_by"] == {unit: {"bits": 3, "group_size": None} for unit in table}


@pytest.mark.parametrize(
    ("method", "family", "kind", "said"),
    [
        (
            RTN(bits_by=own({"0.self_attn.q_prj": {"bits": 3}})),
            "llama",
            RequestError,
            "no unit '0.self_attn.q_prj'; Did you mean",
        ),
        (RTN(bits_by=own(), symmetric=False), "llama", RequestError, "--bits-by --asymmetric"),
        (RTN(bits_by=own(), bits=2.5), "llama", RequestError, "--bits-by, --bits 2.5"),
        (RTN(bits_by=own(), format="fp8"), "llama", RequestError, "--format packed"),
        (RTN(bits_by=own({"0.self_attn.o_proj": {"bits": 3, "group_size": 64}})), "llama", RequestError, "o_proj has 32 inputs"),
        (RTN(bits_by=own({"0.mlp.down_proj": {"bits": 3}}), ignore=("down",)), "llama", RequestError, "no unit"),
        (RTN(bits_by=own({"0.self_attn.o_proj": {"bits": 3}})), "mixtral", UnsupportedArchitecture, "one bit width"),
        (RTN(expert_bits=3), "llama", RequestError, "--expert-bits 3: llama has no experts"),
        (RTN(expert_bits=3, ignore=("experts",)), "mixtral", UnsupportedArchitecture, "all experts or none"),
        (RTN(expert_bits=3, bits=4.5), "mixtral", UnsupportedArchitecture, "pass whole --bits"),
        (RTN(expert_bits=3, symmetric=False), "mixtral", UnsupportedArchitecture, "pass --symmetric"),
        (ApiQ(bits_by=own(), rank=4), "llama", RequestError, "--bits-by --rank 4"),
    ],
)
def test_grids_that_cannot_be_stored_are_refused(
    method: QuantizeMethod, family: str, kind: type[Exception], said: str, tiny: dict[str, Path], text_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=said.replace(".", r"\.")):
        quantize(method, str(tiny[family]), tmp_path / "out", options(text_file))


@pytest.mark.parametrize("content", ["{", "[1]", '{"0.mlp.down_proj": {"bits": 9}}', '{"0.mlp.down_proj": {"bit": 3}}', None])
def test_a_file_that_is_no_table_is_one_line_and_exit_code_2(
    content: str | None, run: Run, tiny: dict[str, Path], tmp_path: Path
) -> None:
    file = tmp_path / "units.json"
    if content is not None:
        file.write_text(content)
    code, _, said = run("quantize", "rtn", str(tiny["llama"]), str(tmp_path / "out"), "--bits-by", str(file))
    assert code == 2
    assert said.count("\n") == 1
    assert "--bits-by" in said or "units.json" in said


@given(st.lists(st.lists(st.sampled_from(SCHEMES), min_size=3, max_size=3), min_size=1, max_size=12))
def test_exactly_one_target_means_each_linear(blocks: Sequence[Sequence[Scheme]]) -> None:
    schemes = {
        f"model.layers.{index}.{name}": scheme
        for index, row in enumerate(blocks)
        for name, scheme in zip(LINEARS, row, strict=True)
    }
    groups = configuration(schemes, [])["config_groups"].values()
    for name, scheme in schemes.items():
        hits = [
            group["weights"]
            for group in groups
            for target in group["targets"]
            if target == "Linear" or re.match(target.removeprefix("re:"), name)
        ]
        assert [(hit["num_bits"], hit["group_size"]) for hit in hits] == [(scheme.bits, scheme.group_size)]
