"""quantization/energies.py: against products with the second moments. Oracle, as a property."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compresskit.quantization import energies
from compresskit.quantization.error_feedback import feedback


@given(st.integers(0, 200), st.booleans(), st.sampled_from([16, 160]), st.booleans())
def test_energies_are_those_of_the_undamped_second_moments(seed: int, ordered: bool, columns: int, in_bfloat16: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * columns, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    x[:, 5] = 0
    weight, hessian = torch.randn(6, columns, generator=generator), x.T @ x / len(x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(energies, "multiplies_bfloat16", lambda device: in_bfloat16)
        found = energies.output_energies(weight, feedback(hessian, 0.01, ordered))
    expected = ((weight.double() @ hessian.double()) * weight.double()).sum(dim=1)
    assert torch.allclose(found, expected, rtol=2e-2 if in_bfloat16 else 1e-4)
    assert found.sum() == pytest.approx(float(expected.sum()), rel=1e-2 if in_bfloat16 else 1e-4)
