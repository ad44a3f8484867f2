"""cli/flags.py: settings that cannot be are refused with one line and write nothing. End to end."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import SMALL, Run

REFUSALS: dict[str, tuple[tuple[object, ...], str]] = {
    "sparsity 1": (("--sparsity", "1"), "--sparsity"),
    "sparsity 1.5": (("--sparsity", "1.5"), "--sparsity"),
    "sparsity -0.1": (("--sparsity", "-0.1"), "--sparsity"),
    "sparsity nan": (("--sparsity", "nan"), "--sparsity"),
    "a flag of another method": (("--density", "0.2"), "No such option: --density"),
    "unknown allocation": (("--allocation", "even"), "--allocation even"),
    "round-to above the width": (("--round-to", "500"), "--round-to 500"),
    "no such text": (("--calibration", "nothing.txt"), "nothing.txt"),
    "a bad shard size": (("--max-shard-size", "lots"), "--max-shard-size"),
    "an unknown device": (("--device", "abacus"), "--device abacus"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_unusable_settings_are_refused_with_one_line(case: str, run: Run, model: Path, text_file: Path, tmp_path: Path) -> None:
    arguments, said = REFUSALS[case]
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run("prune", "cfsp", model, tmp_path / "out", "--calibration", text_file, *SMALL, *arguments)
    assert (code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
