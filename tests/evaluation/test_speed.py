"""Speed has every key, finite and positive; memory is counted as it is used. No timing is asserted. Property tests."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from tiny_models import FAMILIES, make_model

from compresskit.errors import RequestError
from compresskit.evaluation import speed as speed_module
from compresskit.evaluation.memory import LiveTensors, available_bytes, weight_bytes
from compresskit.evaluation.speed import speed
from compresskit.machine.device import Where
from compresskit.models.layouts import configuration
from compresskit.models.load import open_model

CPU = torch.device("cpu")


def is_positive(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value) and value > 0


def test_two_models_are_timed_and_compared(tiny: dict[str, Path]) -> None:
    found = speed(open_model(tiny["llama"]), Where(CPU, torch.float32), open_model(tiny["gpt2"]), rounds=2)
    assert all(is_positive(value) for value in found.model_dump().values())
    assert (found.rounds, found.prompt_tokens, found.decoded_tokens) == (2, 224, 32)


@pytest.mark.parametrize("family", FAMILIES)
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


def test_live_tensors_counts_what_is_alive_at_the_same_time() -> None:
    x = torch.zeros(1000)
    with LiveTensors() as tensors:
        y = x + 1
        view = y[:10]
        y.add_(1)
        del y
        assert tensors.live == 4000
        del view
        assert tensors.live == 0
        first = x + 1
        second = x + first
    assert (tensors.live, tensors.peak) == (8000, 8000)
    del first, second
    assert tensors.live == 0


def test_tied_weights_count_once() -> None:
    network = torch.nn.Sequential(torch.nn.Linear(8, 8, bias=False), torch.nn.Linear(8, 8, bias=False))
    assert weight_bytes(network) == 512
    network[1].weight = network[0].weight
    assert weight_bytes(network) == 256


def test_too_little_memory_is_refused_before_loading(tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    available = available_bytes(CPU)
    assert available is None or available > 0
    monkeypatch.setattr(speed_module, "MEMORY_MARGIN", 1e12)
    with pytest.raises(RequestError, match=r"loads 2 whole model.*leave --speed out"):
        speed(open_model(tiny["llama"]), Where(CPU, torch.float32), open_model(tiny["gpt2"]))


def make_ragged(folder: Path) -> Path:
    """The generated files and configuration of the ragged layout, at the widths that the weights have."""
    model = open_model(make_model(folder, "qwen2"))
    config, files = configuration(model, [[96], [96], [64]])
    for block in config["block_configs"]:
        block["ffn"]["intermediate_size"] = 96
    (folder / "config.json").write_text(json.dumps(config))
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def test_a_ragged_checkpoint_runs_without_a_flag_and_without_the_code_in_its_folder(tmp_path: Path) -> None:
    folder = make_ragged(tmp_path / "ragged")
    with (folder / "modeling_compresskit.py").open("a") as file:
        file.write("raise SystemExit('foreign code ran')\n")
    assert is_positive(speed(open_model(folder), Where(CPU, torch.float32), rounds=1).prefill_tokens_per_second)
