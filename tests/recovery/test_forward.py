"""recovery/forward.py: losses of padded samples against whole stock models run sample by sample. Oracle and property tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from recovery_data import samples_of, stock_logits
from small_runs import slow_but
from tiny_models import FAMILIES

from compresskit.machine.device import Where
from compresskit.models.load import open_model
from compresskit.recovery.forward import chunks, open_walk, response_losses, walked

CPU = torch.device("cpu")


@pytest.mark.parametrize("size", [2, 100])
@pytest.mark.parametrize("family", slow_but("llama", "gpt2", "mixtral", of=FAMILIES))
def test_losses_of_padded_samples_are_those_of_each_sample_alone(
    family: str, size: int, tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Right padding changes nothing to its left, in any family, and micro-batches of one size may have several lengths."""
    monkeypatch.setattr("compresskit.recovery.forward.micro_batch_size", lambda model, length: size)
    samples = samples_of()
    losses = dict(response_losses(open_walk(open_model(tiny[family]), Where(CPU, torch.float32)), samples))
    for index, sample in enumerate(samples):
        tokens = torch.tensor([sample.tokens])
        logits = stock_logits(tiny[family], tokens)[0, sample.response_start - 1 : -1]
        expected = torch.nn.functional.cross_entropy(logits, tokens[0, sample.response_start :])
        assert losses[index] == pytest.approx(float(expected), abs=2e-4)


def test_micro_batches_are_as_long_as_their_own_longest_sample(tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compresskit.recovery.forward.micro_batch_size", lambda model, length: 2)
    (done,) = walked([open_walk(open_model(tiny["llama"]), Where(CPU, torch.float32))], samples_of((30, 24, 17, 9, 5)))
    assert [tuple(hidden.shape[:2]) for hidden in done.hidden] == [(2, 30), (2, 17), (1, 5)]


def test_chunks_hold_every_sample_once_longest_first() -> None:
    samples = samples_of((5, 9, 7, 9, 3))
    found = chunks(samples, hidden_size=1 << 22)
    assert sorted(i for chunk in found for i in chunk) == list(range(5))
    assert [len(samples[i].tokens) for chunk in found for i in chunk] == [9, 9, 7, 5, 3]
    assert len(found) > 1
