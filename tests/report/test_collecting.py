"""report/collecting.py: what a run left is read, a folder that holds no run is refused. End to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from compresskit.errors import RequestError
from compresskit.report.collecting import read_result


def test_a_folder_without_a_run_is_refused(tmp_path: Path, out: Path) -> None:
    with pytest.raises(RequestError, match="holds no finished run"):
        read_result(tmp_path)
    with pytest.raises(RequestError, match="is the report of one step"):
        read_result(out / "evaluate-bits-3")


@pytest.mark.parametrize(("source", "is_read"), [("model", True), (["a", "b"], True), (["a", 3], False), (3, False)])
def test_a_step_names_one_source_or_those_of_a_merge(source: Any, is_read: bool, tmp_path: Path) -> None:
    result = {"steps": {"merge": {"stage": "merge", "source": source}}}
    (tmp_path / "report.json").write_text(json.dumps(result))
    if is_read:
        assert read_result(tmp_path) == result
    else:
        with pytest.raises(RequestError, match=r"report\.json: says of merge"):
            read_result(tmp_path)
