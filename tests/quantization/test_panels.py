"""quantization/panels.py: whole-number codes by fewer operations are those of `Scheme.nearest` (oracle), in a kernel too."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compresskit.formats.fixed import SCHEMES
from compresskit.numerics.scheme import Scheme
from compresskit.quantization.panels import Results, Steps, round_panel, round_whole_numbers

SETTINGS = st.sampled_from(
    [Scheme(2, 64, False), Scheme(3, 64, False), Scheme(4, 64, True), Scheme(8, 64, True), SCHEMES["int8"]]
)


def panel(scheme: Scheme, columns: int, rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, Steps, Results]:
    """Weights, factor, steps and results to be filled of a random panel; some targets lie far beyond the grid."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(columns, rows, generator=generator)
    lower = torch.randn(columns, columns, generator=generator).tril(-1) / 4 + torch.eye(columns)
    zero_point = torch.zeros(columns, rows)
    if not scheme.symmetric:
        zero_point = torch.randint(scheme.lowest, scheme.highest + 1, weight.shape, generator=generator).float()
    steps = torch.rand(columns, rows, generator=generator) / scheme.steps + 1e-3, zero_point
    return weight, lower, steps, (torch.empty_like(weight), weight * 1.1, torch.empty_like(weight))


def column_by_column(weight: torch.Tensor, lower: torch.Tensor, steps: Steps, scheme: Scheme, results: Results) -> None:
    """The equations, with the codes and not Q - z."""
    (scale, zero_point), (codes, targets, errors) = steps, results
    for i in range(len(weight) - 1, -1, -1):
        codes[i] = scheme.nearest(targets[i] / scale[i], zero_point[i])
        errors[i] = weight[i] - (codes[i] - zero_point[i]) * scale[i]
        targets[:i].addr_(lower[i, :i], errors[i])


@given(SETTINGS, st.integers(1, 33), st.integers(1, 17), st.integers(0, 99))
def test_fewer_operations_give_the_same_bits(scheme: Scheme, columns: int, rows: int, seed: int) -> None:
    *problem, found = panel(scheme, columns, rows, seed)
    *_, expected = panel(scheme, columns, rows, seed)
    column_by_column(*problem, scheme, expected)
    round_panel(*problem, scheme, found)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def compare_with_the_kernel() -> None:
    """Sums of the same terms in the same order, but the plain loop may fuse a product and its sum, and break a tie otherwise."""
    from compresskit.quantization.panel_kernel import round_panel_at_once

    for columns, rows in ((1, 5), (33, 70), (128, 33)):
        for seed, scheme in enumerate((Scheme(3, 64, False), Scheme(8, 64, True))):
            *problem, found = panel(scheme, columns, rows, seed)
            *_, expected = panel(scheme, columns, rows, seed)
            round_whole_numbers(*problem, scheme, expected)
            round_panel_at_once(*problem, scheme, found)
            assert (found[0] != expected[0]).float().mean() < 0.01
            assert all((one - other).abs().median() < 1e-5 for one, other in zip(found, expected, strict=True))


def test_the_kernel_rounds_alike() -> None:
    """In Triton's interpreter, on a CPU; it is chosen as Triton is imported, so in a process of its own."""
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    call = [sys.executable, "-c", "import test_panels; test_panels.compare_with_the_kernel()"]
    finished = subprocess.run(call, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
