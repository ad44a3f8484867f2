"""compensation/residuals.py: the least-squares answer. Oracle: torch.linalg.lstsq on the tokens themselves."""

from __future__ import annotations

import pytest
import torch

from compresskit.compensation.residuals import Outputs, Paired, output_residual
from compresskit.walk.statistics import Gram


@pytest.mark.parametrize("wide", [True, False], ids=["keeps outputs", "keeps inputs"])
@pytest.mark.parametrize("statistic", [True, False], ids=["own gram", "shared gram"])
def test_the_output_s_error_is_that_of_a_regression_on_the_compressed_inputs(wide: bool, statistic: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, outputs, left = (12, 5, 8) if wide else (6, 10, 4)
    x = torch.randn(300, inputs, generator=generator)
    compressed_x = x[:, :left] + 0.3 * torch.randn(300, left, generator=generator)
    weights = [torch.randn(rows, inputs, generator=generator) for rows in (outputs, outputs + 1)]
    compressed = [torch.randn(len(weight), left, generator=generator) for weight in weights]
    kept = Outputs(weights)
    paired = Paired(Gram(left) if statistic else None, kept, left, torch.device("cpu"))
    for part in x.split(100):
        kept.add(part)
    for part in compressed_x.split(100):
        paired.add(part)
    assert kept.keep_inputs == (inputs < 2 * outputs + 1)
    row = 0
    for weight, start in zip(weights, compressed, strict=True):
        found = output_residual(start, torch.zeros_like(start), paired, slice(row, row + len(weight)), 1e-9)
        wanted = torch.linalg.lstsq(compressed_x.double(), (x @ weight.T).double()).solution.T - start
        assert torch.allclose(found.double(), wanted, atol=1e-4)
        row += len(weight)


def test_equal_inputs_leave_the_error_of_the_weight() -> None:
    """Equation 2 with X = X_c is equation 1, whatever the damping."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(100, 6, generator=generator), torch.randn(4, 6, generator=generator)
    compressed = weight + 0.1 * torch.randn(4, 6, generator=generator)
    kept = Outputs([weight])
    paired = Paired(None, kept, 6, torch.device("cpu"))
    kept.add(x)
    paired.add(x)
    found = output_residual(compressed, weight - compressed, paired, slice(0, 4), 0.1)
    assert torch.allclose(found, weight - compressed, atol=1e-5)
