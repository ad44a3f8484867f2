"""machine/precision.py: where bfloat16 pays, and what the context changes. Oracle."""

from __future__ import annotations

import pytest
import torch

from compresskit.machine.precision import matrix_products, multiplies_bfloat16

CPU = torch.device("cpu")


def test_products_take_the_asked_precision_and_parameters_keep_theirs() -> None:
    a, b = torch.randn(4, 8), torch.randn(8, 3)
    with matrix_products(CPU, "bfloat16"):
        half = a @ b
    with matrix_products(CPU, "float32"):
        full = a @ b
    assert half.dtype == torch.bfloat16
    assert full.dtype == torch.float32
    assert torch.equal(half.float(), (a.bfloat16() @ b.bfloat16()).float())


def test_auto_is_bfloat16_only_where_the_device_multiplies_it(monkeypatch: pytest.MonkeyPatch) -> None:
    a = torch.randn(4, 4)
    for capable, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda capable=capable: {"avx512_bf16": capable})
        assert multiplies_bfloat16(CPU) is capable
        with matrix_products(CPU, "auto"):
            assert (a @ a).dtype == dtype
