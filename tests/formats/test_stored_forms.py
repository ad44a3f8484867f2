"""formats/stored_forms.py: dense models that are stored in FP8 are sources like the dense model. End to end.

What nothing explains is refused when it is opened.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from checkpoint_damage import edit_config, edit_tensors
from conftest import SMALL, Run
from family_stages import write_tokenizer
from safetensors.torch import load_file, save_file
from stored_models import FORMS, FP8, store_fp8
from tiny_models import make_model

from compresskit.checkpoint.manifest import check_unchanged
from compresskit.checkpoint.reader import open_checkpoint, sha256
from compresskit.checkpoint.stock import load_whole
from compresskit.errors import CheckpointError
from compresskit.formats.packed_configuration import configuration
from compresskit.formats.stored_forms import as_dense, open_dense
from compresskit.models.load import open_model
from compresskit.numerics.scheme import Scheme

UP = "model.layers.1.mlp.up_proj"
STEPS: dict[str, tuple[object, ...]] = {
    "prune magnitude": ("prune", "magnitude", "--sparsity", "0.3"),
    "prune cfsp": ("prune", "cfsp"),
    "rtn": ("quantize", "rtn", "--bits", "4"),
    "gptq": ("quantize", "gptq", "--bits", "4"),
}
"""Commands whose result is decided by the weights and the text."""


def result(run: Run, step: tuple[object, ...], source: Path, out: Path, text: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the tensors that a step writes, config.json)."""
    stage, method, *flags = step
    code, _, err = run(stage, method, source, out, *flags, "--calibration", text, *SMALL)
    assert code == 0, err
    return load_file(out / "model.safetensors"), json.loads((out / "config.json").read_text())


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


@pytest.mark.parametrize(
    ("form", "step"),
    [
        *(("blocks that divide nothing", step) for step in STEPS),
        *(("compressed-tensors channel", step) for step in ("prune cfsp", "rtn")),
        *((form, "prune magnitude") for form in FORMS if form != "blocks that divide nothing"),
    ],
)
def test_a_step_from_fp8_writes_what_it_writes_from_the_dense_model(
    form: str, step: str, run: Run, tiny: dict[str, Path], text_file: Path, tmp_path: Path
) -> None:
    stored, dense = store_fp8(tiny["llama"], form, tmp_path)
    found = result(run, STEPS[step], stored, tmp_path / "a", text_file)
    expected = result(run, STEPS[step], dense, tmp_path / "b", text_file)
    assert same(found[0], expected[0]) and found[1] == expected[1]
    assert not any(name.endswith(("weight_scale_inv", "input_scale")) for name in found[0])
    inputs = json.loads((tmp_path / "a" / "compresskit.json").read_text())["inputs"]["sha256"]
    assert inputs == {"model.safetensors": sha256(stored / "model.safetensors")}


MIXTURE = {
    "prune": ("prune", "cfsp", "--allocation", "uniform", "--sparsity", "0.25", "--round-to", "8"),
    "gptq": STEPS["gptq"],
}


@pytest.mark.parametrize("step", MIXTURE)
def test_a_mixture_of_experts_in_fp8_is_a_source_like_the_dense_one(step: str, run: Run, text_file: Path, tmp_path: Path) -> None:
    """DeepSeek-V3 is published so: a structure that is derived, experts one by one, scales of blocks."""
    source = families.build("deepseek_v3", tmp_path / "source")
    write_tokenizer(source)
    stored, dense = store_fp8(source, "blocks", tmp_path)
    found = result(run, MIXTURE[step], stored, tmp_path / "a", text_file)
    expected = result(run, MIXTURE[step], dense, tmp_path / "b", text_file)
    assert same(found[0], expected[0]) and found[1] == expected[1]
    assert any(".experts.3." in name for name in found[0]) and not any("scale_inv" in name for name in found[0])
    flags = ("--data", text_file, "--windows", 2, "--sequence-length", 64, "--json")
    code, text, err = run("evaluate", stored, "--against", dense, *flags)
    assert code == 0, err
    assert json.loads(text)["kl"] == 0
    assert json.loads(text)["perplexity"] == json.loads(run("evaluate", dense, *flags)[1])["perplexity"]


