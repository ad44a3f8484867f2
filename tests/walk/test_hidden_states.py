"""walk/hidden_states.py: in files or in memory, the same bytes come out, and nothing is left behind. Property, end to end."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from conftest import SMALL, Run
from hypothesis import given, settings
from hypothesis import strategies as st
from small_runs import options, slow_but

from compresskit.checkpoint.reader import sha256
from compresskit.quantization.rtn import RTN
from compresskit.quantization.run import quantize
from compresskit.walk import cost
from compresskit.walk.hidden_states import MappedTensors

shapes = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 3)), min_size=1, max_size=4)


@settings(max_examples=25)
@given(sizes=shapes, seed=st.integers(0, 99), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_a_list_in_files_holds_what_a_list_holds(
    sizes: list[tuple[int, int]], seed: int, dtype: torch.dtype, tmp_path_factory: pytest.TempPathFactory
) -> None:
    generator = torch.Generator().manual_seed(seed)
    folder = tmp_path_factory.getbasetemp() / "hidden states"
    found, expected = MappedTensors(folder), []
    for _ in range(3):
        values = [torch.rand(size, generator=generator).to(dtype) for size in sizes]
        if not expected:
            for value in values:
                found.append((value, None))
                expected.append((value, None))
        else:
            before = list(found)
            found[0] = (values[0], None)
            found[:] = [(value, None) for value in values]
            assert all(torch.equal(old[0], wanted[0]) for old, wanted in zip(before[1:], expected[1:], strict=True))
            expected = [(value, None) for value in values]
        assert all(torch.equal(each[0], wanted[0]) for each, wanted in zip(found, expected, strict=True))
    while found:
        assert torch.equal(found.pop(0)[0], expected.pop(0)[0])
    assert not folder.exists() or not list(folder.iterdir())


STAGES = {
    "prune": ("prune", "cfsp", "{model}", "--sparsity", "0.25", "--round-to", "8"),
    "depth": ("prune", "depth", "{model}", "--blocks", "1", "--choose", "loss"),
    "gptq": ("quantize", "gptq", "{model}", "--bits", "3", "--group-size", "16"),
    "apiq": ("quantize", "apiq", "{model}", "--bits", "3", "--group-size", "16", "--epochs", "1", "--rank", "0"),
    "eora": ("compensate", "eora", "{low}", "--original", "{model}", "--rank", "2", "--aim", "block"),
}


@pytest.fixture(scope="module")
def low(tiny: dict[str, Path], text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantized model."""
    out = tmp_path_factory.mktemp("low") / "low"
    quantize(RTN(group_size=16), str(tiny["llama"]), out, options(text_file))
    return out


@pytest.mark.parametrize("stage", slow_but("prune", "gptq", of=STAGES))
def test_a_stage_gives_the_same_bytes_with_its_hidden_states_on_disk(
    stage: str, run: Run, tiny: dict[str, Path], low: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled = [each.format(model=tiny["llama"], low=low) for each in STAGES[stage]]
    text = ("--calibration", text_file, *SMALL, "--quiet")
    mapped: list[MappedTensors] = []
    monkeypatch.setattr(MappedTensors, "__init__", lambda self, folder: _noted(self, folder, mapped))
    hashes = []
    for share in (0.25, 0.0):
        monkeypatch.setattr(cost, "MEMORY_SHARE", share)
        out = tmp_path / str(share)
        assert bool(mapped) is False
        code, _, err = run(*filled[:3], out, *filled[3:], *text)
        assert code == 0, err
        hashes.append({path.name: sha256(path) for path in out.rglob("*.safetensors")})
    assert hashes[0] == hashes[1]
    assert any(each.places for each in mapped)
    assert {path.name for path in tmp_path.iterdir()} == {"0.25", "0.0"}


def _noted(made: MappedTensors, folder: Path, mapped: list[MappedTensors]) -> None:
    made.folder, made.places, made.turns = folder, {}, {}
    mapped.append(made)


def test_a_disk_that_is_full_is_named_and_nothing_is_left(
    run: Run, tiny: dict[str, Path], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost, "MEMORY_SHARE", 0.0)
    monkeypatch.setattr("os.posix_fallocate", _full)
    filled = [each.format(model=tiny["llama"]) for each in STAGES["prune"]]
    code, _, err = run(*filled[:3], tmp_path / "out", *filled[3:], "--calibration", text_file, *SMALL, "--quiet")
    assert (code, err.count("\n")) == (1, 1), err
    assert "No space left on device" in err
    assert list(tmp_path.iterdir()) == []


def _full(file: int, start: int, size: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_request_says_what_room_it_takes_on_the_disk(
    run: Run, tiny: dict[str, Path], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"source: {tiny['llama']}\nsteps:\n  - prune: cfsp\n    calibration: {text_file}\n")
    monkeypatch.setattr(cost, "MEMORY_SHARE", 0.0)
    assert "scratch" in run("plan", recipe)[1]
    monkeypatch.setattr(cost, "MEMORY_SHARE", 0.25)
    assert "scratch" not in run("plan", recipe)[1]
