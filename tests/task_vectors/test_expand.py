"""task_vectors/expand.py: adapters and whole checkpoints come back as their ternary form says. Oracle, end to end."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from checkpoint_damage import edit_tensors
from conftest import Run
from safetensors.torch import load_file
from tiny_models import make_model
from transformers import AutoModelForCausalLM


def test_a_balanced_adapter_is_the_ternary_form_of_the_same_update(run: Run, adapter: Path, tmp_path: Path) -> None:
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


def test_a_ternary_adapter_is_expanded_before_it_is_run(
    run: Run, tiny: dict[str, Path], compressed: tuple[list[Path], list[Path]]
) -> None:
    code, _, err = run("evaluate", tiny["llama"], "--adapter", compressed[0][0])
    assert (code, err.count("\n")) == (2, 1)
    assert "compresskit expand" in err
