"""task_vectors/merge_updates.py: adapters of other ranks and linears merge as updates. Oracle, end to end."""

from __future__ import annotations

from pathlib import Path

import torch
from conftest import Run
from tiny_models import make_adapter

from compresskit.formats.peft import open_adapter


def test_adapters_of_other_ranks_and_linears_merge_as_updates(run: Run, tiny: dict[str, Path], tmp_path: Path) -> None:
    first = make_adapter(tmp_path / "a", tiny["llama"], 1, rank=2)
    second = make_adapter(tmp_path / "b", tiny["llama"], 2, rank=3, skip=4)
    code, _, err = run("merge", "average", first, second, tmp_path / "x")
    assert (code, err.count("\n")) == (2, 1)
    assert "--rank" in err
    code, _, err = run("merge", "average", first, second, tmp_path / "m", "--rank", 5)
    assert code == 0, err
    sources, merged = [open_adapter(each) for each in (first, second)], open_adapter(tmp_path / "m")
    for name in merged.names:
        expected = sum(a.update(name) if a.holds(name) else torch.tensor(0.0) for a in sources) / 2
        torch.testing.assert_close(merged.update(name), expected, atol=1e-4, rtol=1e-4)
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
