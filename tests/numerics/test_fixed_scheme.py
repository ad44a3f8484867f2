"""numerics/fixed_scheme.py: codes of every kind are the nearest that there are. Oracle: all codes tried."""

from __future__ import annotations

import pytest
import torch

from compresskit.formats.fixed import SCHEMES

CODES = {
    "int8": torch.arange(-128.0, 128.0),
    "e4m3": torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).float(),
    "e2m1": torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]).repeat(2) * torch.tensor([1.0] * 8 + [-1.0] * 8),
}


@pytest.mark.parametrize("name", SCHEMES)
def test_codes_are_the_nearest_of_all(name: str) -> None:
    scheme = SCHEMES[name]
    codes = CODES[scheme.element]
    codes = codes[codes.isfinite()]
    position = torch.randn(50, 8, generator=torch.Generator().manual_seed(1)) * float(codes.max()) / 2
    found = scheme.nearest(position.clone(), torch.zeros(1))
    least = (position[..., None] - codes).abs().amin(dim=-1)
    assert torch.equal((found - position).abs(), least)
    assert bool(torch.isin(found, codes).all())
