"""recovery/selection/degradation.py: divergence against scipy, degradations against whole stock models. Oracle tests."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from recovery_data import asked_of, killed_after_a_chunk, samples_of, stock_logits
from tiny_models import make_model

from compresskit.machine.device import Where
from compresskit.models.load import open_model
from compresskit.recovery.forward import open_walk
from compresskit.recovery.selection.degradation import degradations, jensen_shannon
from compresskit.recovery.selection.embeddings import own_states

CPU = torch.device("cpu")


@given(st.integers(0, 1000), st.floats(0.1, 30))
@example(393, 24.0)  # scipy's own jensenshannon takes the root of a rounding error below 0 there
def test_divergence_is_scipys_and_lies_between_0_and_log_2(seed: int, scale: float) -> None:
    relative_entropy = pytest.importorskip("scipy.special").rel_entr
    generator = torch.Generator().manual_seed(seed)
    first, second = scale * torch.randn(2, 5, 11, generator=generator, dtype=torch.float64)
    found = jensen_shannon(first, second)
    for row, p, q in zip(found, first.softmax(-1).numpy(), second.softmax(-1).numpy(), strict=True):
        middle = (p + q) / 2
        expected = (relative_entropy(p, middle) + relative_entropy(q, middle)).sum() / 2
        assert float(row) == pytest.approx(float(expected), abs=1e-9)
        assert 0 <= float(row) <= math.log(2)
    assert torch.equal(jensen_shannon(first, first), torch.zeros(5, dtype=torch.float64))


def test_degradations_are_means_over_response_tokens_and_0_for_equal_models(tiny: dict[str, Path], tmp_path: Path) -> None:
    samples = samples_of()
    other = make_model(tmp_path / "other", "llama", seed=1)
    walks = [open_walk(open_model(folder), Where(CPU, torch.float32)) for folder in (tiny["llama"], other)]
    divergences, losses, states = degradations(walks[0], walks[1], samples)
    assert torch.allclose(states, own_states(walks[1], samples), atol=1e-5)
    for divergence, loss, sample in zip(divergences, losses, samples, strict=True):
        first, second = (stock_logits(each, torch.tensor([sample.tokens]))[0] for each in (tiny["llama"], other))
        part = slice(sample.response_start - 1, -1)
        assert divergence == pytest.approx(float(jensen_shannon(first[part], second[part]).mean()), abs=1e-5)
        answer = torch.tensor(sample.tokens[sample.response_start :])
        before, after = (torch.nn.functional.cross_entropy(each[part], answer) for each in (first, second))
        assert loss == pytest.approx(float(after - before), abs=1e-4)
    for equal in degradations(walks[0], walks[0], samples)[:2]:
        assert equal == pytest.approx([0] * len(samples), abs=1e-7)


@pytest.mark.usefixtures("chunks_of_two")
def test_what_was_measured_before_a_kill_is_not_measured_again(
    tiny: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples, other = samples_of(), make_model(tmp_path / "other", "llama", seed=1)
    walks = [open_walk(open_model(folder), Where(CPU, torch.float32)) for folder in (tiny["llama"], other)]
    *whole, states = degradations(walks[0], walks[1], samples)
    with pytest.raises(KeyboardInterrupt):
        degradations(walks[0], walks[1], samples, killed_after_a_chunk, tmp_path / "lost")
    asked = asked_of(monkeypatch, "selection.degradation")
    *found, found_states = degradations(walks[0], walks[1], samples, None, tmp_path / "lost")
    assert asked == [2]
    assert found == whole
    assert torch.equal(found_states, states)
