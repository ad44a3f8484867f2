"""task_vectors/merge_updates.py: adapters of other ranks and linears merge as updates. Oracle, end to end."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from task_vectors.scaled_adapters import CONFIGS, DOWN, QUERY, RANKS, merged, random_factors, updates, write
from tiny_models import make_adapter

from compresskit.errors import RequestError
from compresskit.formats.peft import WEIGHTS, factor_names, open_adapter
from compresskit.task_vectors.merging.average import Average


def test_adapters_of_other_ranks_and_linears_merge_as_updates(run: Run, tiny: dict[str, Path], tmp_path: Path) -> None:
    first = make_adapter(tmp_path / "a", tiny["llama"], 1, rank=2)
    second = make_adapter(tmp_path / "b", tiny["llama"], 2, rank=3, skip=4)
    code, _, err = run("merge", "average", first, second, tmp_path / "x")
    assert (code, err.count("\n")) == (2, 1)
    assert "--rank" in err
    code, text, err = run("merge", "average", first, second, tmp_path / "m", "--rank", 5, "--json")
    assert code == 0, err
    sources, found = [open_adapter(each) for each in (first, second)], open_adapter(tmp_path / "m")
    summary = json.loads(text)
    assert summary["parameters_before"] == sum(each.parameters for each in sources)
    assert summary["parameters_after"] == found.parameters
    for name in found.names:
        expected = sum(a.update(name) if a.holds(name) else torch.tensor(0.0) for a in sources) / 2
        torch.testing.assert_close(found.update(name), expected, atol=1e-4, rtol=1e-4)
    code, _, err = run("evaluate", tiny["llama"], "--adapter", tmp_path / "m", "--windows", 1, "--sequence-length", 32)
    assert code == 0, err


def test_balanced_sources_merge_as_updates_only(run: Run, adapters: list[Path], tmp_path: Path) -> None:
    sources = [tmp_path / adapter.name for adapter in adapters[:2]]
    for adapter, source in zip(adapters, sources, strict=False):
        assert run("quantize", "compeft", adapter, source)[0] == 0
    code, _, err = run("merge", "ties", *sources, tmp_path / "m")
    assert code == 2
    assert "balanced" in err
    assert run("merge", "ties", *sources, tmp_path / "m", "--rank", 4)[0] == 0


@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(1, 4), st.integers(1, 4), CONFIGS, CONFIGS)
def test_other_ranks_are_refused_or_merged_as_updates(
    rank: int, other: int, first: dict[str, Any], second: dict[str, Any]
) -> None:
    with tempfile.TemporaryDirectory() as root:
        ranks = [RANKS, {QUERY: rank, DOWN: other}]
        patterns = [{"q_proj": each[QUERY], "down_proj": each[DOWN]} for each in ranks]
        sources = [
            write(Path(root, str(i)), random_factors(i, ranks=ranks[i]), **config, rank_pattern=patterns[i])
            for i, config in enumerate([first, second])
        ]
        if ranks[1] != RANKS:
            with pytest.raises(RequestError, match=r"_proj\.lora_.*--rank") as caught:
                merged(Average(), sources)
            assert str(sources[1]) in str(caught.value)
            assert "\n" not in str(caught.value)
        tensors = load_file(merged(Average(), sources, rank=4) / WEIGHTS)
        parts = [updates(each) for each in sources]
        for name, part in parts[0].items():
            update = (part + parts[1][name]) / 2
            a, b = (tensors[each].double() for each in factor_names(name))
            lost = torch.linalg.svdvals(update)[4:].norm()  # what no product of rank 4 can hold
            torch.testing.assert_close((b @ a - update).norm(), lost, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("config", [{"use_dora": True}, {"target_parameters": ["mlp.experts.down_proj"]}, {"peft_type": "IA3"}])
def test_adapters_whose_update_is_no_plain_product_are_refused(config: dict[str, Any], run: Run, tmp_path: Path) -> None:
    sources = [write(tmp_path / str(i), random_factors(i), **config) for i in range(2)]
    code, _, err = run("merge", "average", *sources, tmp_path / "m", "--rank", 2)
    assert (code, err.count("\n")) == (2, 1)
    assert "plain LoRA" in err
