"""models/meta.py: every stored tensor has a plain name and comes back bit by bit, in every family. Property test.

No key of config.json decides which code a network is built from. Towers are no part of what a walk holds.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_damage import edit_tensors
from families import build as build_family
from safetensors.torch import load_file
from small_runs import options, slow_but
from tiny_models import FAMILIES
from transformers import AutoConfig, AutoModelForCausalLM

from compresskit.errors import CheckpointError
from compresskit.machine.device import Where
from compresskit.models import meta
from compresskit.models.load import open_model
from compresskit.models.meta import build, read_plain, to_stored
from compresskit.quantization.rtn import RTN
from compresskit.quantization.run import quantize
from compresskit.walk.walk import Walk

pytestmark = pytest.mark.usefixtures("own_structures")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_stored_tensor_has_a_plain_name_and_comes_back_bit_equal(family: str, tiny: dict[str, Path]) -> None:
    model = open_model(tiny[family])
    names = [name for name, _ in build(model).named_parameters() if model.has(name)]
    assert {model.stored_name(name) for name in names} == set(model.checkpoint.tensors)
    stored = load_file(tiny[family] / "model.safetensors")
    for name in names:
        assert torch.equal(to_stored(model, name, read_plain(model, name)), stored[model.stored_name(name)])


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("value", ["who/what", "kernels-community/flash-attn2", "flash_attention_2", {"": "who/what"}])
def test_a_network_is_built_without_the_kernels_that_a_configuration_names(key: str, value: object, model: Path) -> None:
    usual = build(open_model(model)).config
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {key: value, "experts_implementation": "sonicmoe"}))
    found = build(open_model(model)).config
    assert found._attn_implementation == usual._attn_implementation
    assert found._experts_implementation == usual._experts_implementation


OTHERS = (
    "gpt_oss", "granitemoe", "deepseek_v3", "nemotron_h", "olmo_hybrid", "qwen3_vl_moe", "qwen3_5_moe", "gemma3", "bloom",
    "lfm2", "llama4_text", "mllama", "kimi_linear",
)  # fmt: skip
CPU = torch.device("cpu")


@pytest.mark.parametrize("model_type", slow_but("gpt_oss", "granitemoe", "olmo_hybrid", "gemma3", of=OTHERS))
def test_filling_reads_every_tensor_once_and_emptying_frees_it(model_type: str, tmp_path: Path) -> None:
    folder = build_family(model_type, tmp_path / "model")
    model = open_model(folder)
    network = build(model)
    prefixes = ["", *(model.block_name(index) for index in range(model.block_count))]
    towers = meta.towers(model, network)
    for prefix in prefixes:
        meta.fill(model, network, prefix, CPU, torch.float32)
        for name, parameter in network.named_parameters(remove_duplicate=False):
            inside = name.startswith(prefix + ".") if prefix else meta.is_outside(model, name) and not name.startswith(towers)
            assert parameter.is_meta != inside, name
        meta.empty(model, network, prefix)
        assert all(parameter.is_meta for parameter in network.parameters())


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        ("gemma3", {"model.vision_tower."}), ("mllama", {"model.vision_model."}), ("llama4_text", set()),
        ("qwen3_vl_moe", {"model.visual."}), ("gemma4", {"model.vision_tower."}), ("deepseek_v3", set()),
    ],
)  # fmt: skip
def test_towers_are_what_text_does_not_run_through(model_type: str, expected: set[str], tmp_path: Path) -> None:
    model = open_model(build_family(model_type, tmp_path / "model"))
    assert {tower for tower in meta.towers(model, build(model)) if tower.count(".") == 2} == expected


@pytest.mark.parametrize(
    ("model_type", "name", "said"),
    [
        ("bloom", "transformer.word_embeddings_layernorm.weight", r"word_embeddings_layernorm\.weight is missing"),
        ("gpt_oss", "model.layers.1.mlp.router.bias", r"layers\.1\.mlp\.router\.bias is missing"),
        ("gpt_oss", "model.layers.1.mlp.experts.down_proj_bias", r"layers\.1\.mlp\.experts\.0\.down_proj\.bias is missing"),
        ("granitemoe", "model.layers.0.block_sparse_moe.router.layer.weight", r"block_sparse_moe\.router.* is missing"),
        ("gemma3", "vision_tower.post_layernorm.weight", r"vision_tower\.post_layernorm\.weight is missing"),
        ("bloom", "transformer.h.1.input_layernorm.bias", r"h\.1\.input_layernorm\.bias has shape \[3\], its .* asks for \[64\]"),
        ("gpt_oss", "model.layers.2.self_attn.sinks", r"layers\.2\.self_attn\.sinks has shape \[3\], its .* asks for \[4\]"),
    ],
)  # fmt: skip
def test_a_derived_model_misses_no_tensor_in_silence(model_type: str, name: str, said: str, tmp_path: Path) -> None:
    folder = build_family(model_type, tmp_path / "model")

    def damage(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[name]
        if "shape" in said:
            tensors[name] = torch.zeros(3)

    edit_tensors(folder, damage)
    with pytest.raises(CheckpointError, match=said) as caught:
        build(open_model(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_whatever_is_tied_outside_the_blocks_is_filled(family: str, tmp_path: Path) -> None:
    """The head of such decoders has a bias of its own, under two names of which files hold one."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 128}
    network = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, is_decoder=True, **sizes)).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    network.save_pretrained(tmp_path / "model")
    tokens = torch.randint(3, 100, (2, 12))
    with torch.no_grad():
        expected = network(tokens).logits
    walk = Walk(open_model(tmp_path / "model"), tokens, Where(CPU, torch.float32))
    assert sum(1 for _ in walk) == 2
    assert (torch.cat([logits for _, _, logits in walk.logits()]) - expected).abs().max() < 1e-4
    assert all(parameter.is_meta for parameter in walk.network.parameters())


@pytest.mark.parametrize("form", [{"bits": 3, "group_size": 16}, {"format": "int8"}, {"format": "nvfp4"}, {"format": "mxfp4"}])
def test_low_bit_weights_are_unpacked_where_they_are_wanted(
    form: dict[str, Any], tiny: dict[str, Path], text_file: Path, tmp_path: Path
) -> None:
    """On the meta device, whose tensors have no values: nothing of the work was done on the CPU."""
    quantize(RTN(**form), str(tiny["llama"]), tmp_path / "out", options(text_file, samples=4))
    model = open_model(tmp_path / "out")
    name = model.block_linears(0)[0]
    assert model.format is not None
    assert model.format.read(name, "meta").is_meta
    found = meta.read_on(model, f"{name}.weight", torch.device("cpu"), torch.float32)
    assert torch.equal(found, model.format.read(name).float())
    if torch.cuda.is_available():
        there = meta.read_on(model, f"{name}.weight", torch.device("cuda"), torch.float32)
        assert torch.equal(there.cpu(), found)
