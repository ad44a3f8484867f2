"""models/load.py: names without the outer module's are read, and numbers that no model has are refused. Oracle.

A type that transformers has is opened with transformers' own class, whatever code lies beside it; forms in which real
checkpoints of a family are stored give what stock transformers computes.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_damage import edit_config, edit_tensors
from families import build
from family_stages import stock, walked, write_tokenizer
from safetensors.torch import load_file
from small_runs import prune
from stock_tools import tokens as two_windows
from stock_tools import walked_logits
from tiny_models import VOCABULARY
from transformers import AutoModelForCausalLM

from compresskit.errors import CheckpointError, RequestError
from compresskit.machine.device import Where
from compresskit.models.load import open_model
from compresskit.pruning.cfsp import CFSP
from compresskit.pruning.magnitude import Magnitude
from compresskit.walk.walk import Walk

pytestmark = pytest.mark.usefixtures("own_structures")


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


def test_a_config_without_n_inner_means_four_times_the_hidden_size(tiny: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny["gpt2"], tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    del config["n_inner"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(Exception, match=r"expected \[32, 128\]"):
        open_model(folder)


@pytest.mark.parametrize("value", [10**12, True, "4", 0, -1, 3.0, None, [3]])
def test_a_number_of_blocks_that_is_none_is_refused(value: object, tiny: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny["llama"], tmp_path / "model"))
    edit_config(folder, num_hidden_layers=value)
    with pytest.raises(CheckpointError, match=r"num_hidden_layers is .*, expected a whole number from 1 to"):
        open_model(folder)


@pytest.mark.parametrize("trust_remote_code", [False, True])
def test_a_type_that_transformers_lacks_needs_its_code(trust_remote_code: bool, model: Path) -> None:
    edit_config(model, model_type="own", auto_map={"AutoConfig": "own_code.Own", "AutoModelForCausalLM": "own_code.OwnModel"})
    (model / "own_code.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class Own(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = Own\n"
    )
    if not trust_remote_code:
        with pytest.raises(RequestError, match=r"config\.json: the model brings its own code \(auto_map\); read it, then pass"):
            open_model(model)
        return
    opened = open_model(model, trust_remote_code=True)
    assert (opened.family, opened.architecture.derived) == ("own", True)
    assert [group.width for index in range(3) for group in opened.ffn_groups(index)] == [96] * 3
    assert "auto_map" in opened.checkpoint.config


@pytest.mark.parametrize("family", ["phi3", "bloom"])
def test_a_type_that_transformers_has_is_opened_without_its_code_and_hands_none_on(
    family: str, tiny: dict[str, Path], text_file: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    if family == "bloom":  # which is no row of the table
        write_tokenizer(build(family, folder))
    else:
        shutil.copytree(tiny[family], folder)
    names = {"AutoConfig": "foreign.Config", "AutoModelForCausalLM": "foreign.Model"}
    edit_config(folder, auto_map=names)
    (folder / "foreign.py").write_text("raise SystemExit('foreign code ran')")
    opened = open_model(folder)
    assert opened.family == family and "auto_map" not in opened.checkpoint.config
    prune(folder, tmp_path / "out", text_file, CFSP(sparsity=0))
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert not (tmp_path / "out" / "foreign.py").exists()
    assert json.loads((folder / "config.json").read_text())["auto_map"] == names


def packed(source: Path, folder: Path) -> Path:
    """The checkpoint as stock transformers writes its own parameters: the experts of a block in one tensor."""
    shutil.copytree(source, folder)
    network = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    network.save_pretrained(folder, save_original_format=False)
    assert any(tensor.ndim == 3 for tensor in load_file(folder / "model.safetensors").values())
    return folder


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_experts_stored_in_one_tensor_are_those_stored_one_by_one(
    family: str, tiny: dict[str, Path], text_file: Path, tmp_path: Path
) -> None:
    folder = packed(tiny[family], tmp_path / "packed")
    one, other = open_model(tiny[family]), open_model(folder)
    assert (one.architecture.derived, other.architecture.derived) == (False, True)
    assert sorted(one.linears) == sorted(other.linears) and one.parameters == other.parameters
    assert [one.ffn_groups(index) for index in range(3)] == [other.ffn_groups(index) for index in range(3)]
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(two_windows()).logits
    assert (walked_logits(folder) - expected).abs().max() < 1e-4
    for source, name in ((tiny[family], "a"), (folder, "b")):
        prune(source, tmp_path / name, text_file, CFSP(sparsity=0.25, allocation="uniform", round_to=8))
    first, second = (AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32).state_dict() for name in "ab")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("gemma", True), ("qwen2", False)])
def test_a_head_that_no_file_stores_is_the_embedding_only_where_the_class_s_own_default_says_so(
    family: str, tied: bool, tiny: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny[family], tmp_path / "model"))
    edit_config(folder, tie_word_embeddings=...)

    def drop(tensors: dict[str, torch.Tensor]) -> None:
        tensors.pop("lm_head.weight", None)

    edit_tensors(folder, drop)
    model, where = open_model(folder), Where(torch.device("cpu"), torch.float32)
    if not tied:
        with pytest.raises(CheckpointError, match=rf"^{folder}: tensor lm_head\.weight is missing; .* tie_word_embeddings .*$"):
            Walk(model, two_windows(), where)
        return
    walk = Walk(model, two_windows(), where)
    assert sum(1 for _ in walk) == 3
    edit_config(folder, tie_word_embeddings=True)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(two_windows()).logits
    assert (torch.cat([logits for _, _, logits in walk.logits()]) - expected).abs().max() < 1e-4


EXTRA = "model.layers.3."


def with_prediction_block(folder: Path) -> dict[str, torch.Tensor]:
    """DeepSeek-V3's published files have a block after the last, which predicts further tokens; returns its tensors."""
    write_tokenizer(build("deepseek_v3", folder))
    last = {name: each for name, each in load_file(folder / "model.safetensors").items() if name.startswith("model.layers.2.")}
    extra = {EXTRA + name.removeprefix("model.layers.2."): tensor + 1 for name, tensor in last.items()}
    extra |= {f"{EXTRA}eh_proj.weight": torch.randn(64, 128), f"{EXTRA}enorm.weight": torch.randn(64)}
    extra[f"{EXTRA}shared_head.norm.weight"] = torch.randn(64).to(torch.bfloat16)
    edit_tensors(folder, lambda tensors: tensors.update(extra))
    return extra


def test_a_block_that_predicts_further_tokens_is_copied_as_it_is(text_file: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "model", tmp_path / "out"
    extra = with_prediction_block(folder)
    edit_config(folder, num_nextn_predict_layers=1)
    assert open_model(folder).block_count == 3
    assert torch.allclose(walked(folder), stock("deepseek_v3", folder), atol=1e-4)
    prune(folder, out, text_file, Magnitude(sparsity=0.25, allocation="uniform", round_to=8))
    found = load_file(out / "model.safetensors")
    assert found["model.layers.2.mlp.experts.0.up_proj.weight"].shape == (48, 64)
    for name, tensor in extra.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    assert json.loads((out / "config.json").read_text())["num_nextn_predict_layers"] == 1


@pytest.mark.parametrize("stated", [..., 0, None, "1"])
def test_a_block_that_the_configuration_does_not_count_is_refused(stated: object, tmp_path: Path) -> None:
    with_prediction_block(tmp_path / "model")
    edit_config(tmp_path / "model", num_nextn_predict_layers=stated)
    with pytest.raises(CheckpointError, match=r"num_hidden_layers is 3, the weights hold model\.layers\.3\."):
        open_model(tmp_path / "model")
