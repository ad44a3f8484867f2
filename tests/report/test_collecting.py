"""report/collecting.py: a folder that holds no run is refused. End to end."""

from __future__ import annotations

from pathlib import Path

import pytest

from compresskit.errors import RequestError
from compresskit.report.collecting import read_result


def test_a_folder_without_a_run_is_refused(tmp_path: Path, out: Path) -> None:
    with pytest.raises(RequestError, match="holds no finished run"):
        read_result(tmp_path)
    with pytest.raises(RequestError, match="is the report of one step"):
        read_result(out / "evaluate-bits-3")
