"""Small floats: the nearest value of E4M3 and of E2M1, and scales in E4M3 and E8M0.

    E2M1    +-{0, 0.5, 1, 1.5, 2, 3, 4, 6}                                OCP Microscaling Formats v1.0, section 5.3.3
    E4M3    sign, 4 bits of exponent with bias 7, 3 of mantissa; 2^-9 to 448    OCP 8-bit Floating Point v1.0
    E8M0    2^(e - 127), e from 0 to 254                                  OCP Microscaling Formats v1.0, section 5.4.1

What lies in the middle of two values goes to the one with the even mantissa, and what lies beyond the largest to that.
"""

from __future__ import annotations

import torch
from torch import Tensor

E2M1_LARGEST, E4M3_LARGEST = 6.0, 448.0
E2M1_EXPONENT = 2
"""Exponent of the largest E2M1 number."""
E8M0_BIAS = 127
E4M3_SMALLEST = 2.0**-9


def nearest_e4m3(values: Tensor) -> Tensor:
    """The nearest E4M3 number to each value, in any shape, float32."""
    return values.clamp(-E4M3_LARGEST, E4M3_LARGEST).to(torch.float8_e4m3fn).float()


def nearest_e2m1(values: Tensor) -> Tensor:
    """The nearest E2M1 number to each value, in any shape, float32."""
    magnitude = values.float().abs().clamp_max(E2M1_LARGEST)
    # Its numbers are 1/2 apart below 2, 1 below 4 and 2 above.
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    return torch.copysign((magnitude / step).round() * step, values.float())


def scale_exponents(largest: Tensor) -> Tensor:
    """Exponents of the E8M0 scales of groups by their largest magnitudes, floor(log2(largest)) - 2, without the bias.

    OCP Microscaling Formats v1.0, section 6.3. Groups of zeros get the smallest exponent.

    Returns:
        Whole numbers in the shape of `largest`, int32, from -127 to 125.
    """
    exponent = torch.frexp(largest.float()).exponent - 1
    return torch.where(largest > 0, exponent - E2M1_EXPONENT, -E8M0_BIAS).clamp(-E8M0_BIAS, E8M0_BIAS)
