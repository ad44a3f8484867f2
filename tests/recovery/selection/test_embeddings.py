"""recovery/selection/embeddings.py: means over each sample's own tokens. Oracle: each sample alone."""

from __future__ import annotations

from pathlib import Path

import torch
from recovery_data import samples_of

from compresskit.machine.device import Where
from compresskit.models.load import open_model
from compresskit.recovery.forward import mean_hidden, open_walk, walked
from compresskit.recovery.selection.embeddings import centred, own_states

CPU = torch.device("cpu")


def test_embeddings_are_means_over_each_samples_own_tokens(tiny: dict[str, Path]) -> None:
    samples = samples_of()
    walk = open_walk(open_model(tiny["llama"]), Where(CPU, torch.float32))
    together = own_states(walk, samples)
    assert torch.allclose(centred(together).norm(dim=1), torch.ones(len(samples)))
    alone = torch.cat([mean_hidden(walked([walk], [sample])[0], [sample]) for sample in samples])
    assert torch.allclose(together, alone, atol=1e-4)
