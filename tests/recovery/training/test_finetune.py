"""recovery/training/finetune.py: what the original is asked, what is learned, and the curve of losses. End to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from recovery_data import SMALL, options

from compresskit.recovery.data.encoding import Sample
from compresskit.recovery.run import recover
from compresskit.recovery.selection.random import Full, Random
from compresskit.recovery.training.finetune import loss_curve
from compresskit.walk.walk import Walk


def test_a_loss_curve_is_one_line_from_the_highest_to_the_lowest_mark() -> None:
    assert loss_curve([3.0, 2.0, 1.0]) == "█▅▁"
    assert loss_curve([float(i) for i in range(1000)])[0] == "▁"
    assert len(loss_curve([1.0] * 1000)) == 40
    assert loss_curve([]) == ""


@pytest.mark.slow
def test_a_distillation_learns_the_data_as_far_as_it_is_mixed_in(
    tiny: dict[str, Path], damaged: Path, data: Path, tmp_path: Path
) -> None:
    pytest.importorskip("scipy")
    losses = []
    for weight in (0.0, 0.5, 1.0):
        asked = options(tiny["llama"], data, steps=20, learning_rate=2e-2, loss="distill", data_weight=weight)
        result = recover(Full(), str(damaged), tmp_path / str(weight), asked)
        losses.append(result["held_back_after"]["loss"])
    # The original has random weights: its predictions say little of the responses.
    assert max(losses[1:]) < losses[0] - 0.1


def test_the_original_is_asked_only_what_the_steps_see(
    tiny: dict[str, Path], damaged: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("scipy")
    from compresskit.recovery.training import distillation

    request = options(tiny["llama"], data, steps=2, loss="distill")
    asked: list[int] = []

    def of_these(walk: Walk, samples: list[Sample], seen: list[int], *rest: Any) -> distillation.TeacherPredictions:
        asked.extend(seen)
        return distillation.predict(walk, samples, seen, *rest)

    monkeypatch.setattr("compresskit.recovery.training.finetune.predict", of_these)
    some = recover(Full(), str(damaged), tmp_path / "some", request)
    assert len(asked) == len(set(asked)) == 2 * SMALL["batch_size"] < some["selected"]

    monkeypatch.setattr(
        "compresskit.recovery.training.finetune.predict",
        lambda walk, samples, seen, *rest: distillation.predict(walk, samples, range(len(samples)), *rest),
    )
    recover(Full(), str(damaged), tmp_path / "all", request)
    few, all_ = (json.loads((tmp_path / name / "recover.json").read_text())["losses"] for name in ("some", "all"))
    assert few == pytest.approx(all_, abs=1e-4)  # stored in float16, of micro-batches that are padded otherwise


def test_texts_of_the_original_itself_have_no_hard_targets(
    tiny: dict[str, Path], damaged: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("scipy")
    from compresskit.recovery.training import trainer

    given = []
    train = trainer.train
    monkeypatch.setattr(trainer, "train", lambda trained, learned, *rest: given.append(learned) or train(trained, learned, *rest))
    rows = [{**json.loads(line), "source": "self"} for line in data.read_text().splitlines()]
    named = tmp_path / "named.jsonl"
    named.write_text("\n".join(json.dumps(row) for row in rows))
    asked = options(tiny["llama"], named, steps=1, loss="distill", self_samples=2)
    selected = recover(Random(budget=0.5), str(damaged), tmp_path / "out", asked)["selected"]
    assert given[0].hard_weights == [0.5] * selected + [0.0] * 2
