"""Fixtures of the tests of reports."""

from __future__ import annotations

from pathlib import Path

import pytest

from compresskit.recipe.reading import load
from compresskit.recipe.run import run
from compresskit.report.page import write_reports

TEXT = """
source: {source}
defaults: {{calibration: {text}, samples: 8, sequence_length: 64}}
matrix: {{bits: [3, 4]}}
steps:
  - {{prune: cfsp, sparsity: 0.25, round_to: 8}}
  - {{quantize: apiq, bits: "${{bits}}", group_size: 8, epochs: 1}}
  - {{compensate: eora, original: prune, rank: 2}}
  - {{evaluate: , against: source, data: {text}, windows: 2, generations: 5}}
gates: [size_ratio<=1, perplexity_ratio<=1e-9]
"""


@pytest.fixture(scope="session")
def out(tiny: dict[str, Path], text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("report")
    recipe = folder / "whole-path.yaml"
    recipe.write_text(TEXT.format(source=tiny["llama"], text=text_file))
    result = run(load(recipe), folder / "out")
    write_reports(folder / "out", result)
    return folder / "out"
