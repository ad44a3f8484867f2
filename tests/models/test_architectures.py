"""Names and shapes of every family, and checkpoints whose tensors leave the outer module's name out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_damage import edit_tensors
from safetensors.torch import load_file
from tiny_models import BLOCKS, FAMILIES, VOCABULARY
from transformers import AutoModelForCausalLM

from compresskit.machine.device import Where
from compresskit.models.architectures import ARCHITECTURES
from compresskit.models.load import open_model
from compresskit.models.meta import build, read_plain, to_stored
from compresskit.walk.walk import Walk


@pytest.mark.parametrize("family", FAMILIES)
def test_every_stored_tensor_has_a_plain_name_and_comes_back_bit_equal(family: str, tiny: dict[str, Path]) -> None:
    model = open_model(tiny[family])
    names = [name for name, _ in build(model).named_parameters() if model.has(name)]
    assert {model.stored_name(name) for name in names} == set(model.checkpoint.tensors)
    stored = load_file(tiny[family] / "model.safetensors")
    for name in names:
        assert torch.equal(to_stored(model, name, read_plain(model, name)), stored[model.stored_name(name)])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_block_has_its_feed_forward_networks(family: str, tiny: dict[str, Path]) -> None:
    model = open_model(tiny[family])
    network = build(model)
    for index in range(BLOCKS):
        for group in model.ffn_groups(index):
            assert len(group.members) == (4 if "moe_intermediate" in group.width_key or family == "mixtral" else 1)
            for ffn in group.members:
                assert network.get_submodule(ffn.out_projection).weight.shape == (model.hidden_size, group.width)
                for name in ffn.in_projections:
                    assert network.get_submodule(name).weight.shape == (group.width * group.fused, model.hidden_size)


@pytest.mark.parametrize(("family", "prefix"), [("gpt2", "transformer."), ("opt", "model.")])
def test_files_of_the_hub_that_leave_out_the_outer_name_are_read(
    family: str, prefix: str, tiny: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny[family], tmp_path / "model"))

    def shorten(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix(prefix)] = tensors.pop(name)

    edit_tensors(folder, shorten)
    tokens = torch.randint(3, VOCABULARY, (2, 20))
    walk = Walk(open_model(folder), tokens, Where(torch.device("cpu"), torch.float32))
    for _ in walk:
        pass
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tiny[family], dtype=torch.float32).eval()(tokens).logits
    assert (torch.cat([logits for _, _, logits in walk.logits()]) - expected).abs().max() < 1e-4


def test_the_table_covers_every_family_of_the_tests() -> None:
    assert set(FAMILIES) == set(ARCHITECTURES)


def test_a_config_without_n_inner_means_four_times_the_hidden_size(tiny: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny["gpt2"], tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    del config["n_inner"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(Exception, match=r"expected \[32, 128\]"):
        open_model(folder)
