"""Fixtures of the tests of recovery."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from conftest import TEXT
from recovery_data import samples_of
from tiny_models import make_model

from compresskit.models.load import open_model
from compresskit.recovery.forward import chunks


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty samples of two sources."""
    path = tmp_path_factory.mktemp("data") / "instructions.jsonl"
    generator, words = random.Random(0), TEXT.split()
    rows = [
        {"instruction": " ".join(generator.choices(words, k=4)), "input": "", "output": " ".join(generator.choices(words, k=5))}
        for _ in range(40)
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


@pytest.fixture(scope="session")
def damaged(tiny: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny llama with noise on its weights."""
    from checkpoint_damage import edit_tensors

    folder = make_model(tmp_path_factory.mktemp("damaged") / "llama", "llama")
    generator = torch.Generator().manual_seed(3)

    def noisy(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if "mlp" in name:
                tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))

    edit_tensors(folder, noisy)
    return folder


@pytest.fixture
def chunks_of_two(monkeypatch: pytest.MonkeyPatch, tiny: dict[str, Path]) -> None:
    """Of the four samples below the longest two come first."""
    monkeypatch.setattr("compresskit.recovery.forward.HIDDEN_BYTES", 65 * 4 * open_model(tiny["llama"]).hidden_size)
    assert [len(chunk) for chunk in chunks(samples_of(), open_model(tiny["llama"]).hidden_size)] == [2, 2]
