"""Storage for the tests of ApiQ."""

from __future__ import annotations

import torch

from compresskit.numerics.packed import Storage
from compresskit.numerics.scheme import Scheme


def storage(scheme: Scheme, scale_dtype: torch.dtype = torch.float16, rank: int = 0, bits: int = 16) -> Storage:
    return Storage(scheme, scale_dtype, scale_dtype, rank, torch.float16 if bits == 16 else torch.float8_e4m3fn, {})