@pytest.mark.parametrize("form", ["blocks", "no scales"])
def test_evaluate_finds_what_it_finds_of_the_dense_model(
    form: str, run: Run, tiny: dict[str, Path], text_file: Path, tmp_path: Path
) -> None:
    stored, dense = store_fp8(tiny["llama"], form, tmp_path)
    flags = ("--data", text_file, "--windows", 2, "--sequence-length", 64, "--json")
    code, text, err = run("evaluate", stored, "--against", dense, *flags)
    assert code == 0, err
    found, expected = json.loads(text), json.loads(run("evaluate", dense, *flags)[1])
    assert found["kl"] == 0 and found["perplexity"] == expected["perplexity"]
    assert found["parameters"] == expected["parameters"] and found["bytes"] < expected["bytes"]


def test_inspect_says_how_the_weights_are_stored(run: Run, tiny: dict[str, Path], tmp_path: Path) -> None:
    stored, dense = store_fp8(tiny["llama"], "one block larger than all", tmp_path)
    found, expected = (json.loads(run("inspect", folder, "--json")[1]) for folder in (stored, dense))
    assert found["stored_as"] == "FP8, blocks of 128 x 128, read as F32" and expected["stored_as"] is None
    assert found["parameters"] == expected["parameters"] and found["ffn_widths"] == expected["ffn_widths"]
    assert found["dtypes"]["F8_E4M3"] > 0
    assert "stored_as        FP8, blocks of 128 x 128" in run("inspect", stored)[1]


def test_what_is_stored_keeps_its_files_hashes_and_sizes(tiny: dict[str, Path], tmp_path: Path) -> None:
    folder, dense = store_fp8(tiny["llama"], "blocks", tmp_path)
    raw, found = open_checkpoint(folder), open_dense(folder)
    assert (found.files, found.hashes, found.bytes) == (raw.files, raw.hashes, raw.bytes)
    assert found.stored_bytes == sum(spec.bytes for spec in raw.tensors.values()) == raw.stored_bytes
    assert found.parameters == open_checkpoint(dense).parameters
    assert as_dense(found) is found
    check_unchanged(found)
    model = open_model(folder)
    assert not model.quantized and model.format is None and model.parameters == found.parameters


