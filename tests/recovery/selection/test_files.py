"""recovery/selection/files.py: a selection is data again, and its finished passes are not repeated. End to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from recovery_data import options

from compresskit.checkpoint.reader import sha256
from compresskit.recovery.run import recover
from compresskit.recovery.selection.paser import Paser

pytest.importorskip("scipy")


def test_a_selection_alone_can_be_read_again_as_data(tiny: dict[str, Path], damaged: Path, data: Path, tmp_path: Path) -> None:
    from compresskit.recovery.data.instructions import read_instructions

    recover(Paser(budget=0.25), str(damaged), tmp_path / "out", options(tiny["llama"], data, select_only=True))
    reading = read_instructions([tmp_path / "out" / "selection.jsonl"])
    assert len(reading.samples) == 9
    row = json.loads((tmp_path / "out" / "selection.jsonl").read_text().splitlines()[0])
    assert row.keys() >= {"cluster", "jsd", "lost_loss", "cost", "score", "reason"}


@pytest.mark.parametrize("stopped_in", ["vectors", "budget"])
def test_passes_that_an_interrupted_selection_had_finished_are_not_repeated(
    stopped_in: str, tiny: dict[str, Path], damaged: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compresskit.recovery.selection import degradation, embeddings, paser

    def stopped(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    def repeated(*_: Any, **__: Any) -> Any:
        raise AssertionError("a pass that had finished was repeated")

    method, asked = Paser(budget=0.5, clusters=2), options(tiny["llama"], data, steps=2)
    recover(method, str(damaged), tmp_path / "whole", asked)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(*((embeddings, "own_states") if stopped_in == "vectors" else (paser, "split_budget")), stopped)
        recover(method, str(damaged), tmp_path / "out", asked)
    with monkeypatch.context() as patched:
        patched.setattr(degradation, "degradations", repeated)
        if stopped_in != "vectors":
            patched.setattr(embeddings, "own_states", repeated)
        recover(method, str(damaged), tmp_path / "out", asked.model_copy(update={"resume": True}))
    assert sha256(tmp_path / "whole" / "model.safetensors") == sha256(tmp_path / "out" / "model.safetensors")
