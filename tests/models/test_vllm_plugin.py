"""models/vllm_plugin.py: every ragged architecture reaches vLLM's registry. Oracles: the entry point, written config.json.

vLLM itself is run by benchmarks/clients.py (`vllm-plugin` of docs/clients.md); here a registry of the same signature listens.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest

from compresskit.models.layouts import DECI_FAMILIES, can_be_ragged, configuration
from compresskit.models.load import open_model
from compresskit.models.vllm_plugin import BACKEND, ragged_architectures, register_in_vllm

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


def test_the_entry_point_is_this_function() -> None:
    section = PYPROJECT.read_text().partition('[project.entry-points."vllm.general_plugins"]\n')[2]
    assert section.startswith(f'compresskit = "{register_in_vllm.__module__}:{register_in_vllm.__name__}"\n')


def test_vllm_gets_the_architectures_that_ragged_folders_name(tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, str] = {}
    registry = types.SimpleNamespace(register_model=found.__setitem__)
    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(ModelRegistry=registry))  # type: ignore[arg-type]
    register_in_vllm()
    register_in_vllm()
    assert sorted(found) == sorted(ragged_architectures())
    for family in ("llama", "qwen2", "opt"):
        model = open_model(tiny[family])
        assert can_be_ragged(model.architecture)
        config, _ = configuration(model, [[96], [96], [64]])
        (architecture,) = config["architectures"]
        assert (found.get(architecture) == BACKEND) == (family not in DECI_FAMILIES)
