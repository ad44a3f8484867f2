"""task_vectors/merge.py: ternary and dense sources, checkpoints, refusals. Oracle, end to end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_damage import edit_tensors
from conftest import Run
from safetensors.torch import load_file, save_file

from compresskit.errors import RequestError
from compresskit.formats import peft
from compresskit.task_vectors.merge import merge
from compresskit.task_vectors.merging.average import Average
from compresskit.task_vectors.request import MergeOptions

WEIGHTED = ("average", "--weights", "1", "--weights", "2", "--weights", "0.5")


@pytest.mark.parametrize("arguments", [("average",), ("task-arithmetic",), ("ties", "--density", "1"), ("pcb",), WEIGHTED])
def test_merging_ternary_sources_gives_exactly_what_their_expansions_give(
    arguments: tuple[str, ...], run: Run, compressed: tuple[list[Path], list[Path]], tmp_path: Path
) -> None:
    ternary, expanded = compressed
    method, *flags = arguments
    for sources, out in ((ternary, "t"), (expanded, "f")):
        code, text, err = run("merge", method, *sources, tmp_path / out, *flags, "--json")
        assert code == 0, err
        assert json.loads(text)["stage"] == "merge"
    first, second = (load_file(tmp_path / out / peft.WEIGHTS) for out in ("t", "f"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_ties_trims_dense_sources_over_the_whole_vector(run: Run, adapters: list[Path], tmp_path: Path) -> None:
    assert run("merge", "ties", *adapters[:2], tmp_path / "m", "--density", "0.1")[0] == 0
    flat = []
    for adapter in adapters[:2]:
        tensors = load_file(adapter / peft.WEIGHTS)
        values = torch.cat([tensors[name].flatten() for name in sorted(tensors)])
        kept = values.abs() >= values.abs().sort(descending=True).values[round(0.1 * len(values)) - 1]
        flat.append(values * kept)
    elected = (flat[0] + flat[1]).sign()
    agree = [v * ((v * elected) > 0) for v in flat]
    expected = sum(agree) / sum((v != 0).float() for v in agree).clamp_min(1)
    merged = load_file(tmp_path / "m" / peft.WEIGHTS)
    torch.testing.assert_close(torch.cat([merged[name].flatten() for name in sorted(merged)]), expected)


def test_a_merge_that_would_keep_nothing_of_any_second_factor_is_refused(run: Run, adapters: list[Path], tmp_path: Path) -> None:
    loud = []
    for adapter in adapters:
        loud.append(Path(shutil.copytree(adapter, tmp_path / adapter.name)))
        tensors = load_file(adapter / peft.WEIGHTS)
        large = {name: tensor * 1e4 if ".lora_A." in name else tensor for name, tensor in tensors.items()}
        save_file(large, loud[-1] / peft.WEIGHTS)
    code, _, err = run("merge", "pcb", *loud, tmp_path / "m")
    assert code == 2
    assert "lora_B" in err
    assert "--rank" in err
    assert not (tmp_path / "m").exists()


def test_differences_of_checkpoints_merge_into_a_checkpoint(run: Run, tiny: dict[str, Path], tmp_path: Path) -> None:
    base, tuned = tiny["llama"], []
    for seed in range(2):
        tuned.append(Path(shutil.copytree(base, tmp_path / f"t{seed}")))
        generator = torch.Generator().manual_seed(seed)
        edit_tensors(
            tuned[-1], lambda tensors, g=generator: [t.add_(torch.randn(t.shape, generator=g)) for t in tensors.values()]
        )  # type: ignore[misc]
    assert run("merge", "average", *tuned, tmp_path / "m", "--base", base)[0] == 0
    found, first, second = (load_file(folder / "model.safetensors") for folder in (tmp_path / "m", *tuned))
    for name in found:
        torch.testing.assert_close(found[name], (first[name] + second[name]) / 2)
    assert run("quantize", "compeft", tuned[0], tmp_path / "c", "--base", base)[0] == 0
    assert run("merge", "average", tmp_path / "c", tuned[1], tmp_path / "n", "--base", base)[0] == 0


def test_unusable_requests_are_refused_with_one_line(
    run: Run, adapters: list[Path], tiny: dict[str, Path], tmp_path: Path
) -> None:
    cases: list[tuple[tuple[object, ...], str]] = [
        ((adapters[0], tmp_path / "out"), "at least two"),
        ((*adapters, tmp_path / "out", "--weights", "1"), "--weights"),
        ((*adapters[:2], tmp_path / "out", "--rank", "1000"), "--rank 1000"),
        ((adapters[0], tiny["llama"], tmp_path / "out", "--base", tiny["llama"]), "cannot be merged"),
        ((*adapters[:2], tmp_path / "out", "--scaling", "0"), "--scaling"),
    ]
    for arguments, said in cases:
        code, text, err = run("merge", "average", *arguments)
        assert (code, text, err.count("\n")) == (2, "", 1), err
        assert said in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("sources", [[["a", "b"]], ["a", ["b"]], ["a", None], ["a"], []])
def test_lists_in_lists_and_too_few_sources_are_refused(sources: list[Any], tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"one after the other|at least two"):
        merge(Average(), sources, tmp_path / "out", MergeOptions())
