"""report/serving.py: what a person copies runs as written, whatever a file is called. Oracles: shlex, a shell, Python."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
from pathlib import Path

import pytest
from hostile_runs import HOSTILE, hostile_run
from hypothesis import given
from hypothesis import strategies as st
from small_runs import prune

from compresskit.pruning.cfsp import CFSP
from compresskit.report.serving import commands, shell

TRUST = {"trust_remote_code=True", "--trust-remote-code"}


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=20))
def test_a_shell_reads_one_word_and_it_is_no_flag(text: str) -> None:
    word = shell(text)
    assert word.isprintable()
    assert not word.startswith("-")


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
@pytest.mark.parametrize("text", [HOSTILE, "a/b", "-rf", "--trust-remote-code", "a b", "$HOME", "it's", "\\\n\t'", "é🙂\u202e"])
def test_bash_gives_the_text_back(text: str) -> None:
    found = subprocess.run(["bash", "-c", f"printf %s {shell(text)}"], capture_output=True, check=True).stdout.decode()
    assert found == (f"./{text}" if text.startswith("-") else text)


@pytest.mark.parametrize("adapter", [False, True])
def test_snippets_hold_hostile_names_as_texts(adapter: bool, tmp_path: Path) -> None:
    hostile_run(tmp_path / HOSTILE.replace("/", ""), adapter=adapter)
    found = commands(tmp_path / HOSTILE.replace("/", "") / "prune")
    (snippet,) = (text for title, text in found.items() if title.startswith("transformers"))
    texts = [node.value for node in ast.walk(ast.parse(snippet)) if isinstance(node, ast.Constant)]
    assert texts[0] == (HOSTILE if adapter else str(tmp_path / HOSTILE.replace("/", "") / "prune"))
    assert TRUST.isdisjoint((snippet + found["vLLM"]).replace(")", " ").split())
    assert "\n" not in found["vLLM"]


@pytest.fixture(scope="module")
def ragged(tiny: dict[str, Path], text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("serving") / "ragged"
    prune(tiny["qwen2"], out, text_file, CFSP(sparsity=0.3, allocation="global", round_to=4))
    return out


def test_code_is_trusted_where_it_is_ours(ragged: Path) -> None:
    found = commands(ragged)
    assert ", trust_remote_code=True)" in found["transformers"]
    assert found["vLLM"] == f"vllm serve {ragged} --trust-remote-code"


@pytest.mark.parametrize("change", ["code", "missing code", "auto_map", "kernel", "tokenizer", "generate"])
def test_nobody_is_told_to_trust_code_that_is_not_ours(change: str, ragged: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(ragged, tmp_path / "model"))
    config, tokenizer = (json.loads((folder / name).read_text()) for name in ("config.json", "tokenizer_config.json"))
    if change == "code":
        (folder / "modeling_compresskit.py").write_text((folder / "modeling_compresskit.py").read_text() + "\n")
    elif change == "missing code":
        (folder / "modeling_compresskit.py").unlink()
    elif change == "auto_map":
        config["auto_map"]["AutoModelForCausalLM"] = "who/what--module.Class"
    elif change == "kernel":
        config["attn_implementation"] = "who/what"
    elif change == "tokenizer":
        tokenizer["auto_map"] = {"AutoTokenizer": ["who/what--module.Class", None]}
    else:
        (folder / "custom_generate").mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    found = commands(folder)
    assert TRUST.isdisjoint((found["transformers"] + found["vLLM"]).replace(")", " ").split())
    assert found["transformers"].startswith("import compresskit\n\ncompresskit.register()\n")


@pytest.mark.parametrize("base", ["x" * 3000, "a/" * 3000, "x\0y", "", 3, ["a"], {"a": 1}, None])
def test_an_adapter_may_name_its_base_as_it_likes(base: object, tmp_path: Path) -> None:
    hostile_run(tmp_path, "text", adapter=True)
    (tmp_path / "prune" / "adapter_config.json").write_text(json.dumps({"r": 8, "base_model_name_or_path": base}))
    assert set(commands(tmp_path / "prune")) == {"transformers and peft", "vLLM"}


GRID = {"num_bits": 4, "group_size": 64, "symmetric": True}
PACKED = {"quant_method": "compressed-tensors", "format": "pack-quantized"}


@pytest.mark.parametrize(
    ("stated", "served"),
    [
        (None, True),
        (PACKED | {"config_groups": {"group_0": {"weights": GRID}}}, True),
        (PACKED | {"config_groups": {"group_0": {"weights": GRID | {"num_bits": 3}}}}, False),
        (PACKED | {"config_groups": {"a": {"weights": GRID}, "b": {"weights": GRID | {"num_bits": 8}}}}, False),
        (PACKED | {"config_groups": {"a": {"weights": GRID | {"num_bits": "4"}}}}, False),
        (PACKED | {"config_groups": ["a"]}, False),
        ({"quant_method": "bitsandbytes", "bnb_4bit_quant_type": "nf4"}, False),
        ("nf4", False),
    ],
)
def test_vllm_is_named_for_forms_that_it_ran(stated: object, served: bool, tmp_path: Path) -> None:
    config = {"model_type": "llama"} | ({"quantization_config": stated} if stated else {})
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert ("vLLM" in commands(tmp_path)) == served
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    assert ("vLLM" in commands(tmp_path)) == served


def test_files_for_llama_cpp_are_made_of_families_that_it_ran(ragged: Path, tmp_path: Path) -> None:
    assert commands(ragged)["llama.cpp"].startswith(f"compresskit export gguf {ragged} model.gguf\n")
    folder = tmp_path / "my model"
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    for model_type in ("opt", 3):
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
        assert "llama.cpp" not in commands(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert commands(folder)["llama.cpp"].splitlines() == [
        f"compresskit export gguf '{folder}' model.gguf",
        f"compresskit export gguf '{folder / 'adapter'}' adapter.gguf",
        "llama-server -m model.gguf --lora adapter.gguf",
    ]
