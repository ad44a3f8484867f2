"""models/structure.py, models/structure_cache.py: what is derived is what the table knows; the cache holds it; refusals.

Oracle: the table's rows, written by hand.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_damage import edit_config, edit_tensors
from families import build, config_of
from planned_models import planned
from safetensors.torch import save_file
from tiny_models import FAMILIES
from transformers import AutoConfig

from compresskit.checkpoint.reader import open_checkpoint
from compresskit.errors import CheckpointError, UnsupportedArchitecture
from compresskit.machine.memory import peak_memory_bytes, restart_peak
from compresskit.models import structure_cache
from compresskit.models.architectures import Architecture
from compresskit.models.layouts import can_be_ragged
from compresskit.models.load import open_model
from compresskit.models.meta import build as build_plain
from compresskit.models.model import Model
from compresskit.models.structure import derive
from compresskit.models.structure_cache import _from_json, derived

MOST_GROWTH = 500 << 20
"""Bytes; the weights of the models in these tests would take 90 GB and 1,300 GB."""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, of structures and all else."""
    monkeypatch.setenv("COMPRESSKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / structure_cache.CACHE


def both(family: str, tiny: dict[str, Path]) -> tuple[Model, Model]:
    """The model as the table describes it, and as it is derived."""
    row = open_model(tiny[family])
    assert not row.architecture.derived
    return row, replace(row, architecture=derive(open_checkpoint(tiny[family])), removed_prefix="")


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_derived_is_what_the_table_knows(family: str, tiny: dict[str, Path]) -> None:
    row, found = both(family, tiny)
    assert found.architecture.derived
    assert (found.hidden_size, found.block_count, found.vocabulary) == (row.hidden_size, row.block_count, row.vocabulary)
    for name in ("blocks", "embedding", "head", "transposed", "has_experts"):
        assert getattr(found.architecture, name) == getattr(row.architecture, name), name
    for index in range(row.block_count):
        # The order of groups of linears side by side is of no consequence; manifests count by that of the networks.
        positions = ([sorted(groups) for groups in model.linear_sequence(index)] for model in (found, row))
        assert next(positions) == next(positions)
        assert found.ffn_groups(index) == row.ffn_groups(index)
        structures = [model.architecture.block(index) for model in (found, row)]
        assert structures[0].mixer == structures[1].mixer and structures[0].runs and structures[0].tuple_length == 0
        assert found.mixer_positions(index) == row.mixer_positions(index)
        for group in row.ffn_groups(index):
            assert found.config_width(group.width_key) == row.config_width(group.width_key)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_has_the_name_that_the_table_gives_it(family: str, tiny: dict[str, Path]) -> None:
    row, found = both(family, tiny)
    names = [name for name, _ in build_plain(row).named_parameters(remove_duplicate=False)]
    assert {name: found.stored_name(name) for name in names} == {name: row.stored_name(name) for name in names}
    linears = [*row.linears, *(f"{name}.weight_packed" for name in row.linears)]
    assert {name: found.stored_name(name) for name in linears} == {name: row.stored_name(name) for name in linears}
    assert {name: found.linear_shape(name) for name in row.linears} == {name: row.linear_shape(name) for name in row.linears}
    stored = row.checkpoint.tensors
    assert {name: found.stored_block_of(name) for name in stored} == {name: row.stored_block_of(name) for name in stored}
    assert {found.stored_name(name) for name in names if found.has(name)} == set(stored)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_derived_can_be_stored_as_what_the_table_knows(family: str, tiny: dict[str, Path]) -> None:
    row, found = both(family, tiny)
    assert can_be_ragged(found.architecture) == can_be_ragged(row.architecture)
    assert found.architecture.converted == ()
    head, embedding = row.architecture.head, row.architecture.embedding
    assert head in found.architecture.dense_linears and embedding not in found.architecture.dense_linears
    assert not set(found.architecture.dense_linears) & set(row.linears)


@pytest.mark.parametrize("model_type", ["deepseek_v3", "gpt_oss", "gemma4", "olmo_hybrid"])
def test_a_structure_comes_back_from_json(model_type: str, tmp_path: Path) -> None:
    found = derive(open_checkpoint(build(model_type, tmp_path / "model")))
    assert _from_json(json.loads(json.dumps(asdict(found)))) == found


def test_a_structure_is_read_from_the_cache_the_second_time(
    tiny: dict[str, Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(tiny["llama"])
    first = derived(checkpoint)
    [file] = cache.iterdir()
    text = file.read_text()
    assert '"gate_proj"' not in text and "model.layers" in text
    file.write_text(text.replace("model.layers", "model.floors"))
    second = derived(checkpoint)
    assert first.blocks == "model.layers" and second.blocks == "model.floors"
    assert [file] == list(cache.iterdir())


DAMAGES = {
    "empty": "", "cut": '{"blocks": "model.layers", "kin', "of another form": "[1, 2]", "a text": '"model.layers"',
    "a number": "3", "null": "null", "without a key": '{"blocks": "model.layers"}', "with kinds of another form": '{"kinds": 3}',
    "no text": "\udcff\udcfe",
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_derived_again(damage: str, tiny: dict[str, Path], cache: Path) -> None:
    checkpoint = open_checkpoint(tiny["llama"])
    expected = derived(checkpoint)
    [file] = cache.iterdir()
    whole = file.read_bytes()
    file.write_bytes(DAMAGES[damage].encode(errors="surrogateescape"))
    assert derived(checkpoint) == expected
    assert file.read_bytes() == whole


def extra_keys(text: str) -> list[str]:
    """The file with a key too many, and with one too few, at each level."""
    whole = json.loads(text)
    changed: list[Any] = []
    for path in ((), ("sizes",), ("attention",), ("kinds", 0), ("kinds", 0, "ffns", 0)):
        for cut in (True, False):
            copy = json.loads(text)
            inner = copy
            for part in path:
                inner = inner[part]
            if cut:
                del inner[next(iter(inner))]
            else:
                inner["further"] = 1
            changed.append(copy)
    assert all(each != whole for each in changed)
    return [json.dumps(each) for each in changed]


def test_a_cache_of_another_version_s_form_is_derived_again(tiny: dict[str, Path], cache: Path) -> None:
    checkpoint = open_checkpoint(tiny["llama"])
    expected = derived(checkpoint)
    [file] = cache.iterdir()
    for text in extra_keys(file.read_text()):
        file.write_text(text)
        assert derived(checkpoint) == expected, text[:200]


def test_a_cache_that_cannot_be_written_is_none(tiny: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder would be")
    assert derived(open_checkpoint(tiny["llama"])).blocks == "model.layers"


def test_what_the_structure_depends_on_makes_another_key(
    model: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def files() -> int:
        return len(list(cache.iterdir()))

    derived(open_checkpoint(model))
    derived(open_checkpoint(Path(shutil.copytree(model, tmp_path / "elsewhere"))))
    assert files() == 1
    edit_tensors(model, lambda tensors: tensors.update({name: tensor + 1 for name, tensor in tensors.items()}))
    derived(open_checkpoint(model))
    assert files() == 1  # values are not looked at
    edit_config(model, rope_theta=5000.0)
    derived(open_checkpoint(model))
    assert files() == 2
    edit_tensors(model, lambda tensors: tensors.update({"model.layers.0.mlp.up_proj.bias": torch.zeros(96)}))
    derived(open_checkpoint(model))
    assert files() == 3
    edit_tensors(model, lambda tensors: tensors.update({"mask": torch.zeros(2, 3, 4)}))
    derived(open_checkpoint(model))
    edit_tensors(model, lambda tensors: tensors.update({"mask": torch.zeros(2, 4, 3)}))
    derived(open_checkpoint(model))
    assert files() == 5
    for name, value in (("VERSION", structure_cache.VERSION + 1), ("version", lambda package: "0.0")):
        monkeypatch.setattr(f"compresskit.models.structure_cache.{name}", value)
        before = files()
        derived(open_checkpoint(model))
        assert files() == before + 1


def test_nothing_is_kept_of_what_a_folder_s_own_code_says(tiny: dict[str, Path], cache: Path) -> None:
    checkpoint = open_checkpoint(tiny["llama"])
    derived(checkpoint, trust_remote_code=True)
    assert not cache.exists()
    derived(checkpoint)
    [file] = cache.iterdir()
    file.write_text(file.read_text().replace("model.layers", "model.floors"))
    assert derived(checkpoint, trust_remote_code=True).blocks == "model.layers"


def refused(config: dict[str, Any], folder: Path) -> str:
    """Why a checkpoint of this configuration is refused; of one tensor, because none is looked at."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"weight": torch.zeros(3)}, folder / "model.safetensors")
    with pytest.raises(UnsupportedArchitecture) as caught:
        open_model(folder)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
    return str(caught.value).replace(str(folder), "FOLDER")


@pytest.mark.parametrize(
    ("model_type", "said"),
    [
        ("t5", "FOLDER/config.json: t5 is an encoder-decoder; only decoders are compressed"),
        ("vit", "FOLDER/config.json: vit generates no text in transformers; point to a causal language model"),
        ("bert", "FOLDER/config.json: bert is an encoder (is_decoder is false); only decoders are compressed"),
        ("distilbert", "FOLDER/config.json: distilbert generates no text in transformers; point to a causal language model"),
        ("qwen3_5x", "has no model type 'qwen3_5x'; update it, or pass --trust-remote-code if the checkpoint brings its own"),
        ("qwen3_5x", "Did you mean 'qwen3_5'?"),
        ("jetmo", "Did you mean 'jetmoe'?"),
    ],
)
def test_what_is_no_decoder_of_transformers_is_refused(model_type: str, said: str, tmp_path: Path) -> None:
    assert said in refused({"model_type": model_type}, tmp_path / "model")


def test_a_network_that_needs_values_is_refused_by_its_name(tmp_path: Path) -> None:
    folder = build("jetmoe", tmp_path / "model")
    with pytest.raises(UnsupportedArchitecture, match=rf"{folder}/config\.json: JetMoeForCausalLM cannot be traced \(") as caught:
        open_model(folder)
    assert "\n" not in str(caught.value)


def test_a_configuration_that_makes_no_network_is_named(model: Path) -> None:
    edit_config(model, hidden_act="nothing")
    with pytest.raises(CheckpointError, match=rf"{model}/config\.json: makes no model \(") as caught:
        derive(open_checkpoint(model))
    assert "\n" not in str(caught.value)


def test_a_large_model_is_derived_without_its_memory() -> None:
    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 48, "vocab_size": 128_256}
    config = AutoConfig.for_model("llama", **sizes, num_attention_heads=64, num_key_value_heads=8, tie_word_embeddings=False)
    checkpoint = planned(config)
    restart_peak()
    before = peak_memory_bytes()
    found = derive(checkpoint)
    assert peak_memory_bytes() - before < MOST_GROWTH
    assert (found.sizes.hidden, found.sizes.blocks, found.sizes.vocabulary) == (8192, 48, 128_256)  # type: ignore[union-attr]
    assert found.kind_of == (0,) * 48 and dict(found.widths) == {"intermediate_size": 28672}
    model = Model(checkpoint, "llama", found)
    [group] = model.ffn_groups(47)
    assert group.width == 28672 and group.members[0].out_projection == "model.layers.47.mlp.down_proj"
    assert len(model.linears) == 48 * 7


@pytest.mark.slow
def test_a_large_mixture_of_experts_is_derived_without_its_memory() -> None:
    config = config_of("deepseek_v3")
    config.update({
        "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 61,
        "n_routed_experts": 256, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "first_k_dense_replace": 3,
    })  # fmt: skip
    checkpoint = planned(config)
    restart_peak()
    before = peak_memory_bytes()
    found = derive(checkpoint)
    # The C library keeps the memory of the routers, 7 MB in each block, which the networks make before it is given up.
    assert peak_memory_bytes() - before < 4 * MOST_GROWTH
    assert found.kind_of == (0,) * 3 + (1,) * 58 and found.sizes.experts == 256  # type: ignore[union-attr]
    assert [len(kind.ffns) for kind in found.kinds] == [1, 2]


def kinds(found: Architecture) -> list[tuple[str, ...]]:
    """Positions of every kind of block, written as one text each."""
    return [tuple(" ".join("+".join(group) for group in position) for position in kind.positions) for kind in found.kinds]


def test_blocks_of_several_kinds_are_told_apart(tmp_path: Path) -> None:
    found = derive(open_checkpoint(build("nemotron_h", tmp_path / "model")))
    assert found.kind_of == (0, 1, 2, 3)
    names = [[ffn.out_projection for ffn in kind.ffns] for kind in found.kinds]
    assert names == [[], ["mixer.experts.{expert}.down_proj", "mixer.shared_experts.down_proj"], [], ["mixer.down_proj"]]
    assert kinds(found)[2] == ("mixer.q_proj+mixer.k_proj+mixer.v_proj", "mixer.o_proj")


def test_what_stays_untouched_has_a_reason(tmp_path: Path) -> None:
    found = derive(open_checkpoint(build("gpt_oss", tmp_path / "model")))
    [kind] = {kind.untouched: kind for kind in found.kinds}.values()
    assert dict(kind.untouched)["mlp.router"] == "GptOssTopKRouter is no plain linear"
    mamba = derive(open_checkpoint(build("mamba", tmp_path / "mamba")))
    assert dict(mamba.kinds[0].untouched)["mixer.conv1d"] == "Conv1d is no plain linear"
