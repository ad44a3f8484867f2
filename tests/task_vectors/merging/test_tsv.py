"""task_vectors/merging/tsv.py: against decompositions of the dense updates in float64. Oracle, property, end to end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_damage import edit_tensors
from conftest import Run
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from task_vectors.scaled_adapters import RANKS, merged, random_factors, updates, write
from torch import Tensor

from compresskit.formats.peft import WEIGHTS
from compresskit.task_vectors.merging.tsv import SAME_DIRECTION, TSV, nearest_orthogonal

Pair = tuple[Tensor, Tensor]
ROWS, COLUMNS = 11, 9


def dense(matrices: list[Tensor], kept: list[int], weights: list[float]) -> Tensor:
    """Equations 1 to 4 on matrices (out, in), by the polar factor of a singular value decomposition."""
    sides: list[list[Tensor]] = [[], []]
    values = []
    for matrix, rank, weight in zip(matrices, kept, weights, strict=True):
        u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
        sides[0].append(u[:, :rank])
        sides[1].append(vh[:rank].T)
        values.append(weight * s[:rank])
    polar = []
    for side in sides:
        p, s, qh = torch.linalg.svd(torch.cat(side, dim=1), full_matrices=False)
        independent = s > SAME_DIRECTION**0.5 * s[0]
        polar.append(p[:, independent] @ qh[independent])
    return polar[0] @ torch.diag(torch.cat(values)) @ polar[1].T


def random_pairs(seed: int, ranks: list[int]) -> list[Pair]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(rank, COLUMNS, generator=generator), torch.randn(ROWS, rank, generator=generator)) for rank in ranks]


def product(pair: Pair) -> Tensor:
    return pair[1].double() @ pair[0].double()


@given(st.integers(0, 99), st.lists(st.integers(1, 4), min_size=2, max_size=4))
def test_factors_merge_as_the_dense_updates_do(seed: int, ranks: list[int]) -> None:
    pairs, weights = random_pairs(seed, ranks), [1.0, 0.5, 2.0, 1.0][: len(ranks)]
    share = COLUMNS // len(ranks)
    kept = ranks if sum(ranks) <= COLUMNS else [min(rank, share) for rank in ranks]
    found = product(TSV().merge_pairs(pairs, np.array(weights, np.float32), len(pairs)))
    torch.testing.assert_close(found, dense([product(each) for each in pairs], kept, weights), atol=1e-6, rtol=1e-6)


@given(st.integers(0, 99), st.integers(1, 9))
def test_independent_columns_become_orthonormal(seed: int, ranks: int) -> None:
    vectors = torch.randn(12, ranks, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = nearest_orthogonal(vectors)
    torch.testing.assert_close(found.T @ found, torch.eye(ranks, dtype=torch.float64), atol=1e-6, rtol=0)


def test_orthogonal_tasks_are_summed_and_copies_averaged() -> None:
    rows, columns = (torch.linalg.qr(torch.randn(9, 9, dtype=torch.float64)).Q for _ in range(2))
    first = torch.diag(torch.tensor([3.0, 2.0], dtype=torch.float64)) @ columns[:2], rows[:, :2]
    second = columns[2:4], rows[:, 2:4]
    ones = np.ones(2, np.float32)
    torch.testing.assert_close(product(TSV().merge_pairs([first, second], ones, 2)), product(first) + product(second))
    torch.testing.assert_close(product(TSV().merge_pairs([first, first], ones, 2)), product(first))
    half = first[0], first[1] * 0.5
    torch.testing.assert_close(product(TSV().merge_pairs([first, half], ones, 2)), 0.75 * product(first))


def test_a_weight_that_no_source_changes_stays() -> None:
    pairs = [(torch.zeros(2, COLUMNS), torch.zeros(ROWS, 2))] * 2
    assert not product(TSV().merge_pairs(pairs, np.ones(2, np.float32), 2)).any()


@pytest.mark.parametrize("rank", [2, 4])
def test_adapters_merge_at_a_rank(rank: int, tmp_path: Path) -> None:
    sources = [write(tmp_path / str(i), random_factors(i), lora_alpha=2 + i) for i in range(2)]
    parts = [updates(each) for each in sources]
    method = TSV(scaling=0.7, weights=(1.0, 3.0))
    outs = [merged(method, sources, rank) for _ in range(2)]
    assert (outs[0] / WEIGHTS).read_bytes() == (outs[1] / WEIGHTS).read_bytes()
    for name, found in updates(outs[0]).items():
        shares = TSV().ranks([RANKS[name]] * 2, parts[0][name].shape, 2)  # type: ignore[arg-type]
        whole = 0.7 * dense([part[name] for part in parts], shares, [1.0, 3.0])
        u, s, vh = torch.linalg.svd(whole)
        torch.testing.assert_close(found, u[:, :rank] @ torch.diag(s[:rank]) @ vh[:rank], atol=1e-4, rtol=1e-4)


def test_checkpoints_merge_by_matrix_and_the_rest_by_mean(run: Run, tiny: dict[str, Path], tmp_path: Path) -> None:
    base, tuned = tiny["llama"], []
    for seed in range(2):
        tuned.append(Path(shutil.copytree(base, tmp_path / f"t{seed}")))
        generator = torch.Generator().manual_seed(seed)
        edit_tensors(
            tuned[-1], lambda tensors, g=generator: [t.add_(torch.randn(t.shape, generator=g)) for t in tensors.values()]
        )  # type: ignore[misc]
    code, text, err = run("merge", "tsv", *tuned, tmp_path / "m", "--base", base, "--json")
    assert code == 0, err
    assert json.loads(text)["method"] == "tsv"
    found, before, *after = (load_file(folder / "model.safetensors") for folder in (tmp_path / "m", base, *tuned))
    for name, tensor in found.items():
        changes = [each[name].double() - before[name].double() for each in after]
        share = max(1, min(tensor.shape) // 2)
        expected = dense(changes, [share, share], [1, 1]) if tensor.dim() == 2 else (changes[0] + changes[1]) / 2
        torch.testing.assert_close(tensor.double() - before[name].double(), expected, atol=1e-3, rtol=1e-3)


def test_what_it_cannot_merge_is_refused(run: Run, adapters: list[Path], tmp_path: Path) -> None:
    cases = [((), "--rank"), (("--rank", 2, "--drop", 0.5), "--drop 0.5"), (("--rank", 2, "--scaling", 0), "--scaling")]
    for flags, said in cases:
        code, text, err = run("merge", "tsv", *adapters[:2], tmp_path / "m", *flags)
        assert (code, text, err.count("\n")) == (2, "", 1), err
        assert said in err
    assert not (tmp_path / "m").exists()
