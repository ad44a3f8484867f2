"""models/network.py: the skeleton is stock transformers' own network: its class, its shapes, its buffers. Oracle.

What generates no text is refused; code beside a checkpoint runs only where that is allowed.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_damage import edit_config
from families import SAMPLE, auto_class, build, config_of
from small_runs import slow_but
from transformers import AutoConfig, AutoModelForCausalLM

from compresskit.checkpoint.reader import open_checkpoint
from compresskit.errors import CheckpointError, UnsupportedArchitecture
from compresskit.models.layouts import configuration
from compresskit.models.load import open_model
from compresskit.models.network import LARGEST_BUFFER, build_network, check_decoder, configuration_of

FILE = Path("config.json")
QUICK = ("falcon_h1", "gemma", "gemma3", "minimax")
"""Buffers that scale the multipliers of a mixer, the embeddings, those of a text model beside a tower; slopes of attention."""
ENCODER_DECODERS = ("t5", "bart", "mbart", "pegasus", "whisper")
ENCODERS = ("bert", "roberta", "electra", "xlm-roberta", "camembert")
SPEECHLESS = ("vit", "clip", "siglip", "wav2vec2", "distilbert", "dinov2")


@pytest.mark.parametrize("model_type", slow_but(*QUICK, of=dict.fromkeys((*QUICK, *SAMPLE))))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_skeleton_is_the_loaded_network_without_its_weights(model_type: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = build(model_type, tmp_path / "model")
    stock = auto_class(model_type).from_pretrained(folder, dtype=dtype).eval()
    network = build_network(configuration_of(open_checkpoint(folder)), dtype=dtype)
    assert type(network) is type(stock) and not network.training
    all_named = (dict(made.named_parameters(remove_duplicate=False)) for made in (network, stock))
    shapes, expected = ({name: each.shape for name, each in named.items()} for named in all_named)
    assert shapes == expected and all(parameter.is_meta for parameter in network.parameters())
    buffers, known = dict(network.named_buffers()), dict(stock.named_buffers())
    assert buffers.keys() == known.keys()
    persistent = set(stock.state_dict())
    for name, buffer in known.items():
        if name not in persistent:
            assert buffers[name].dtype == buffer.dtype and torch.equal(buffers[name], buffer), name


def test_large_tensors_are_made_without_memory() -> None:
    size = 1 + LARGEST_BUFFER // 64
    config = AutoConfig.for_model("llama", hidden_size=64, intermediate_size=size, num_hidden_layers=1, vocab_size=size)
    network = build_network(config)
    assert all(parameter.is_meta for parameter in network.parameters())
    made = torch.empty(3), torch.zeros(LARGEST_BUFFER // 8)  # what is made elsewhere is not touched
    assert not any(each.is_meta for each in made)


def test_the_class_that_a_configuration_names_is_built() -> None:
    config = config_of("gemma3")
    assert type(build_network(config)).__name__ == "Gemma3ForConditionalGeneration"
    text = config_of("gemma3_text")
    text.architectures = ["Gemma3ForCausalLM"]
    assert type(build_network(text)).__name__ == "Gemma3ForCausalLM"
    text.architectures = ["Gemma3ForConditionalGeneration"]  # takes another configuration
    assert type(build_network(text)).__name__ == "Gemma3ForCausalLM"
    text.architectures = ["os"]
    assert type(build_network(text)).__name__ == "Gemma3ForCausalLM"


@pytest.mark.parametrize("model_type", ENCODER_DECODERS)
def test_an_encoder_decoder_is_refused(model_type: str) -> None:
    with pytest.raises(UnsupportedArchitecture, match=rf"config\.json: {model_type} is an encoder-decoder; only decoders"):
        check_decoder(AutoConfig.for_model(model_type), FILE)


@pytest.mark.parametrize("model_type", ENCODERS)
def test_an_encoder_is_refused_unless_it_is_made_a_decoder(model_type: str) -> None:
    with pytest.raises(UnsupportedArchitecture, match=rf"config\.json: {model_type} is an encoder \(is_decoder is false\)"):
        check_decoder(AutoConfig.for_model(model_type), FILE)
    check_decoder(AutoConfig.for_model(model_type, is_decoder=True), FILE)


@pytest.mark.parametrize("model_type", SPEECHLESS)
def test_what_generates_no_text_is_refused(model_type: str) -> None:
    with pytest.raises(UnsupportedArchitecture, match=rf"config\.json: {model_type} generates no text in transformers"):
        check_decoder(AutoConfig.for_model(model_type), FILE)


@pytest.mark.parametrize("model_type", ["llama", "gemma3", "mamba", "llava", "gpt_neox"])
def test_a_decoder_is_taken(model_type: str) -> None:
    check_decoder(config_of(model_type), FILE)


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class Own(LlamaConfig):
    model_type = "own"
    own = 3

class OwnModel(LlamaForCausalLM):
    config_class = Own
"""


def with_code(folder: Path, model_type: str, code: str = OWN_CODE) -> Path:
    (folder / "own_code.py").write_text(code)
    names = {"AutoConfig": "own_code.Own", "AutoModelForCausalLM": "own_code.OwnModel"}
    edit_config(folder, auto_map=names, model_type=model_type, architectures=["OwnModel"])
    return folder


@pytest.mark.parametrize("model_type", ["own", "llama"])
def test_the_folder_s_own_code_is_used_where_that_is_allowed(model_type: str, model: Path) -> None:
    checkpoint = open_checkpoint(with_code(model, model_type))
    config = configuration_of(checkpoint, trust_remote_code=True)
    assert type(config).__name__ == "Own" and config.own == 3
    assert type(build_network(config, trust_remote_code=True)).__name__ == "OwnModel"


def test_the_folder_s_own_code_is_left_alone_otherwise(model: Path) -> None:
    checkpoint = open_checkpoint(with_code(model, "llama", "raise SystemExit('foreign code ran')"))
    config = configuration_of(checkpoint)
    assert type(config).__name__ == "LlamaConfig" and not hasattr(config, "auto_map")
    assert type(build_network(config)).__name__ == "LlamaForCausalLM"


def test_a_type_of_the_folder_s_own_is_refused_without_its_code(model: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"{model}/config\.json: transformers does not take it"):
        configuration_of(open_checkpoint(with_code(model, "own")))


def test_a_configuration_that_contradicts_itself_is_named_by_its_folder(model: Path) -> None:
    edit_config(model, hidden_size="many")
    with pytest.raises(CheckpointError) as caught:
        configuration_of(open_checkpoint(model))
    assert str(caught.value).startswith(f"{model}/config.json: ") and "\n" not in str(caught.value)
    assert str(caught.value).count("config.json") == 1


def test_low_bits_are_no_part_of_the_network_s_configuration(model: Path) -> None:
    edit_config(model, quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 32})
    assert not hasattr(configuration_of(open_checkpoint(model)), "quantization_config")


def test_a_ragged_checkpoint_is_described_as_its_plain_family(tiny: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny["qwen2"], tmp_path / "model"))
    config, _ = configuration(open_model(folder), [[96], [96], [64]])
    (folder / "config.json").write_text(json.dumps(config))
    made: Any = configuration_of(open_checkpoint(folder))
    assert type(made).__name__ == "Qwen2Config" and not hasattr(made, "block_configs") and made.num_hidden_layers == 3
    assert type(build_network(made)) is type(AutoModelForCausalLM.from_config(made))
