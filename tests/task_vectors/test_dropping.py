"""task_vectors/dropping.py: the drawn entries, their mean, and what a merge makes of them. Oracle, property, end to end."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Run
from safetensors.torch import load_file
from task_vectors.scaled_adapters import merged, random_factors, updates, write

from compresskit.formats.peft import WEIGHTS
from compresskit.task_vectors.dropping import dropped
from compresskit.task_vectors.merging.average import Average
from compresskit.task_vectors.merging.task_arithmetic import TaskArithmetic

ENTRIES = 4000


def read(name: str) -> Iterator[np.ndarray]:
    yield np.full(ENTRIES, 2, np.float32)
    yield np.arange(ENTRIES, dtype=np.float32)


@pytest.mark.parametrize("probability", [0.25, 0.9])
def test_kept_entries_are_scaled_so_that_the_mean_stays(probability: float) -> None:
    draws = [list(dropped(read, probability, seed, 0)("x")) for seed in range(50)]
    for number, values in enumerate(read("x")):
        parts = np.stack([draw[number] for draw in draws])
        scaled = np.float32(1 / (1 - probability)) * values
        assert bool(((parts == 0) | (parts == scaled)).all())
        spread = np.sqrt(probability / (1 - probability) * np.square(values, dtype=np.float64).sum() / len(draws))
        assert abs(parts.sum(dtype=np.float64) / len(draws) - values.sum(dtype=np.float64)) < 5 * spread
    share = float(np.mean([draw[0] == 0 for draw in draws]))
    assert abs(share - probability) < 5 * np.sqrt(probability * (1 - probability) / (len(draws) * ENTRIES))


def test_the_draw_depends_on_seed_source_and_place_alone() -> None:
    drawn = [
        np.concatenate([*dropped(read, 0.5, seed, source)(name)]) != 0
        for seed, source, name in [(0, 0, "x"), (1, 0, "x"), (0, 1, "x"), (0, 0, "y")]
    ]
    sections = dropped(read, 0.5, 0, 0)
    [*sections("y")]  # reading another tensor first changes nothing
    assert np.array_equal(np.concatenate([*sections("x")]) != 0, drawn[0])
    for i, first in enumerate(drawn):
        for second in drawn[:i]:
            assert 0.4 < np.mean(first == second) < 0.6
    assert not np.array_equal(drawn[0][:ENTRIES], drawn[0][ENTRIES:])


def test_a_merge_with_dropping_is_the_same_again_and_another_with_another_seed(tmp_path: Path) -> None:
    sources = [write(tmp_path / str(i), random_factors(i)) for i in range(2)]
    outs = [merged(Average(drop=0.5, drop_seed=seed), sources) for seed in (3, 3, 4)]
    files = [(out / WEIGHTS).read_bytes() for out in outs]
    assert files[0] == files[1] != files[2]


def test_updates_are_dropped_entry_by_entry_before_they_are_factorised(tmp_path: Path) -> None:
    sources = [write(tmp_path / str(i), random_factors(i)) for i in range(2)]
    found = updates(merged(TaskArithmetic(drop=0.5, scaling=1.0), sources, rank=4))
    parts = [updates(each) for each in sources]
    for name, update in found.items():
        choices = [[torch.zeros_like(p), 2 * p] for p in (part[name] for part in parts)]
        distances = torch.stack([(update - a - b).abs() for a in choices[0] for b in choices[1]])
        if min(update.shape) == 4:  # exact at this rank
            assert float(distances.min(dim=0).values.max()) < 1e-3


def test_ternary_sources_are_dropped_as_their_expansions_are(
    run: Run, compressed: tuple[list[Path], list[Path]], tmp_path: Path
) -> None:
    for kind, sources in zip("tf", compressed, strict=True):
        code, text, err = run("merge", "ties", *sources, tmp_path / kind, "--density", 1, "--drop", 0.3, "--json")
        assert code == 0, err
        assert json.loads(text)["stage"] == "merge"
    first, second = (load_file(tmp_path / kind / WEIGHTS) for kind in "tf")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("flags", [("--drop", 1), ("--drop", -0.1), ("--drop", 0.5, "--drop-seed", -1)])
def test_what_is_no_probability_is_refused(flags: tuple[object, ...], run: Run, adapters: list[Path], tmp_path: Path) -> None:
    code, text, err = run("merge", "average", *adapters[:2], tmp_path / "m", *flags)
    assert (code, text, err.count("\n")) == (2, "", 1), err
    assert "--drop" in err
