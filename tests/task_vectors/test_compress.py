"""task_vectors/compress.py: exact ternary values of every kind of adapter (oracle), in stock peft; refusals. End to end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Run
from safetensors.torch import load_file, save_file
from stock_adapters import KINDS, make_adapter
from stock_tools import run_stock
from tiny_models import make_model

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # raised inside peft
STAGE_KEYS = {
    "stage", "method", "output", "source", "seconds", "peak_memory_bytes", "parameters_before", "parameters_after",
    "bytes_before", "bytes_after", "settings", "density_achieved",
}  # fmt: skip
LOADER = """
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(arguments[0]), arguments[1])
kinds = ("lora_", "ia3_", "modules_to_save")
torch.save({n: p.detach() for n, p in model.named_parameters() if any(kind in n for kind in kinds)}, arguments[2])
"""


@pytest.mark.parametrize("kind", KINDS)
def test_stock_peft_loads_the_exact_ternary_values_of_every_kind_of_adapter(
    kind: str, run: Run, tiny: dict[str, Path], tmp_path: Path
) -> None:
    adapter = make_adapter(tiny["llama"], tmp_path / "adapter", kind)
    code, text, err = run("quantize", "compeft", adapter, tmp_path / "c", "--density", "0.3", "--no-balance", "--json")
    assert code == 0, err
    result = json.loads(text)
    assert result.keys() >= STAGE_KEYS
    assert abs(result["density_achieved"] - 0.3) < 0.01
    assert run("expand", tmp_path / "c", tmp_path / "e")[:2] == (0, f"{tmp_path / 'e'}\n")
    assert (tmp_path / "e/adapter_config.json").read_bytes() == (adapter / "adapter_config.json").read_bytes()
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, tmp_path / "e"))
    assert before.keys() == after.keys()
    factors = [n for n in before if any(part in n for part in ("lora_A", "lora_B", "ia3_l"))]
    offset = 1.0 if kind == "ia3" else 0.0
    flat = np.concatenate([(before[n] - offset).flatten().numpy() for n in factors]).astype(np.float64)
    kept = np.argsort(-np.abs(flat), kind="stable")[: round(0.3 * len(flat))]
    expected = np.zeros(len(flat))
    expected[kept] = flat.std() * np.sign(flat[kept])
    found = np.concatenate([after[n].flatten().numpy() for n in factors])
    np.testing.assert_allclose(found, offset + expected, rtol=1e-6)
    assert len(np.unique(found)) == 3
    assert all(torch.equal(before[n], after[n]) for n in before if n not in factors)
    run_stock(LOADER, [str(tiny["llama"]), str(tmp_path / "e"), str(tmp_path / "loaded")], tmp_path)
    loaded = torch.load(tmp_path / "loaded")
    for name, tensor in after.items():
        same = [n for n in loaded if loaded[n].shape == tensor.shape and torch.equal(loaded[n], tensor)]
        assert same, name


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--density", "0"), "--density"),
        (("--density", "1.5"), "--density"),
        (("--alpha", "-1"), "--alpha"),
        (("--alpha", "auto"), "--validation"),
        (("--alpha", "auto", "--validation", "self"), "--validation self"),
        (("--alpha", "auto", "--validation", "builtin+self"), "--validation builtin+self"),
        (("--variant", "prune", "--alpha", "2"), "prune"),
        (("--coding", "huffman"), "--coding"),
    ],
)
def test_unusable_settings_are_refused_with_one_line(
    arguments: tuple[str, ...], said: str, run: Run, adapter: Path, tmp_path: Path
) -> None:
    code, text, err = run("quantize", "compeft", adapter, tmp_path / "out", *arguments)
    assert (code, text, err.count("\n")) == (2, "", 1), err
    assert said in err
    assert list(tmp_path.iterdir()) == []


def test_unusable_sources_are_refused_with_one_line(run: Run, tiny: dict[str, Path], adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    wider = make_model(tmp_path / "wider", "llama", intermediate_size=64)
    broken = Path(shutil.copytree(adapter, tmp_path / "broken"))
    tensors = load_file(broken / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, broken / "adapter_model.safetensors")
    cases = [
        ((tmp_path / "empty",), "adapter_config.json"),
        ((tiny["llama"],), "--base"),
        ((tiny["llama"], "--base", wider), "in "),
        ((broken,), "NaN"),
        ((tmp_path / "absent",), "no such folder"),
    ]
    for (source, *more), said in cases:
        code, text, err = run("quantize", "compeft", source, tmp_path / "out", *more)
        assert (code, text, err.count("\n")) == (2, "", 1), err
        assert said in err
    assert run("expand", adapter, tmp_path / "out")[0] == 2
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()
