"""checkpoint/manifest.py: the chain of manifests, fingerprints of requests, and hashes that are compared. Oracle, end to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import SMALL, Run
from safetensors.torch import load_file, save_file
from tiny_models import make_adapter, make_model

from compresskit.checkpoint.manifest import chain, changed_files, check_unchanged, fingerprint, finished_result, manifest
from compresskit.checkpoint.reader import open_checkpoint
from compresskit.errors import CheckpointError


def test_the_chain_goes_back_to_the_first_stage() -> None:
    first = {"stage": "prune", "source": None}
    assert chain({"stage": "quantize", "source": first}) == [{"stage": "quantize", "source": first}, first]
    assert chain(None) == []


def test_a_model_of_the_hub_is_recorded_with_its_commit(tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = make_model(tmp_path / "models--org--name" / "snapshots" / commit, "llama")
    recorded = manifest("prune", {"method": "cfsp"}, open_checkpoint(folder), {}, {})
    assert recorded["inputs"]["hub"] == {"model": "org/name", "commit": commit}
    moved = folder.rename(tmp_path / "model")
    assert "hub" not in manifest("prune", {"method": "cfsp"}, open_checkpoint(moved), {}, {})["inputs"]


def test_fingerprints_tell_requests_apart() -> None:
    assert fingerprint("prune", {"a": 1, "b": 2}) == fingerprint("prune", {"b": 2, "a": 1})
    assert fingerprint("prune", {"a": 1}) != fingerprint("prune", {"a": 2})


def flip_a_bit(file: Path) -> None:
    """Change the last bit of the last weight's mantissa: no reader can see it."""
    tensors = load_file(file)
    name = max(tensors, key=lambda each: tensors[each].numel())
    data = bytearray(file.read_bytes())
    data[-4] ^= 1
    file.write_bytes(bytes(data))
    assert load_file(file)[name].isfinite().all()


def test_a_flipped_bit_is_found_and_an_unknown_file_is_nobody_s_business(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "llama")
    check_unchanged(open_checkpoint(model))
    store = open_checkpoint(model)
    hashes = {"sha256": store.hashes}
    (model / "compresskit.json").write_text(json.dumps({"tool": "compresskit", "outputs": hashes}))
    check_unchanged(open_checkpoint(model))
    flip_a_bit(model / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: SHA-256 is .* recorded .*--no-verify"):
        check_unchanged(open_checkpoint(model))


def test_a_manifest_does_not_name_files_elsewhere(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no file inside"):
        changed_files(tmp_path, {"outputs": {"sha256": {"../secret": "0"}}})


@pytest.mark.parametrize("changed", [{"stage": 3}, {"method": None}, {"settings": [1]}, {"facts": "x"}])
def test_a_finished_stage_is_known_again_by_a_whole_manifest_only(changed: dict[str, object], tmp_path: Path) -> None:
    made = {"stage": "prune", "method": "cfsp", "settings": {"seed": 0}, "facts": {"kl": 0.5, "output": "../elsewhere"}}
    (tmp_path / "compresskit.json").write_text(json.dumps(made))
    found = finished_result(tmp_path)
    assert (found["output"], found["settings"], found["kl"]) == (str(tmp_path), {"method": "cfsp", "seed": 0}, 0.5)
    (tmp_path / "compresskit.json").write_text(json.dumps(made | changed))
    with pytest.raises(CheckpointError, match=r"compresskit\.json: states .*, expected "):
        finished_result(tmp_path)


@pytest.fixture
def pruned(run: Run, tiny: dict[str, Path], text_file: Path, tmp_path: Path) -> Path:
    """A damaged output of ours."""
    out = tmp_path / "pruned"
    text = ("--calibration", text_file, *SMALL)
    assert run("prune", "magnitude", tiny["llama"], out, "--sparsity", "0.25", "--round-to", "8", "--quiet", *text)[0] == 0
    flip_a_bit(out / "model.safetensors")
    return out


def test_every_stage_that_reads_a_damaged_folder_refuses_it_unless_told_otherwise(
    run: Run, pruned: Path, tiny: dict[str, Path], text_file: Path, tmp_path: Path
) -> None:
    text = ("--calibration", text_file, *SMALL)
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"instruction": f"say {i}", "output": str(i) * 5}) + "\n" for i in range(8)))
    make_adapter(tmp_path / "adapter", tiny["llama"], 1)
    original = ("--original", tiny["llama"])
    out = tmp_path / "out"
    scored = ("--data", text_file, "--windows", "2", "--sequence-length", "64")
    stages = {
        "prune": ("prune", "magnitude", pruned, out, "--sparsity", "0.4", "--round-to", "8", *text),
        "quantize": ("quantize", "rtn", pruned, out, "--group-size", "8", *text),
        "compensate": ("compensate", "svd", pruned, out, *original, "--rank", "2", *text),
        "recover": ("recover", "random", pruned, out, *original, "--data", data, "--steps", "1", "--sequence-length", "256"),
        "evaluate": ("evaluate", pruned, *scored),
        "against": ("evaluate", tiny["llama"], "--against", pruned, *scored),
        "compeft": ("quantize", "compeft", pruned, out, "--base", pruned),
    }  # fmt: skip
    for name, arguments in stages.items():
        code, stdout, err = run(*arguments, "--quiet")
        assert (code, stdout, err.count("\n")) == (2, "", 1), (name, err)
        assert f"{pruned / 'model.safetensors'}: SHA-256 is" in err, name
        assert not out.exists()
    code, _, err = run(*stages["evaluate"], "--no-verify", "--quiet")
    assert code in (0, 3), err
    assert run(*stages["prune"], "--no-verify", "--quiet")[0] == 0


def test_damaged_adapters_and_ternary_files_are_refused(run: Run, tiny: dict[str, Path], tmp_path: Path) -> None:
    adapters = [make_adapter(tmp_path / f"adapter{seed}", tiny["llama"], seed) for seed in (1, 2)]
    merged, out = tmp_path / "merged", tmp_path / "out"
    assert run("merge", "average", *adapters, merged, "--quiet")[0] == 0
    file = merged / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, file)
    for arguments in (("quantize", "compeft", merged, out), ("merge", "average", merged, adapters[0], out)):
        code, _, err = run(*arguments, "--quiet")
        assert code == 2, err
        assert f"{file}: SHA-256 is" in err
        assert not out.exists()
    assert run("quantize", "compeft", merged, out, "--no-verify", "--quiet")[0] == 0
