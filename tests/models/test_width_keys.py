"""models/width_keys.py: the key of config.json that states a width is the one whose change changes it alone.

Oracle: the configuration classes' own documentation. Property: the key, changed, gives stock networks of the other width.
"""

from __future__ import annotations

from typing import Any

import pytest
from families import SAMPLE, config_of
from planned_models import planned
from small_runs import slow_but
from torch import nn
from transformers import AutoConfig, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from compresskit.models.architectures import Architecture
from compresskit.models.network import build_network
from compresskit.models.structure import derive

Key = tuple[str, int]
NONE: Key = ("", 1)
KEYS: dict[str, list[Key]] = {
    "llama": [("intermediate_size", 1)],
    "phi3": [("intermediate_size", 1)],
    "opt": [("ffn_dim", 1)],
    "gpt2": [("n_inner", 1)],
    "dbrx": [],
    "gemma3": [("text_config.intermediate_size", 1)],
    "gemma3n_text": [NONE],
    "falcon": [("ffn_hidden_size", 1)],
    "bloom": [NONE],
    "mamba": [],
    "lfm2": [NONE],
    "mixtral": [("intermediate_size", 1)],
    "qwen2_moe": [("intermediate_size", 1), ("moe_intermediate_size", 1), ("shared_expert_intermediate_size", 1)],
    "deepseek_v3": [("intermediate_size", 1), ("moe_intermediate_size", 1), ("moe_intermediate_size", 1)],
    "granitemoeshared": [("intermediate_size", 1), ("shared_intermediate_size", 1)],
    "granitemoehybrid": [("intermediate_size", 1), ("shared_intermediate_size", 1)],
    "qwen3_vl_moe": [("text_config.intermediate_size", 1), ("text_config.moe_intermediate_size", 1)],
    "longcat_flash": [("ffn_hidden_size", 1)],
    "nemotron_h": [("intermediate_size", 1), ("moe_intermediate_size", 1), ("moe_shared_expert_intermediate_size", 1)],
}
"""The keys of all kinds of feed-forward network of a type, once each."""
QUICK = ("llama", "gpt2", "gemma3", "bloom", "deepseek_v3", "lfm2")


def keys_of(found: Architecture) -> set[Key]:
    return {(ffn.width_key, ffn.multiple) for kind in found.kinds for ffn in kind.ffns}


@pytest.mark.parametrize("model_type", slow_but(*QUICK, of=KEYS))
def test_the_key_of_a_width_is_found(model_type: str) -> None:
    assert keys_of(derive(planned(config_of(model_type)))) == set(KEYS[model_type])


def changed(config: PreTrainedConfig, key: str, value: int) -> PreTrainedConfig:
    values = config.to_dict()
    inner, *path = [values], *key.split(".")
    for part in path[:-1]:
        inner.append(inner[-1][part])
    inner[-1][path[-1]] = value
    made = type(config).from_dict(values)
    made.architectures = config.architectures
    return made


def width(network: nn.Module, found: Architecture, kind: int, place: int) -> int:
    """The inputs of an output linear in a stock network, whose experts are of three dimensions."""
    index = found.kind_of.index(kind)
    path = f"{found.blocks}.{index}.{found.kinds[kind].ffns[place].out_projection}"
    head, expert, leaf = path.partition(".{expert}.")
    module: Any = network.get_submodule(head)
    if expert:
        return int(getattr(module, leaf).shape[1 if module.is_transposed else 2])
    return int(module.weight.shape[0 if isinstance(module, Conv1D) else 1])


@pytest.mark.parametrize("model_type", slow_but("llama", "gpt2", "gemma3", of=SAMPLE))
def test_a_changed_key_changes_the_widths_that_it_states_and_no_others(model_type: str) -> None:
    if model_type == "llama4":
        pytest.skip("its stock network does not run")
    config = config_of(model_type)
    found = derive(planned(config))
    before = build_network(config)
    for key, value in dict(found.widths).items():
        after = build_network(changed(config, key, 3 * value))
        for number, kind in enumerate(found.kinds):
            for place, ffn in enumerate(kind.ffns):
                new, old = (width(network, found, number, place) for network in (after, before))
                assert new == (3 * old if ffn.width_key == key else old), (key, ffn)
                assert ffn.width_key != key or old == value * ffn.multiple


def test_shared_experts_have_their_number_times_the_width_of_one() -> None:
    config = config_of("deepseek_v3")
    config.n_shared_experts = 2
    found = derive(planned(config))
    shared = [ffn for kind in found.kinds for ffn in kind.ffns if "shared_experts" in ffn.out_projection]
    assert {(ffn.width_key, ffn.multiple) for ffn in shared} == {("moe_intermediate_size", 2)}
    assert dict(found.widths) == {"moe_intermediate_size": 64, "intermediate_size": 128}


@pytest.mark.parametrize("size", [64, 128, 256])
def test_equal_numbers_of_other_meanings_are_told_apart(size: int) -> None:
    """The width, the hidden size, the vocabulary, the positions and the heads' number of inputs are all the same."""
    sizes = dict.fromkeys(("hidden_size", "intermediate_size", "vocab_size", "max_position_embeddings"), size)
    config = AutoConfig.for_model("llama", **sizes, num_hidden_layers=2, num_attention_heads=4, head_dim=size // 4)
    assert keys_of(derive(planned(config))) == {("intermediate_size", 1)}


@pytest.mark.parametrize(("model_type", "multiple"), [("gpt2", 4), ("gptj", 4), ("codegen", 4)])
def test_a_width_that_a_configuration_leaves_out_has_its_key(model_type: str, multiple: int) -> None:
    config = config_of(model_type)
    config.n_inner = None
    found = derive(planned(config))
    assert keys_of(found) == {("n_inner", 1)} and dict(found.widths) == {"n_inner": multiple * config.n_embd}


def test_a_key_that_two_kinds_of_networks_share_is_that_of_both() -> None:
    found = derive(planned(config_of("deepseek_v3")))
    experts = [ffn for kind in found.kinds for ffn in kind.ffns if "experts" in ffn.out_projection]
    assert len(experts) == 2 and {ffn.width_key for ffn in experts} == {"moe_intermediate_size"}
