"""task_vectors/similarity.py: the cosine of the vectors, or of updates at other scalings. Oracle: numpy, and scaling * B @ A."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import Run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from task_vectors.scaled_adapters import CONFIGS, DTYPES, SHAPES, random_factors, scaling, updates, write

from compresskit.formats import peft
from compresskit.task_vectors.compeft import ComPEFT
from compresskit.task_vectors.compress import compress
from compresskit.task_vectors.expand import expand
from compresskit.task_vectors.request import ExpandOptions, TernaryOptions
from compresskit.task_vectors.similarity import listing, similarity


def test_similarity_is_the_cosine_of_the_vectors(run: Run, compressed: tuple[list[Path], list[Path]]) -> None:
    ternary, expanded = compressed
    flat = [np.concatenate([t.flatten().numpy() for _, t in sorted(load_file(f / peft.WEIGHTS).items())]) for f in expanded]
    expected = np.array([[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in flat] for a in flat])
    for sources in (ternary, expanded):
        code, text, _ = run("merge", "similarity", *sources, "--json")
        assert code == 0
        np.testing.assert_allclose(json.loads(text)["similarity"], expected, atol=1e-5)


def test_the_cosine_of_an_adapter_and_itself_is_one_at_any_alpha(tmp_path: Path) -> None:
    sources = [write(tmp_path / str(i), random_factors(0), lora_alpha=alpha) for i, alpha in enumerate([4, 8, -1, 0])]
    found = similarity([str(each) for each in sources], None)
    expected = [[1, 1, -1, 0], [1, 1, -1, 0], [-1, -1, 1, 0], [0, 0, 0, 0]]
    np.testing.assert_allclose(found["similarity"], expected, atol=1e-9)
    assert found["compared"] == "updates"
    assert "scalings" in listing(found)
    same = similarity([str(sources[0])] * 2, None)
    assert same["compared"] == "entries"
    assert "scalings" not in listing(same)


@settings(max_examples=30, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(CONFIGS, DTYPES), min_size=2, max_size=3), st.booleans())
def test_the_cosine_of_adapters_of_other_scalings_is_that_of_their_updates(
    stated: list[tuple[dict[str, Any], torch.dtype]], ternary: bool
) -> None:
    with tempfile.TemporaryDirectory() as root:
        sources = [write(Path(root, str(i)), random_factors(i, dtype), **config) for i, (config, dtype) in enumerate(stated)]
        dense = list(sources)
        for i, source in enumerate(sources if ternary else ()):
            sources[i], dense[i] = source.with_name(f"c{i}"), source.with_name(f"e{i}")
            compress(ComPEFT(balance=False, density=0.5), str(source), sources[i], TernaryOptions())
            expand(str(sources[i]), dense[i], ExpandOptions())
        flat = [torch.cat([u.flatten() for u in updates(each).values()]) for each in dense]
        found = similarity([str(each) for each in sources], None)
        if found["compared"] == "updates":
            expected = [[float(a @ b / a.norm() / b.norm()) for b in flat] for a in flat]
            np.testing.assert_allclose(found["similarity"], expected, atol=1e-2 if ternary else 1e-6)
        scales = [[scaling(name, config) for name in SHAPES] for config, _ in stated]
        assert (found["compared"] == "entries") == all(np.allclose(scales[0], each, rtol=1e-7) for each in scales)
