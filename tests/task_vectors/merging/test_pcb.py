"""task_vectors/merging/pcb.py: against a slow statement of its definition. Oracle."""

from __future__ import annotations

import numpy as np

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
