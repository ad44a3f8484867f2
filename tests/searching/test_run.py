"""The search stage on tiny models, from the command line and from Python. End to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Run

from compresskit.models.load import open_model
from compresskit.recipe.reading import load
from compresskit.searching.options import SearchOptions
from compresskit.searching.run import search

SMALL: dict[str, Any] = {
    "samples": 8, "sequence_length": 32, "levels": "2,4", "group_sizes": "8,16", "score_windows": 2, "verify_windows": 3,
    "passes": 30,
}  # fmt: skip


def options(text: Path, **more: Any) -> SearchOptions:
    return SearchOptions(calibration=str(text), **{**SMALL, **more})


def test_a_search(tiny: dict[str, Path], text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = search(str(tiny["llama"]), out, options(text_file, bits=3, explain=True))
    print(json.dumps({k: v for k, v in result.items() if k not in ("random",)}, indent=1)[:3000])
    found = json.loads((out / "search.json").read_text())
    assert len(found["random"]) == 64
    assert open_model(out).bytes <= found["chosen"]["bytes"]
    print((out / "recipe.yaml").read_text())
    load(out / "recipe.yaml", {})
