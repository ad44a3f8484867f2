"""quantization/nf4.py: stock tools load it and give the logits of the model in memory. End to end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from small_runs import slow_but
from stock_tools import stock_logits, walked_logits
from tiny_models import FAMILIES

from compresskit.models.architectures import ARCHITECTURES
from compresskit.quantization.nf4 import NF4

DENSE = [family for family in FAMILIES if not ARCHITECTURES[family].experts]


@pytest.mark.parametrize("family", slow_but("llama", "gpt2", of=DENSE))
def test_nf4_results_load_with_stock_tools(
    family: str, tiny: dict[str, Path], make: Callable[..., dict[str, object]], tmp_path: Path
) -> None:
    folders = [tmp_path / str(nested) for nested in (True, False)]
    for folder in folders:
        make(NF4(nested=folder.name == "True"), tiny[family], folder)
    for folder, found in zip(folders, stock_logits(folders, tmp_path), strict=True):
        assert (found - walked_logits(folder)).abs().max() < 1e-3, folder.name
