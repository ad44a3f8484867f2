"""searching/trials.py: a trial's divergence is that of the folder that `quantize` writes, alone or among others. Oracle."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from small_runs import slow_but
from tiny_models import VOCABULARY

from compresskit.evaluation.language_modelling import score as score_model
from compresskit.machine.device import Where
from compresskit.models.load import open_model
from compresskit.quantization.rtn import RTN
from compresskit.quantization.run import quantize
from compresskit.searching.candidates import candidates
from compresskit.searching.scoring import score
from compresskit.searching.switches import random_within
from compresskit.searching.trials import divergences
from compresskit.stages import Options
from compresskit.walk.walk import Walk

WHERE = Where(torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("family", slow_but("llama", of=("llama", "gpt_neox")))
def test_a_trial_has_the_divergence_of_the_written_folder(
    family: str, tiny: dict[str, Path], text_file: Path, tmp_path: Path
) -> None:
    model = open_model(tiny[family])
    windows = torch.randint(3, VOCABULARY, (3, 32), generator=torch.Generator().manual_seed(1))
    units = candidates(model, model.linears, (2, 3), (8, 16), "F16")
    (tmp_path / "scratch").mkdir()
    method = RTN(symmetric=True)
    score(Walk(model, windows[:1], WHERE, 1), units, method, torch.float16, (tmp_path / "scratch", tmp_path), lambda *_: None)
    generator, sizes = random.Random(0), [unit.sizes for unit in units]
    budget = 1.2 * sum(row[0] for row in sizes)
    drawn = [random_within(sizes, budget, generator) for _ in range(3)]
    drawn.append((*drawn[0][:-1], (drawn[0][-1] + 1) % len(sizes[-1])))  # shares all streams but the last
    found = divergences(Walk(model, windows, WHERE, 2), units, tmp_path, drawn, torch.float32, lambda *_: None)
    again = divergences(Walk(model, windows[1:], WHERE, 2), units, tmp_path, drawn[:1], torch.float32, lambda *_: None)
    assert again[0] == pytest.approx(found[0][1:], rel=1e-4)
    assert len({round(sum(each), 9) for each in found}) == len(drawn)
    for number in (0, 3):
        table = {
            unit.name: {"bits": unit.schemes[option].bits, "group_size": unit.schemes[option].group_size}
            for unit, option in zip(units, drawn[number], strict=True)
        }
        out = tmp_path / f"out-{number}"
        text = Options(calibration=str(text_file), samples=4, sequence_length=32)
        quantize(RTN.model_validate({"symmetric": True, "bits_by": table}), str(tiny[family]), out, text)
        written = score_model(open_model(out), windows, WHERE, reference=model)
        assert sum(found[number]) / len(windows) == pytest.approx(written.kl, rel=1e-4)
