"""checkpoint/reader.py, checkpoint/weight_files.py, models/load.py: unusable checkpoints are refused with one line.

End to end on damaged copies.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint_damage import edit_config, edit_tensors
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from compresskit.checkpoint.reader import open_checkpoint
from compresskit.errors import CheckpointError, CompresskitError, NumericalError, RequestError, UnsupportedArchitecture
from compresskit.models.load import open_model


def shard(folder: Path) -> None:
    """Split the single file into two shards with an index."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({n: tensors[n] for n in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "model.safetensors").unlink()


def truncate(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def name_absent_tensor(folder: Path) -> None:
    shard(folder)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.layers.9.ghost.weight"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(content))


def remove_shard(folder: Path) -> None:
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def wrong_attention_shape(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.self_attn.q_proj.weight"] = torch.zeros(8, 8)


def wrong_ffn_shape(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(95, 32)


Damage = Callable[[Path], object]
DAMAGES: dict[str, tuple[Damage, type[CompresskitError], str]] = {
    "folder without config": (lambda f: (f / "config.json").unlink(), CheckpointError, "no config.json"),
    "config that is not JSON": (lambda f: (f / "config.json").write_text("{"), CheckpointError, "not valid JSON"),
    "unknown architecture": (lambda f: edit_config(f, model_type="lama"), UnsupportedArchitecture, "Did you mean 'llama'?"),
    "truncated file": (lambda f: truncate(f / "model.safetensors"), CheckpointError, "truncated or damaged"),
    "missing shard": (remove_shard, CheckpointError, "the shard is missing"),
    "index naming an absent tensor": (name_absent_tensor, CheckpointError, "model.layers.9.ghost.weight"),
    "pickle-only checkpoint": (pickle_only, CheckpointError, "only pickle weights (pytorch_model.bin)"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), CheckpointError, "no model*.safetensors"),
    "wrong attention shape": (lambda f: edit_tensors(f, wrong_attention_shape), CheckpointError, "layers.1.self_attn.q_proj.weight has"),
    "wrong FFN shape": (lambda f: edit_tensors(f, wrong_ffn_shape), CheckpointError, "layers.0.mlp.up_proj.weight has"),
    "missing tensor": (
        lambda f: edit_tensors(f, lambda t: t.pop("model.layers.2.self_attn.k_proj.weight")), CheckpointError, "layers.2.self_attn.k_proj.weight is missing",
    ),
    "missing FFN tensor": (
        lambda f: edit_tensors(f, lambda t: t.pop("model.layers.2.mlp.down_proj.weight")), CheckpointError, "layers.2.mlp.down_proj.weight is missing",
    ),
    "custom code": (lambda f: edit_config(f, model_type="own", auto_map={"AutoConfig": "x.Y"}), RequestError, "--trust-remote-code"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_when_opened(damage: str, tiny: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny["llama"], folder)
    change, error, said = DAMAGES[damage]
    change(folder)
    with pytest.raises(error) as caught:
        open_model(folder)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        open_checkpoint(tmp_path / "nothing")


def test_custom_code_is_accepted_when_trusted(model: Path) -> None:
    (model / "x.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class Y(LlamaConfig):\n    model_type = 'own'\n"
        "class Z(LlamaForCausalLM):\n    config_class = Y\n"
    )
    edit_config(model, model_type="own", auto_map={"AutoConfig": "x.Y", "AutoModelForCausalLM": "x.Z"})
    assert open_model(model, trust_remote_code=True).family == "own"


def test_custom_code_of_a_type_that_transformers_has_is_left_alone(model: Path) -> None:
    edit_config(model, auto_map={"AutoConfig": "x.Y"})
    assert open_model(model).family == "llama"
    with pytest.raises(CheckpointError, match=r"x\.py"):
        open_model(model, trust_remote_code=True)  # there is no such file


def test_sharded_and_single_files_hold_the_same_model(tiny: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny["llama"], folder)
    single = open_checkpoint(folder)
    expected = {name: single.read(name) for name in single.tensors}
    shard(folder)
    sharded = open_checkpoint(folder)
    assert len(sharded.files) == 2
    assert all(torch.equal(sharded.read(name), tensor) for name, tensor in expected.items())


def split(
    folder: Path, names: tuple[str, ...] = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
) -> None:
    """Split the single file into these files, without an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for start, file in enumerate(names):
        part = {name: tensors[name] for name in sorted(tensors)[start :: len(names)]}
        save_file(part, folder / file, metadata={"format": "pt"})


def stock_norm(folder: Path) -> torch.Tensor:
    """The last norm's weight as transformers loads the folder."""
    weight: torch.Tensor = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True).model.norm.weight.detach()
    return weight


NORM = "model.norm.weight"


def test_a_second_file_beside_model_safetensors_is_not_read(model: Path) -> None:
    expected = open_checkpoint(model).read(NORM)
    other = {name: torch.zeros_like(tensor) for name, tensor in load_file(model / "model.safetensors").items()}
    for name in ("model_quantized.safetensors", "model-00001-of-00001.safetensors"):
        save_file(other, model / name, metadata={"format": "pt"})
    found = open_checkpoint(model)
    assert [file.name for file in found.files] == ["model.safetensors"]
    assert torch.equal(found.read(NORM), expected) and torch.equal(stock_norm(model), expected)


def test_model_safetensors_goes_before_an_index_as_in_transformers(model: Path) -> None:
    whole = load_file(model / "model.safetensors")
    shard(model)
    changed = {name: tensor + 1 for name, tensor in whole.items()}
    save_file(changed, model / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(open_checkpoint(model).read(NORM), whole[NORM] + 1)
    assert torch.equal(stock_norm(model), whole[NORM] + 1)


def test_all_shards_of_a_set_are_read_without_an_index(model: Path) -> None:
    single = open_checkpoint(model)
    expected = {name: single.read(name) for name in single.tensors}
    split(model)
    shutil.copyfile(model / "model-00001-of-00002.safetensors", model / "model_old.safetensors")
    found = open_checkpoint(model)
    assert found.tensors.keys() == expected.keys()
    assert all(torch.equal(found.read(name), tensor) for name, tensor in expected.items())


def copy_as(name: str) -> Callable[[Path], object]:
    return lambda folder: shutil.copyfile(folder / "model-00001-of-00002.safetensors", folder / name)


def twice_in_a_set(folder: Path) -> None:
    split(folder)
    tensors = load_file(folder / "model-00001-of-00002.safetensors") | load_file(folder / "model-00002-of-00002.safetensors")
    save_file(tensors, folder / "model-00002-of-00002.safetensors", metadata={"format": "pt"})


def twice_in_an_index(folder: Path) -> None:
    shard(folder)
    tensors = load_file(folder / "model-00001-of-00002.safetensors") | load_file(folder / "model-00002-of-00002.safetensors")
    save_file(tensors, folder / "model-00002-of-00002.safetensors", metadata={"format": "pt"})


def after_split(change: Callable[[Path], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        split(folder)
        change(folder)

    return damage


INCONSISTENT: dict[str, tuple[Callable[[Path], None], str]] = {
    "a shard of the set is missing": (after_split(lambda f: (f / "model-00001-of-00002.safetensors").unlink()), "1 of 2"),
    "two sets": (after_split(copy_as("model-00001-of-00003.safetensors")), "model-00001-of-00003.safetensors"),
    "a shard twice": (after_split(copy_as("model-1-of-2.safetensors")), "model-1-of-2.safetensors"),
    "a number beyond the set": (after_split(copy_as("model-00003-of-00002.safetensors")), "model-00003-of-00002.safetensors"),
    "a tensor in two shards": (twice_in_a_set, "lm_head.weight"),
    "a tensor in two files of the index": (twice_in_an_index, "lm_head.weight"),
    "one file of another name": (lambda f: split(f, ("model_quantized.safetensors",)), "rename it to model.safetensors"),
}


@pytest.mark.parametrize("case", INCONSISTENT)
def test_files_that_make_no_single_set_of_weights_are_refused(case: str, model: Path) -> None:
    change, said = INCONSISTENT[case]
    change(model)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(model)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_tensor_that_the_index_leaves_out_is_read_as_transformers_does(model: Path) -> None:
    shard(model)
    index = model / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"][NORM]
    index.write_text(json.dumps(content))
    assert torch.equal(open_checkpoint(model).read(NORM), stock_norm(model))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named_when_it_is_read(value: float, tiny: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny["llama"], folder)
    name = "model.layers.1.mlp.up_proj.weight"
    edit_tensors(folder, lambda tensors: tensors[name].view(-1)[3:4].fill_(value))
    with pytest.raises(NumericalError, match=name) as caught:
        open_checkpoint(folder).read(name)
    assert caught.value.exit_code == 1
