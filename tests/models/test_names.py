"""models/names.py: every stored tensor is found in the network that stock transformers loads, and every parameter in the file.

Oracle: the values of the loaded model, put together from the file by hand.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import SAMPLE, auto_class, build, config_of
from safetensors.torch import load_file, save_file
from small_runs import slow_but
from torch import Tensor

from compresskit.models.names import StoredNames, converted, stored_names, weight_names
from compresskit.models.network import build_network

QUICK = ("mixtral", "gpt_oss", "granitemoe", "qwen3_vl_moe", "olmo_hybrid", "llava", "nemotron_h", "bloom")


def loaded(model_type: str, folder: Path) -> Any:
    return auto_class(model_type).from_pretrained(folder, dtype=torch.float32).eval()


def values(network: Any, names: StoredNames, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parameters and buffers that stored tensors are, by their names in the network."""
    found: dict[str, Tensor] = {}
    experts: dict[str, dict[int, Tensor]] = {}
    known = dict(network.named_parameters(remove_duplicate=False)) | dict(network.named_buffers(remove_duplicate=False))
    for plain, stored in names.stored.items():
        if plain in known:
            found[plain] = tensors[stored]
        else:
            path, expert, linear, leaf = plain.rsplit(".", 3)
            experts.setdefault(f"{path}|{linear}|{leaf}", {})[int(expert)] = tensors[stored]
    stacked = {key: torch.stack([parts[number] for number in range(len(parts))]) for key, parts in experts.items()}
    for key, value in stacked.items():
        path, linear, leaf = key.split("|")
        name = "gate_up_proj" if linear in ("gate_proj", "up_proj") and f"{path}.gate_up_proj" in known else linear
        both = [stacked[f"{path}|{part}|{leaf}"] for part in ("gate_proj", "up_proj")] if name != linear else [value]
        found[f"{path}.{name}" + ("_bias" if leaf == "bias" else "")] = torch.cat(both, dim=1)
    for name, stored in names.packed.items():
        found[name] = tensors[stored].transpose(1, 2) if name in names.transposed else tensors[stored]
    for stored_together in set(names.converted.values()):
        made = converted(network, {stored: tensors[stored] for stored in stored_together})
        found |= {name: made[name] for name, stored in names.converted.items() if stored == stored_together}
    return found


@pytest.mark.parametrize("model_type", slow_but(*QUICK, of=dict.fromkeys((*QUICK, *SAMPLE))))
def test_every_tensor_of_a_loaded_model_is_found_in_the_file(model_type: str, tmp_path: Path) -> None:
    folder = build(model_type, tmp_path / "model")
    tensors, stock = load_file(folder / "model.safetensors"), loaded(model_type, folder)
    network = build_network(stock.config)
    names = stored_names(network, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    found = values(network, names, tensors)
    expected = dict(stock.named_parameters())
    missing = expected.keys() - found.keys()
    assert all(name in stock.all_tied_weights_keys for name in missing), sorted(missing)
    buffers = {name: each for name, each in stock.named_buffers() if name in found}
    for name, tensor in (expected | buffers).items():
        assert name in missing or torch.equal(found[name].to(tensor), tensor), name
    used = [*names.stored.values(), *names.packed.values(), *(each for parts in names.converted.values() for each in parts)]
    assert set(used) == tensors.keys() and names.unknown == ()


@pytest.mark.parametrize(
    "model_type", slow_but("mixtral", "qwen3_moe", of=("mixtral", "qwen3_moe", "qwen3_5_moe", "deepseek_v3"))
)
def test_experts_in_one_tensor_may_be_stored_one_by_one_under_names_that_stock_reads(model_type: str, tmp_path: Path) -> None:
    network = loaded(model_type, build(model_type, tmp_path / "source"))
    network.save_pretrained(tmp_path / "packed", save_original_format=False)
    network.save_pretrained(tmp_path / "apart", save_original_format=False)
    tensors = load_file(tmp_path / "packed" / "model.safetensors")
    skeleton = build_network(network.config)
    names = stored_names(skeleton, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    assert names.separable and names.separable.keys() == names.packed.keys()
    for target, parts in names.separable.items():
        whole = tensors.pop(names.packed[target])
        for template, rows in zip(parts, whole.chunk(len(parts), dim=1), strict=True):
            tensors |= {template.replace("{expert}", str(number)): each.clone() for number, each in enumerate(rows)}
    save_file(tensors, tmp_path / "apart" / "model.safetensors", metadata={"format": "pt"})
    found, expected = (loaded(model_type, tmp_path / name).state_dict() for name in ("apart", "packed"))
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("model_type", ["gpt_oss", "granitemoe", "nemotron_h"])
def test_experts_that_stock_reads_in_one_form_alone_are_not_taken_apart(model_type: str) -> None:
    network = build_network(config_of(model_type))
    shapes = {name: tuple(each.shape) for name, each in network.state_dict().items()}
    assert (stored_names(network, shapes).separable != {}) is (model_type == "nemotron_h")


def test_stored_names_may_lack_the_outer_module_s_name() -> None:
    network = build_network(config_of("gpt2"))
    shapes = {name.removeprefix("transformer."): tuple(each.shape) for name, each in network.state_dict().items()}
    found = stored_names(network, shapes)
    assert all(plain.removeprefix("transformer.") == stored for plain, stored in found.stored.items())
    assert {*found.stored} == {*network.state_dict()} and found.unknown == ()


def test_tensors_that_the_network_lacks_are_told_apart() -> None:
    network = build_network(config_of("llama"))
    shapes = {name: tuple(each.shape) for name, each in network.state_dict().items()}
    found = stored_names(network, shapes | {"model.layers.0.ghost.weight": (3,), "vision.weight": (4, 4)})
    assert found.unknown == ("model.layers.0.ghost.weight", "vision.weight")
    assert {*found.stored.values()} == shapes.keys()


@pytest.mark.parametrize(
    "leaves",
    [
        ("weight",), ("weight_packed", "weight_scale", "weight_shape"), ("weight_packed", "weight_scale", "weight_zero_point"),
        ("qweight", "qzeros", "scales", "g_idx"),
        ("weight", "weight.absmax", "weight.quant_map", "weight.quant_state.bitsandbytes__nf4"),
    ],
)  # fmt: skip
def test_a_low_bit_linear_counts_once_as_its_weight(leaves: tuple[str, ...]) -> None:
    names = [f"model.layers.0.mlp.up.{leaf}" for leaf in leaves]
    assert weight_names([*names, "model.layers.0.mlp.up.bias", "model.norm.weight"]) == [
        "model.layers.0.mlp.up.weight", "model.layers.0.mlp.up.bias", "model.norm.weight",
    ]  # fmt: skip


@pytest.mark.parametrize("transposed", [True, False])
def test_packed_experts_are_turned_only_if_their_shape_asks_for_it(transposed: bool) -> None:
    network = build_network(config_of("qwen3_vl_moe"))
    shapes = {name: tuple(each.shape) for name, each in network.state_dict().items()}
    packed = {name for name in shapes if name.endswith("experts.gate_up_proj")}
    if transposed:
        shapes |= {name: (shapes[name][0], *shapes[name][:0:-1]) for name in packed}
    found = stored_names(network, shapes)
    assert packed and found.transposed & packed == (packed if transposed else set())
    assert found.by_shape == found.transposed
