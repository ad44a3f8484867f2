"""Samples, stock logits and requests for the tests of recovery."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from compresskit.recovery.data.encoding import Sample
from compresskit.recovery.data.instructions import Instruction
from compresskit.recovery.forward import walked
from compresskit.recovery.options import RecoverOptions

SMALL: dict[str, Any] = {"sequence_length": 256, "batch_size": 4, "held_back": 0.1, "rank": 4}


@torch.no_grad()
def stock_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Of the whole model, as transformers loads it."""
    logits: torch.Tensor = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(tokens).logits
    return logits


def samples_of(lengths: tuple[int, ...] = (9, 30, 17, 24)) -> list[Sample]:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 250, (length,), generator=generator).tolist() for length in lengths]
    return [Sample(Instruction(i, "f", [], "", "s"), row, 4) for i, row in enumerate(rows)]


def killed_after_a_chunk(done: int, total: int) -> None:
    raise KeyboardInterrupt


def asked_of(monkeypatch: pytest.MonkeyPatch, module: str) -> list[int]:
    """Fills up with the number of samples of every walk that the module makes."""
    found: list[int] = []
    monkeypatch.setattr(
        f"compresskit.recovery.{module}.walked", lambda walks, part: found.append(len(part)) or walked(walks, part)
    )
    return found


def options(original: Path, file: Path, **changes: Any) -> RecoverOptions:
    return RecoverOptions(**{"original": str(original), "data": (str(file),), **SMALL, **changes})
