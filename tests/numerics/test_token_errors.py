"""numerics/token_errors.py: the error of a token by hand, in float64. Oracle."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compresskit.numerics.token_errors import token_errors, usual_energy


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 99), st.booleans())
def test_the_error_is_relative_to_the_token_or_to_the_usual_one(seed: int, weighted: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    batches = [torch.randn(1, length, 6, generator=generator) for length in (3, 4)]
    batches[0][0, 1] *= 50
    outputs = [batch + torch.randn(batch.shape, generator=generator) for batch in batches]
    channels = torch.rand(6, generator=generator) if weighted else None
    weights = channels.tolist() if channels is not None else [1.0] * 6
    tokens = [token for batch in batches for token in batch[0].double().tolist()]
    energies = [sum(f * x * x for f, x in zip(weights, token, strict=True)) / 6 for token in tokens]
    median = sorted(energies)[3]
    assert usual_energy(batches, channels) == pytest.approx(median, rel=1e-5)
    places = iter(energies)
    for output, batch in zip(outputs, batches, strict=True):
        found = token_errors(output, batch, channels, median)
        for y, h, error in zip(output[0].double().tolist(), batch[0].double().tolist(), found[0].tolist(), strict=True):
            squares = sum(f * (a - b) ** 2 for f, a, b in zip(weights, y, h, strict=True)) / 6
            assert error == pytest.approx(squares / max(next(places), median), rel=1e-4)


def test_states_of_nothing_have_an_error() -> None:
    nothing = torch.zeros(1, 3, 4)
    assert bool(token_errors(nothing, nothing, None, usual_energy([nothing], None)).eq(0).all())
    assert usual_energy([], None) > 0
