"""compensation/corda.py: the adapter and the weights that are left make up the model (property), in stock tools. End to end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from compensation_runs import run
from stock_tools import stock_logits, walked_logits

from compresskit.compensation.corda import CorDA
from compresskit.errors import RequestError
from compresskit.models.load import open_any


def test_corda_splits_the_weights_and_changes_nothing(
    tiny: dict[str, Path], rounded: Path, text: dict[str, Any], tmp_path: Path
) -> None:
    folders = [tmp_path / mode for mode in ("instruction", "knowledge")]
    for folder in folders:
        result = run(CorDA(rank=4, mode=folder.name), rounded, folder, tiny["llama"], text)  # type: ignore[arg-type]
        assert abs(result["kl_after"] / result["kl_before"] - 1) < 1e-3
    found = stock_logits(folders, tmp_path)
    for folder, logits in zip(folders, found, strict=True):
        assert (logits - walked_logits(folder)).abs().max() < 1e-3
        assert (logits - walked_logits(rounded)).abs().max() < 1e-2
    large, small = (open_any(str(folder)).adapter for folder in folders)
    assert large is not None and small is not None
    assert all(large.update(name).norm() > small.update(name).norm() for name in large.names)
    with pytest.raises(RequestError, match="--merge"):
        run(CorDA(rank=4), rounded, tmp_path / "no", tiny["llama"], text, merge=True)
