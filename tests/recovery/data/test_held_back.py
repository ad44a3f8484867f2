"""recovery/data/held_back.py: which samples are held back (property), their losses by stock models (oracle)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from recovery_data import samples_of, stock_logits

from compresskit.machine.device import Where
from compresskit.models.load import open_model
from compresskit.recovery.data.encoding import Sample
from compresskit.recovery.data.held_back import hold_back, mean_losses
from compresskit.recovery.data.instructions import Instruction
from compresskit.recovery.forward import open_walk

CPU = torch.device("cpu")


def test_held_back_losses_count_samples_alike_or_their_tokens(tiny: dict[str, Path]) -> None:
    samples = samples_of()
    found = mean_losses(open_walk(open_model(tiny["llama"]), Where(CPU, torch.float32)), samples, None)
    said = []
    for sample in samples:
        logits = stock_logits(tiny["llama"], torch.tensor([sample.tokens]))[0, sample.response_start - 1 : -1]
        answer = torch.tensor(sample.tokens[sample.response_start :])
        said.append(torch.nn.functional.cross_entropy(logits, answer, reduction="none"))
    assert found["loss"] == pytest.approx(float(torch.stack([each.mean() for each in said]).mean()), abs=2e-4)
    assert found["loss_by_token"] == pytest.approx(float(torch.cat(said).mean()), abs=2e-4)
    assert abs(found["loss"] - found["loss_by_token"]) > 1e-3


def test_each_source_of_a_file_gives_its_share_to_what_is_held_back() -> None:
    sources = ["a"] * 40 + ["b"] * 20
    samples = [Sample(Instruction(i, "one.jsonl", [], "", name), [i], 1) for i, name in enumerate(sources)]
    pool, held = hold_back(samples, 0.1, 0)
    assert sorted(sample.instruction.source for sample in held) == ["a"] * 4 + ["b"] * 2
    assert sorted(sample.tokens[0] for sample in pool + held) == list(range(60))
    assert hold_back(samples, 0.1, 0)[1] == held != hold_back(samples, 0.1, 1)[1]
