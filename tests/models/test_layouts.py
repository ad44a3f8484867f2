"""models/layouts.py: every layout loads with stock transformers and gives the logits of the model in memory. End to end.

Nothing that a source brings becomes code in OUT: property.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from small_runs import options, prune, slow_but
from stock_tools import stock_logits, tokens, walked_logits
from tiny_models import FAMILIES, make_model
from transformers import AutoModelForCausalLM

from compresskit.errors import RequestError, UnsupportedArchitecture
from compresskit.models.architectures import ARCHITECTURES
from compresskit.models.layouts import (
    CLASSES,
    CONFIGURATION_FILE,
    MODELING_FILE,
    can_be_ragged,
    class_names,
    configuration,
    generated_files,
    own_config,
    own_files,
)
from compresskit.models.load import open_model
from compresskit.pruning.cfsp import CFSP
from compresskit.pruning.run import prune as prune_stage

RAGGED_FAMILIES = tuple(family for family in FAMILIES if can_be_ragged(ARCHITECTURES[family]))


@pytest.mark.parametrize("family", slow_but("llama", "gpt2", "mixtral", "phi3", of=FAMILIES))
def test_uniform_widths_give_a_plain_checkpoint(family: str, tiny: dict[str, Path], text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = prune(tiny[family], out, text_file, CFSP(sparsity=0.25, allocation="uniform", round_to=8))
    assert result["layout"] == "uniform"
    stock = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    with torch.no_grad():
        assert (stock(tokens()).logits - walked_logits(out)).abs().max() < 1e-4
    before, after = json.loads((tiny[family] / "config.json").read_text()), json.loads((out / "config.json").read_text())
    assert before.keys() == after.keys()
    assert result["parameters_after"] < result["parameters_before"]


@pytest.mark.parametrize("family", slow_but("llama", "gpt2", "mixtral", "phi3", of=FAMILIES))
def test_padded_widths_compute_what_the_narrow_ones_do(
    family: str, tiny: dict[str, Path], text_file: Path, ragged: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = prune(tiny[family], out, text_file, CFSP(sparsity=0.3, allocation="global", layout="padded", round_to=4))
    stock = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    with torch.no_grad():
        padded = stock(tokens()).logits
    assert (padded - walked_logits(out)).abs().max() < 1e-4
    assert result["layout"] in ("padded", "uniform")
    if family in RAGGED_FAMILIES:
        assert (padded - walked_logits(ragged[family])).abs().max() < 1e-4


@pytest.fixture(scope="module")
def ragged(tiny: dict[str, Path], text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Ragged checkpoints by family, made when first asked for."""
    root = tmp_path_factory.mktemp("ragged")

    class Models(dict[str, Path]):
        def __missing__(self, family: str) -> Path:
            result = prune(tiny[family], root / family, text_file, CFSP(sparsity=0.3, allocation="global", round_to=4))
            assert result["layout"] == "ragged"
            self[family] = root / family
            return self[family]

    return Models()


@pytest.mark.parametrize("family", RAGGED_FAMILIES)
def test_ragged_widths_load_where_compresskit_cannot_be_imported(family: str, ragged: dict[str, Path], tmp_path: Path) -> None:
    [logits] = stock_logits([ragged[family]], tmp_path)
    assert (logits - walked_logits(ragged[family])).abs().max() < 1e-4


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "gpt_neox"])
def test_families_that_stock_tools_convert_refuse_the_ragged_layout_before_any_work(
    family: str, tiny: dict[str, Path], text_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedArchitecture, match="--allocation uniform, or --layout padded"):
        prune(tiny[family], tmp_path / "out", text_file, CFSP(sparsity=0.3))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("layout", ["ragged", "padded"])
