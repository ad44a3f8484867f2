"""`quantize compeft` and `expand` from the command line, over kinds of adapters and whole checkpoints. End to end."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_damage import edit_tensors
from conftest import Run
from peft import IA3Config, LoraConfig, PeftConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import make_model
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # raised inside peft

STAGE_KEYS = {
    "stage", "method", "output", "source", "seconds", "peak_memory_bytes", "parameters_before", "parameters_after",
    "bytes_before", "bytes_after", "settings", "density_achieved",
}  # fmt: skip
KINDS: dict[str, PeftConfig] = {
    "lora": LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    "dora": LoraConfig(r=4, target_modules="all-linear", use_dora=True, task_type="CAUSAL_LM"),
    "saved": LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"),
}
LOADER = """
import sys, torch
sys.modules["compresskit"] = None
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[1]), sys.argv[2])
kinds = ("lora_", "ia3_", "modules_to_save")
torch.save({n: p.detach() for n, p in model.named_parameters() if any(kind in n for kind in kinds)}, sys.argv[3])
"""


def make_adapter(base: Path, folder: Path, kind: str = "lora", seed: int = 0) -> Path:
    """A random adapter saved by stock peft."""
    torch.manual_seed(seed)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), KINDS[kind])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


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
    command = [sys.executable, "-c", LOADER, str(tiny["llama"]), str(tmp_path / "e"), str(tmp_path / "loaded")]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr[-2000:]
    loaded = torch.load(tmp_path / "loaded")
    for name, tensor in after.items():
        same = [n for n in loaded if loaded[n].shape == tensor.shape and torch.equal(loaded[n], tensor)]
        assert same, name


def test_inspect_shows_what_a_ternary_file_holds(run: Run, tiny: dict[str, Path], tmp_path: Path) -> None:
    adapter = make_adapter(tiny["llama"], tmp_path / "adapter")
    assert run("quantize", "compeft", adapter, tmp_path / "c", "--density", "0.1")[0] == 0
    code, text, _ = run("inspect", tmp_path / "c", "--json")
    assert code == 0
    found = json.loads(text)
    assert found["kind"] == "ternary adapter"
    assert sum(found["nonzeros_by_tensor"].values()) == found["nonzeros"] == round(0.1 * found["entries"])
    assert 0 < found["bits_per_entry"] < 1.5 * found["entropy_bits"] + 0.1
    assert "entropy_bits" in run("inspect", tmp_path / "c")[1]


def test_a_balanced_adapter_is_the_ternary_form_of_the_same_update(run: Run, tiny: dict[str, Path], tmp_path: Path) -> None:
    adapter = make_adapter(tiny["llama"], tmp_path / "adapter")
    arguments = ("--density", "1", "--variant", "prune")
    assert run("quantize", "compeft", adapter, tmp_path / "c", *arguments)[0] == 0
    assert run("expand", tmp_path / "c", tmp_path / "e")[0] == 0
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, tmp_path / "e"))
    for name in (n for n in before if "lora_A" in n):
        other = name.replace("lora_A", "lora_B")
        torch.testing.assert_close(after[other] @ after[name], before[other] @ before[name], atol=1e-5, rtol=1e-4)


def fine_tuned(base: Path, folder: Path) -> Path:
    """A copy of a checkpoint whose weights have moved."""
    shutil.copytree(base, folder)

    def move(tensors: dict[str, torch.Tensor]) -> None:
        generator = torch.Generator().manual_seed(5)
        for tensor in tensors.values():
            tensor.add_(0.01 * torch.randn(tensor.shape, generator=generator))

    edit_tensors(folder, move)
    return folder


def test_a_fine_tuned_checkpoint_expands_to_the_base_and_its_ternary_difference(
    run: Run, tiny: dict[str, Path], tmp_path: Path
) -> None:
    base, tuned = tiny["llama"], fine_tuned(tiny["llama"], tmp_path / "tuned")
    code, _, err = run("quantize", "compeft", tuned, tmp_path / "c", "--base", base, "--density", "0.1", "--variant", "stc")
    assert code == 0, err
    arguments = ("--base", base, "--max-shard-size", "50KB")
    assert run("expand", tmp_path / "c", tmp_path / "e", *arguments)[0] == 0
    AutoModelForCausalLM.from_pretrained(tmp_path / "e")
    first = load_file(base / "model.safetensors")
    after = {n: t for file in (tmp_path / "e").glob("model*.safetensors") for n, t in load_file(file).items()}
    moved = load_file(tuned / "model.safetensors")
    differences = torch.cat([(moved[n] - first[n]).flatten() for n in first]).double()
    kept = differences.abs() >= differences.abs().sort(descending=True).values[round(0.1 * len(differences)) - 1]
    expected = kept * differences.sign() * differences[kept].abs().mean()
    found = torch.cat([(after[n] - first[n]).flatten() for n in first]).double()
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-3)
    other = make_model(tmp_path / "other", "llama", seed=9)
    code, _, err = run("expand", tmp_path / "c", tmp_path / "x", "--base", other)
    assert (code, err.count("\n")) == (2, 1)
    assert "SHA-256" in err


def test_alpha_auto_takes_the_factor_with_the_least_loss(
    run: Run, tiny: dict[str, Path], text_file: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(tiny["llama"], tmp_path / "adapter")
    arguments = ("--alpha", "auto", "--validation", text_file, "--base", tiny["llama"], "--windows", 1, "--sequence-length", 32)
    code, text, err = run("quantize", "compeft", adapter, tmp_path / "c", *arguments, "--json")
    assert code == 0, err
    result = json.loads(text)
    losses = result["validation_losses"]
    assert result["alpha"] == float(min(losses, key=lambda alpha: losses[alpha]))
    assert run("expand", tmp_path / "c", tmp_path / "e")[0] == 0
    scored = ("--adapter", tmp_path / "e", "--data", text_file, "--windows", 1, "--sequence-length", 32, "--json")
    code, text, _ = run("evaluate", tiny["llama"], *scored)
    assert code == 0
    assert np.isclose(np.log(json.loads(text)["perplexity"]), losses[str(result["alpha"])], rtol=1e-5)


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
    arguments: tuple[str, ...], said: str, run: Run, tiny: dict[str, Path], tmp_path: Path
) -> None:
    adapter = make_adapter(tiny["llama"], tmp_path / "adapter")
    code, text, err = run("quantize", "compeft", adapter, tmp_path / "out", *arguments)
    assert (code, text, err.count("\n")) == (2, "", 1), err
    assert said in err
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_unusable_sources_are_refused_with_one_line(run: Run, tiny: dict[str, Path], tmp_path: Path) -> None:
    adapter = make_adapter(tiny["llama"], tmp_path / "adapter")
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