def test_scales_in_a_file_of_their_own_count_as_the_checkpoint_s(tiny: dict[str, Path], tmp_path: Path) -> None:
    folder, dense = store_fp8(tiny["llama"], "blocks", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    for number, scales in enumerate((False, True), start=1):
        part = {name: tensor for name, tensor in tensors.items() if name.endswith("_inv") == scales}
        save_file(part, folder / f"model-0000{number}-of-00002.safetensors")
    (folder / "model.safetensors").unlink()
    found = open_dense(folder)
    assert len(found.files) == len(found.hashes) == 2
    assert torch.equal(found.read(f"{UP}.weight"), open_checkpoint(dense).read(f"{UP}.weight"))


def test_made_tensors_are_copied_and_converted_by_the_writer(
    run: Run, tiny: dict[str, Path], text_file: Path, tmp_path: Path
) -> None:
    """`--ignore` copies every block's down projections as they are read; the embedding is converted."""
    stored, dense = store_fp8(tiny["llama"], "one block larger than all", tmp_path)
    step = ("quantize", "rtn", "--bits", "4", "--ignore", "down", "--embedding-bits", "16")
    found = result(run, step, stored, tmp_path / "a", text_file)[0]
    assert same(found, result(run, step, dense, tmp_path / "b", text_file)[0])
    down = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(found[down], open_dense(stored).read(down))


def test_a_task_vector_of_fp8_models_is_that_of_the_dense_ones(run: Run, tiny: dict[str, Path], tmp_path: Path) -> None:
    tuned = make_model(tmp_path / "tuned", "llama", seed=1)
    stored, dense = store_fp8(tuned, "blocks", tmp_path)
    base, dense_base = store_fp8(tiny["llama"], "compressed-tensors tensor", tmp_path / "base")
    for kind, source, under in (("a", stored, base), ("b", dense, dense_base)):
        assert run("quantize", "compeft", source, tmp_path / kind, "--base", under, "--density", "0.3")[0] == 0
        assert run("expand", tmp_path / kind, tmp_path / f"{kind}-whole", "--base", under)[0] == 0
        assert run("merge", "average", source, source, tmp_path / f"{kind}-merged", "--base", under)[0] == 0
    for kind, most in (("whole", 50), ("merged", 0)):  # of equal magnitudes at the threshold the first in the file are kept
        found, expected = (load_file(tmp_path / f"{each}-{kind}" / "model.safetensors") for each in "ab")
        assert found.keys() == expected.keys()
        assert sum(int((found[name] != expected[name]).sum()) for name in found) <= most
        configs = [json.loads((tmp_path / f"{each}-{kind}" / "config.json").read_text()) for each in "ab"]
        assert configs[0] == configs[1]


@pytest.mark.parametrize("form", ["blocks that divide nothing", "no scales"])
def test_a_whole_stock_model_gets_the_weights_as_they_are_read(form: str, tiny: dict[str, Path], tmp_path: Path) -> None:
    folder, dense = store_fp8(tiny["qwen3_moe"], form, tmp_path)
    found, expected = (load_whole(each, torch.float32, made=open_dense(each)).state_dict() for each in (folder, dense))
    assert same(found, expected)


UNEXPLAINED = {
    "a scale of blocks": ({f"{UP}.weight_scale_inv": torch.ones(6, 4)}, f"{UP}.weight_scale_inv is F32, the scale of"),
    "a scale": ({f"{UP}.weight_scale": torch.ones(1)}, f"{UP}.weight_scale is F32, the scale of"),
    "float8": ({f"{UP}.weight": torch.ones(96, 32).to(FP8)}, f"{UP}.weight is F8_E4M3"),
}


@pytest.mark.parametrize("case", UNEXPLAINED)
@pytest.mark.parametrize("command", ["evaluate", "prune", "inspect"])
def test_scales_and_float8_that_nothing_explains_are_refused(
    case: str, command: str, run: Run, model: Path, tmp_path: Path
) -> None:
    tensors, said = UNEXPLAINED[case]
    edit_tensors(model, lambda found: found.update(tensors))
    arguments = {"evaluate": (model,), "prune": ("magnitude", model, tmp_path / "out"), "inspect": (model,)}[command]
    code, _, err = run(command, *arguments)
    assert code == 2 and said in err and "restore config.json" in err and len(err.strip().splitlines()) == 1


def test_float8_with_scales_is_not_taken_for_plain_float8(tiny: dict[str, Path], tmp_path: Path) -> None:
    folder, _ = store_fp8(tiny["llama"], "blocks", tmp_path)
    edit_config(folder, quantization_config=..., dtype="float8_e4m3fn")
    with pytest.raises(CheckpointError, match=r"no quantization_config in config\.json says how to read it"):
        open_dense(folder)


def test_float8_beside_packed_linears_is_refused(model: Path) -> None:
    edit_tensors(model, lambda tensors: tensors.update({f"{UP}.weight": tensors[f"{UP}.weight"].to(FP8)}))
    edit_config(model, quantization_config=configuration({UP: Scheme(4, 16, True)}, []))
    with pytest.raises(CheckpointError, match=rf"{UP}\.weight is F8_E4M3"):
        open_dense(model)


def test_a_configuration_of_fp8_over_dense_files_is_that_of_a_dense_model(model: Path) -> None:
    edit_config(model, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    found = open_model(model).checkpoint
    assert found.stored_as is None and "quantization_config" not in found.config
