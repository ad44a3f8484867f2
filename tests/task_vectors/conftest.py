"""Fixtures of the tests of task vectors."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from stock_adapters import make_adapter
from tiny_models import make_adapter as make_lora

from compresskit.task_vectors.compeft import ComPEFT
from compresskit.task_vectors.compress import compress
from compresskit.task_vectors.expand import expand
from compresskit.task_vectors.request import ExpandOptions, TernaryOptions


@pytest.fixture(scope="session")
def adapter(tiny: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random adapter saved by stock peft."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)  # raised inside peft
        return make_adapter(tiny["llama"], tmp_path_factory.mktemp("stock") / "adapter")


@pytest.fixture(scope="session")
def adapters(tiny: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three random adapters."""
    root = tmp_path_factory.mktemp("adapters")
    return [make_lora(root / f"a{seed}", tiny["llama"], seed) for seed in range(3)]


@pytest.fixture(scope="session")
def compressed(adapters: list[Path]) -> tuple[list[Path], list[Path]]:
    """The adapters as (ternary folders, the same expanded)."""
    ternary, expanded = ([each.with_name(f"{each.name}.{kind}") for each in adapters] for kind in "ce")
    for adapter, small, large in zip(adapters, ternary, expanded, strict=True):
        compress(ComPEFT(balance=False), str(adapter), small, TernaryOptions())
        expand(str(small), large, ExpandOptions())
    return ternary, expanded
