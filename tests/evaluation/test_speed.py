"""evaluation/speed.py: every key is there, finite and positive; no timing is asserted. Property tests."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from small_runs import slow_but
from tiny_models import FAMILIES

from compresskit.errors import RequestError
from compresskit.evaluation import speed as speed_module
from compresskit.evaluation.memory import available_bytes
from compresskit.evaluation.speed import speed
from compresskit.machine.device import Where
from compresskit.models.load import open_model

CPU = torch.device("cpu")


def is_positive(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value) and value > 0


def test_two_models_are_timed_and_compared(tiny: dict[str, Path]) -> None:
    found = speed(open_model(tiny["llama"]), Where(CPU, torch.float32), open_model(tiny["gpt2"]), rounds=2)
    assert all(is_positive(value) for value in found.model_dump().values())
    assert (found.rounds, found.prompt_tokens, found.decoded_tokens) == (2, 224, 32)


@pytest.mark.parametrize("family", slow_but("llama", "gpt2", "mixtral", of=FAMILIES))
def test_every_family_is_timed_alone(family: str, tiny: dict[str, Path]) -> None:
    found = speed(open_model(tiny[family]), Where(CPU, torch.float32), rounds=1).model_dump()
    alone = {name for name in found if not name.startswith("reference") and not name.endswith("speedup")}
    assert all(is_positive(found[name]) for name in alone)
    assert all(found[name] is None for name in found.keys() - alone)


def test_peak_memory_is_the_weights_and_what_a_prefill_holds(tiny: dict[str, Path]) -> None:
    parameters = open_model(tiny["llama"]).checkpoint.parameters
    full, half = (
        speed(open_model(tiny["llama"]), Where(CPU, dtype), rounds=1).peak_memory_bytes
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert 4 * parameters < full < 4 * parameters + (1 << 22)
    assert half < full
    assert speed(open_model(tiny["llama"]), Where(CPU, torch.float32), rounds=1).peak_memory_bytes == full


def test_too_little_memory_is_refused_before_loading(tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    available = available_bytes(CPU)
    assert available is None or available > 0
    monkeypatch.setattr(speed_module, "MEMORY_MARGIN", 1e12)
    with pytest.raises(RequestError, match=r"loads 2 whole model.*leave --speed out"):
        speed(open_model(tiny["llama"]), Where(CPU, torch.float32), open_model(tiny["gpt2"]))