def test_saving_a_pruned_checkpoint_again_gives_the_same_bytes(
    layout: str, tiny: dict[str, Path], text_file: Path, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    method = CFSP.model_validate({"sparsity": 0.3, "allocation": "global", "layout": layout, "round_to": 4})
    prune(tiny["llama"], first, text_file, method)
    prune(first, second, text_file, CFSP(sparsity=0, layout="ragged"))
    for name in ("model.safetensors", "config.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


@pytest.mark.parametrize("family", CLASSES)
def test_the_names_of_classes_are_transformers_own(family: str) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

    tables = (CONFIG_MAPPING_NAMES, MODEL_MAPPING_NAMES, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert tuple(class_names(family, ARCHITECTURES[family]).values()) == tuple(table[family] for table in tables)


def test_every_family_with_a_ragged_layout_has_names_of_classes() -> None:
    assert set(CLASSES) == set(RAGGED_FAMILIES)


def tampered(folder: Path) -> None:
    """Code and configuration of a ragged checkpoint as a stranger would like them."""
    for name in (MODELING_FILE, CONFIGURATION_FILE):
        (folder / name).write_text((folder / name).read_text() + "\nraise SystemExit('foreign code ran')\n")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = dict.fromkeys(config["auto_map"], "who/what--module.Class") | {"AutoTokenizer": "who/what--module.T"}
    config |= {"architectures": ["Evil"], "attn_implementation": "who/what", "rope": {"_attn_implementation": "who/what"}}
    (folder / "config.json").write_text(json.dumps(config))


def test_code_of_a_ragged_source_does_not_spread(ragged: dict[str, Path], text_file: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(ragged["llama"], tmp_path / "source"))
    tampered(source)
    prune(source, tmp_path / "out", text_file, CFSP(sparsity=0, layout="ragged"))
    before = json.loads((ragged["llama"] / "config.json").read_text())
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == before | {"rope": {}}
    for name in (MODELING_FILE, CONFIGURATION_FILE):
        assert (tmp_path / "out" / name).read_bytes() == (ragged["llama"] / name).read_bytes()


def test_generated_files_are_generated_again_and_not_read(ragged: dict[str, Path], tmp_path: Path) -> None:
    source = Path(shutil.copytree(ragged["qwen2"], tmp_path / "source"))
    expected = own_files(open_model(source))
    assert expected == {path.name: path.read_text() for path in source.glob("*.py")}
    tampered(source)
    assert own_files(open_model(source)) == expected
    for path in source.glob("*.py"):
        path.unlink()
    assert own_files(open_model(source)) == expected


def test_a_configuration_keeps_what_is_its_own(ragged: dict[str, Path], tiny: dict[str, Path], tmp_path: Path) -> None:
    for folder in (ragged["llama"], tiny["qwen3_moe"]):
        config = json.loads((folder / "config.json").read_text())
        assert list(own_config(config, open_model(folder).architecture).items()) == list(config.items())
    source = Path(shutil.copytree(ragged["llama"], tmp_path / "source"))
    tampered(source)
    found = own_config(json.loads((source / "config.json").read_text()), ARCHITECTURES["llama"])
    assert found == json.loads((ragged["llama"] / "config.json").read_text()) | {"rope": {}}


@pytest.mark.parametrize("value", ['"""\nraise SystemExit\n"""', "{base_class}", "x' + exit() + '"])
def test_no_text_of_a_configuration_is_in_the_generated_files(value: str, model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    names = ("architectures", "hidden_act", "torch_dtype", "base_class", "family", "blocks", "_name_or_path", "tokenizer_class")
    (model / "config.json").write_text(json.dumps(config | dict.fromkeys(names, value) | {"block_configs": [{value: value}]}))
    opened = open_model(model)
    expected, _, _ = generated_files("llama", opened.architecture)
    assert configuration(opened, [[96], [96], [64]])[1] == expected


def test_trusted_code_goes_into_out_and_loads_there(tmp_path: Path, text_file: Path) -> None:
    source = make_model(tmp_path / "source", "llama")
    config = json.loads((source / "config.json").read_text())
    names = {"AutoConfig": "configuration_mine.MineConfig", "AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}
    (source / "config.json").write_text(
        json.dumps(config | {"model_type": "mine", "architectures": ["MineForCausalLM"], "auto_map": names})
    )
    (source / "configuration_mine.py").write_text(
        "from transformers import LlamaConfig\n\n\nclass MineConfig(LlamaConfig):\n    model_type = 'mine'\n"
    )
    (source / "modeling_mine.py").write_text(
        "from transformers import LlamaForCausalLM\n\nfrom .configuration_mine import MineConfig\n\n\n"
        "class MineForCausalLM(LlamaForCausalLM):\n    config_class = MineConfig\n"
    )
    with pytest.raises(RequestError, match="trust-remote-code"):
        prune(source, tmp_path / "untrusted", text_file, CFSP(sparsity=0.25, allocation="uniform", round_to=8))
    trusted = options(text_file).model_copy(update={"trust_remote_code": True})
    prune_stage(CFSP(sparsity=0.25, allocation="uniform", round_to=8), str(source), tmp_path / "out", trusted)
    for name in ("configuration_mine.py", "modeling_mine.py"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    network, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, trust_remote_code=True, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert type(network).__name__ == "MineForCausalLM"
    model = open_model(tmp_path / "out", trust_remote_code=True)
    assert not can_be_ragged(model.architecture)
