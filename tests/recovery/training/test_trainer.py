"""recovery/training/trainer.py: a kill and its resumption, checkpoints that cannot be saved. End to end."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from recovery_data import options
from warm_processes import start

from compresskit.checkpoint.reader import sha256
from compresskit.checkpoint.whole_files import write_whole_json
from compresskit.errors import CompresskitError
from compresskit.recovery.run import recover
from compresskit.recovery.selection.random import Random
from compresskit.recovery.training.checkpoints import COMPLETE, hashes, last_checkpoint

pytest.importorskip("scipy")


@pytest.mark.parametrize("update", ["low-rank", "full"])
def test_gradient_checkpointing_changes_no_loss(
    update: str, tiny: dict[str, Path], damaged: Path, data: Path, tmp_path: Path
) -> None:
    losses = []
    for name, kept in (("kept", False), ("twice", True)):
        asked = options(tiny["llama"], data, steps=6, update=update, gradient_checkpointing=kept, precision="float32")
        recover(Random(budget=0.5), str(damaged), tmp_path / name, asked)
        losses.append(json.loads((tmp_path / name / "recover.json").read_text())["losses"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert losses[0][-1] != losses[0][0]


@pytest.mark.slow
@pytest.mark.parametrize("update", ["low-rank", "full"])
def test_a_run_that_was_killed_while_training_ends_as_if_it_had_not_been(
    update: str, tiny: dict[str, Path], damaged: Path, data: Path, tmp_path: Path
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    settings: dict[str, Any] = {"steps": 16, "loss": "distill", "checkpoint_steps": 2, "update": update}
    recover(Random(budget=0.5), str(damaged), whole, options(tiny["llama"], data, **settings))
    flags = [
        "--sequence-length", "256", "--batch-size", "4", "--held-back", "0.1", "--rank", "4", "--steps", "16",
        "--loss", "distill", "--update", update, "--checkpoint-steps", "2", "--budget", "0.5",
        "--original", str(tiny["llama"]), "--data", str(data),
    ]  # fmt: skip
    child = start(["recover", "random", str(damaged), str(out), *flags, "--quiet"], tmp_path / "log")
    trainer = tmp_path / "out.partial" / "training" / "trainer"
    while child.is_alive() and not any(trainer.glob("checkpoint-*/complete.json")):
        time.sleep(0.01)
    child.kill()
    child.join()
    assert not out.exists()
    recover(Random(budget=0.5), str(damaged), out, options(tiny["llama"], data, resume=True, **settings))
    assert sha256(out / "model.safetensors") == sha256(whole / "model.safetensors")
    losses = [json.loads((folder / "recover.json").read_text())["losses"] for folder in (whole, out)]
    assert losses[0] == losses[1]


def test_a_checkpoint_that_cannot_be_saved_is_one_line_and_the_earlier_ones_stay(
    tiny: dict[str, Path], damaged: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = options(tiny["llama"], data, steps=8, checkpoint_steps=4)
    out = tmp_path / "out"
    saved = torch.save

    def full(value: object, file: Any, *rest: Any, **named: Any) -> None:
        if "checkpoint-8" in str(file):
            raise OSError(28, "No space left on device")
        saved(value, file, *rest, **named)

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", full)
        with pytest.raises(CompresskitError, match="No space left"):
            recover(Random(budget=0.5), str(damaged), out, asked)
    assert (tmp_path / "out.partial" / "training" / "trainer" / "checkpoint-4" / "complete.json").is_file()
    recover(Random(budget=0.5), str(damaged), out, asked.model_copy(update={"resume": True}))
    assert out.is_dir()


@pytest.mark.parametrize(
    "damaged_files",
    [("optimizer.pt",)],
    ids=lambda names: names[-1],
)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_it(
    damaged_files: tuple[str, ...], tiny: dict[str, Path], damaged: Path, data: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    asked = options(tiny["llama"], data, steps=8, checkpoint_steps=2)
    whole, out = tmp_path / "whole", tmp_path / "out"
    recover(Random(budget=0.5), str(damaged), whole, asked)
    saved = torch.save

    def stopping(value: object, file: Any, *rest: Any, **named: Any) -> None:
        if "checkpoint-6" in str(file):
            raise KeyboardInterrupt
        saved(value, file, *rest, **named)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(torch, "save", stopping)
        recover(Random(budget=0.5), str(damaged), out, asked)
    newest = tmp_path / "out.partial" / "training" / "trainer" / "checkpoint-4"
    for name in damaged_files:
        content = bytearray((newest / name).read_bytes())
        content[len(content) // 2] ^= 255
        (newest / name).write_bytes(content)
    assert last_checkpoint(newest.parent) == newest.with_name("checkpoint-2")
    recover(Random(budget=0.5), str(damaged), out, asked.model_copy(update={"resume": True}))
    assert sha256(out / "model.safetensors") == sha256(whole / "model.safetensors")


def test_what_a_kill_left_of_the_record_of_a_checkpoint_spoils_no_later_one(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-2"
    folder.mkdir()
    (folder / "optimizer.pt").touch()
    (folder / "complete.json.new").touch()
    write_whole_json(folder / COMPLETE, hashes(folder))
    assert last_checkpoint(tmp_path) == folder
