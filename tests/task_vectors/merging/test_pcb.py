"""task_vectors/merging/pcb.py: against a slow statement of its definition, whole and at a rank. Oracle, end to end."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from task_vectors.scaled_adapters import merged, random_factors, updates, write

from compresskit.task_vectors.merging.pcb import PCB


def test_pcb_keeps_what_the_written_out_definition_keeps() -> None:
    values = np.random.default_rng(0).normal(size=(3, 200)).astype(np.float32)
    weights = np.ones(3, np.float32)
    total, mass = np.zeros(200), np.zeros(200)
    for row in values.astype(np.float64):
        size = np.abs(row)
        intra = np.exp(3 * ((size - size.min()) / (size.max() - size.min())) ** 2)
        beta = intra * np.tanh(row * values.sum(axis=0))
        floor = sorted(beta)[180]
        kept = np.where(beta > floor, (beta - floor) / (beta.max() - floor), 0)
        total += kept * row
        mass += kept
    expected = np.divide(total, mass, out=np.zeros(200), where=mass > 0)
    np.testing.assert_allclose(PCB().merge(values, weights), expected, atol=1e-4)


@pytest.mark.parametrize("rank", [1, 3])
def test_pcb_at_a_rank_is_the_truncated_decomposition_of_the_merged_updates(rank: int, tmp_path: Path) -> None:
    sources = [write(tmp_path / str(i), random_factors(i), lora_alpha=2 + i) for i in range(2)]
    method = PCB(ratio=0.5, scaling=1.5, weights=(1.0, 2.0))
    parts = [updates(each) for each in sources]
    found = updates(merged(method, sources, rank))
    flat = np.stack([np.concatenate([part[name].float().flatten().numpy() for name in sorted(part)]) for part in parts])
    whole = torch.from_numpy(1.5 * method.merge(flat, method.source_weights(2))).double()
    sizes = [found[name].numel() for name in sorted(found)]
    for name, change in zip(sorted(found), whole.split(sizes), strict=True):
        u, s, vh = torch.linalg.svd(change.reshape(found[name].shape), full_matrices=False)
        expected = u[:, :rank] @ torch.diag(s[:rank]) @ vh[:rank]
        torch.testing.assert_close(found[name], expected, atol=1e-4, rtol=1e-4)
