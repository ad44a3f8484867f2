"""Model types of every kind of structure through all stages, compared with what stock transformers makes of each result.

End to end on tiny random checkpoints. benchmarks/family_table.py runs all types.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import HELD_OUT, auto_class, build
from family_stages import STAGES, WORKS, cells, stock, tokens, write_tokenizer
from safetensors.torch import load_file
from small_runs import options, prune, slow_but
from torch import Tensor
from transformers import AutoModelForImageTextToText

from compresskit.models.load import open_model
from compresskit.pruning.magnitude import Magnitude
from compresskit.quantization.rtn import RTN
from compresskit.quantization.run import quantize

pytestmark = pytest.mark.usefixtures("own_structures")

NO_RAGGED = {"ragged": "stock tools cannot load a width of its own for each block; pass --allocation uniform, or --layout padded"}
NO_KEY = dict.fromkeys(("uniform", "padded"), "no key of config.json states the width of")
NO_CHANNELS = dict.fromkeys(
    ("prune 0", "uniform", "padded", "ragged"), "has no feed-forward network whose channels can be removed"
)
CONVERTED = dict.fromkeys(
    ("rtn 8", "gptq 4", "eora"), "transformers converts model.layers.0.linear_attn.conv1d.weight on loading"
)
EXPECTED: dict[str, dict[str, str]] = {
    "qwen3_5_text": {},  # linear attention between blocks of attention
    "mamba": NO_CHANNELS,  # a state-space model
    "deepseek_v3": NO_RAGGED,  # latent attention, experts beside shared ones, after dense blocks
    "gpt_oss": NO_RAGGED,  # experts with biases in one transposed tensor, gate and up in turn
    "gemma3n_text": NO_KEY,  # several residual streams, keys and values of earlier blocks
    "gemma4": NO_RAGGED,  # images, keys and values of earlier blocks
    "glm4v": {},  # images, gate and up in one matrix
    "falcon": {},  # blocks that return tuples
    "bloom": NO_KEY,  # queries, keys and values in one matrix
    "lfm2": NO_KEY,  # convolutions; a width that is rounded
    "granitemoe": NO_RAGGED,  # experts in one tensor, under other names
    "qwen3_vl_moe": NO_RAGGED,  # images, experts in one tensor
    "olmo_hybrid": NO_RAGGED | CONVERTED,  # tensors that transformers takes apart
    "nemotron_h": NO_RAGGED,  # blocks of one kind of layer each, experts without a gate
}
"""What is refused, and a part of the reason; all other stages work."""


def outcomes(model_type: str, text: Path, folder: Path, stages: tuple[str, ...] = STAGES) -> dict[str, str]:
    return cells(model_type, build(model_type, folder / "source"), folder / "work", text, stages)


def disagree(found: dict[str, str], expected: dict[str, str]) -> dict[str, str]:
    """The stages whose outcome is another one."""
    return {
        stage: cell
        for stage, cell in found.items()
        if (cell != WORKS if stage not in expected else not (cell.startswith("refused: ") and expected[stage] in cell))
    }


@pytest.mark.parametrize("model_type", slow_but("bloom", "granitemoe", "olmo_hybrid", of=EXPECTED))
def test_every_stage_works_or_is_refused_with_the_reason(model_type: str, text_file: Path, tmp_path: Path) -> None:
    stages = STAGES if model_type in ("bloom", "granitemoe", "olmo_hybrid") else ("walk", "prune 0", "padded", "gptq 4")
    found = outcomes(model_type, text_file, tmp_path, stages)
    assert tuple(found) == stages and disagree(found, EXPECTED[model_type]) == {}


WALKED = tuple(model_type for model_type in HELD_OUT if model_type != "jetmoe")


@pytest.mark.parametrize("model_type", slow_but("biogpt", "longcat_flash", of=WALKED))
def test_types_that_the_derivation_was_not_made_with_are_walked_as_stock_does(
    model_type: str, text_file: Path, tmp_path: Path
) -> None:
    found = outcomes(model_type, text_file, tmp_path, ("walk", "prune 0"))
    assert disagree(found, NO_CHANNELS if model_type == "falcon_mamba" else {}) == {}


def test_a_type_whose_network_needs_values_is_refused_in_every_stage(text_file: Path, tmp_path: Path) -> None:
    found = outcomes("jetmoe", text_file, tmp_path)
    assert all("JetMoeForCausalLM cannot be traced" in cell and cell.startswith("refused: ") for cell in found.values())


Down = Callable[[Any, int, int, int], Tensor]
"""(network, block, network of the block, expert) -> its output weight, channels last, as a view."""
DOWN: dict[str, Down] = {
    "falcon": lambda network, block, _, __: network.transformer.h[block].mlp.dense_4h_to_h.weight,
    "gpt_oss": lambda network, block, _, expert: network.model.layers[block].mlp.experts.down_proj[expert].T,
    "deepseek_v3": lambda network, block, number, expert: (
        network.model.layers[0].mlp.down_proj.weight
        if block == 0
        else network.model.layers[block].mlp.experts.down_proj[expert]
        if number == 0
        else network.model.layers[block].mlp.shared_experts.down_proj.weight
    ),
    "gemma3": lambda network, block, _, __: network.model.language_model.layers[block].mlp.down_proj.weight,
    "qwen3_vl": lambda network, block, _, __: network.model.language_model.layers[block].mlp.down_proj.weight,
}


def zeroed(model_type: str, source: Path, manifest: Path) -> Any:
    """The stock original, whose output weights do not read the channels that a pruning removed."""
    network = auto_class(model_type).from_pretrained(source, dtype=torch.float32).eval()
    for block, facts in enumerate(json.loads(manifest.read_text())["facts"]["blocks"]):
        for number, masks in enumerate(facts["kept_channels"]):
            for expert, mask in enumerate(masks):
                bits = f"{int(mask, 16):0{4 * len(mask)}b}"
                weight = DOWN[model_type](network, block, number, expert)
                assert len(bits) == weight.shape[1]
                removed = [channel for channel, bit in enumerate(bits) if bit == "0"]
                assert len(removed) == len(bits) // 4
                weight.data[:, removed] = 0
    return network


@pytest.mark.parametrize("model_type", ["falcon", "gpt_oss", "deepseek_v3"])
def test_a_pruned_model_is_the_original_without_the_channels_that_its_manifest_names(
    model_type: str, text_file: Path, tmp_path: Path
) -> None:
    source, out = build(model_type, tmp_path / "source"), tmp_path / "out"
    write_tokenizer(source)
    prune(source, out, text_file, Magnitude(sparsity=0.25, refit=False, round_to=8))
    found = stock(model_type, out)
    with torch.no_grad():
        expected = zeroed(model_type, source, out / "compresskit.json")(input_ids=tokens(), use_cache=False).logits
    assert (found - expected).abs().max() < 1e-4 * expected.std()
    assert (found - stock(model_type, source)).abs().max() > 0.01 * expected.std()


def picture(model_type: str) -> dict[str, Tensor]:
    """Twelve tokens of which some stand for an image, and the image as the stock model takes it."""
    generator, words = torch.Generator().manual_seed(3), tokens(1)
    if model_type == "gemma3":  # 28 x 28 pixels are four tokens
        words[:, 3:7] = 122
        pixels = torch.randn(1, 3, 28, 28, generator=generator)
        return {"input_ids": words, "pixel_values": pixels, "token_type_ids": (words == 122).long()}
    words[:, 3:5] = 120  # 2 x 4 patches of two frames of 14 x 14 pixels of three colours, four of them a token
    return {
        "input_ids": words,
        "pixel_values": torch.randn(8, 3 * 2 * 14 * 14, generator=generator),
        "image_grid_thw": torch.tensor([[1, 2, 4]]),
        "mm_token_type_ids": (words == 120).long(),
    }


def with_image(model_type: str, network: Any, **changes: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = network(**picture(model_type) | changes, use_cache=False).logits
    return logits


def loaded(folder: Path) -> Any:
    network, info = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"] and not info["unexpected_keys"]
    return network.eval()


@pytest.mark.parametrize("model_type", ["gemma3", "qwen3_vl"])
def test_a_model_that_sees_sees_the_same_after_its_text_model_is_compressed(
    model_type: str, text_file: Path, tmp_path: Path
) -> None:
    source, narrow, low = build(model_type, tmp_path / "source"), tmp_path / "narrow", tmp_path / "low"
    write_tokenizer(source)
    original, expected = loaded(source), with_image(model_type, loaded(source))
    pixels = picture(model_type)["pixel_values"]
    assert (with_image(model_type, original, pixel_values=pixels + 1) - expected).abs().max() > 0.01 * expected.std()

    prune(source, narrow, text_file, Magnitude(sparsity=0.25, refit=False, round_to=8))
    removed = with_image(model_type, zeroed(model_type, source, narrow / "compresskit.json"))
    assert (with_image(model_type, loaded(narrow)) - removed).abs().max() < 1e-4 * expected.std()
    quantize(RTN(bits=8), str(source), low, options(text_file))
    assert (with_image(model_type, loaded(low)) - expected).abs().max() < 0.1 * expected.std()

    model = open_model(source)
    before = load_file(source / "model.safetensors")
    towers = {name for name in before if "vis" in name or "projector" in name}
    assert len(towers) > 10 and not any(model.stored_block_of(name) is not None for name in towers)
    for out in (narrow, low):
        after = load_file(out / "model.safetensors")
        assert towers <= after.keys()
        assert all(after[name].dtype == before[name].dtype and torch.equal(after[name], before[name]) for name in towers)
    config = json.loads((narrow / "config.json").read_text())
    assert config["text_config"]["intermediate_size"] == 96
    assert config["vision_config"] == json.loads((source / "config.json").read_text())["vision_config"]
