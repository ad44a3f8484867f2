"""task_vectors/similarity.py: the cosine of the vectors. Oracle: numpy."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from conftest import Run
from safetensors.torch import load_file

from compresskit.formats import peft


def test_similarity_is_the_cosine_of_the_vectors(run: Run, compressed: tuple[list[Path], list[Path]]) -> None:
    ternary, expanded = compressed
    flat = [np.concatenate([t.flatten().numpy() for _, t in sorted(load_file(f / peft.WEIGHTS).items())]) for f in expanded]
    expected = np.array([[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in flat] for a in flat])
    for sources in (ternary, expanded):
        code, text, _ = run("merge", "similarity", *sources, "--json")
        assert code == 0
        np.testing.assert_allclose(json.loads(text)["similarity"], expected, atol=1e-5)
