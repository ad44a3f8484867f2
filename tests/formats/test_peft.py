"""formats/peft.py: the scaling of every linear is that of stock peft. Oracle."""

from __future__ import annotations

import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model

from compresskit.errors import CheckpointError
from compresskit.formats.peft import CONFIG, Adapter, configuration, multipliers, open_adapter

NAMES = ("block.first", "block.second", "other.first")
KEYS = st.sampled_from(["first", "block.first", "other.first", r"block\..*", "second", "irst", "^block.second"])


class Network(torch.nn.Module):
    """Three linears under the names above."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.other = torch.nn.Module(), torch.nn.Module()
        for name in NAMES:
            parent, _, own = name.partition(".")
            getattr(self, parent).add_module(own, torch.nn.Linear(9, 8, bias=False))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs


def saved(folder: Path, **config: Any) -> tuple[Adapter, torch.nn.Module]:
    """An adapter as stock peft saves it, opened here, and in peft's own network."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's about use_rslora with patterns
        get_peft_model(Network(), LoraConfig(target_modules=["first", "second"], **config)).save_pretrained(folder)
        network = PeftModel.from_pretrained(Network(), folder).base_model.model
    return open_adapter(folder), network


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.integers(1, 5),
    st.sampled_from([0, 1, 3, 16, 2.5, -4]),
    st.booleans(),
    st.dictionaries(KEYS, st.integers(1, 6), max_size=3),
    st.dictionaries(KEYS, st.integers(-3, 20), max_size=3),
)
def test_the_scaling_of_every_linear_is_that_of_stock_peft(
    rank: int, alpha: float, use_rslora: bool, ranks: dict[str, int], alphas: dict[str, int]
) -> None:
    config = {"r": rank, "lora_alpha": alpha, "use_rslora": use_rslora}
    config |= {"rank_pattern": dict(sorted(ranks.items())), "alpha_pattern": alphas}  # peft saves patterns sorted
    with tempfile.TemporaryDirectory() as folder:
        adapter, network = saved(Path(folder), **config)
        assert sorted(adapter.names) == sorted(NAMES)
        for name in NAMES:
            assert adapter.scaling(name) == network.get_submodule(name).scaling["default"]


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("ranks", [(3, 3, 3), (1, 6, 4)])
def test_clients_that_read_one_alpha_alone_scale_every_linear_as_peft_does(
    small: bool, ranks: tuple[int, int, int], tmp_path: Path
) -> None:
    of_linear = dict(zip(NAMES, ranks, strict=True))
    config = configuration("base", of_linear, small)
    kept = {key: config[key] for key in ("r", "lora_alpha", "rank_pattern", "alpha_pattern")}
    adapter, network = saved(tmp_path, **kept)
    for name, rank in of_linear.items():
        stated = multipliers(of_linear, small)[name]
        assert adapter.rank(name) == rank
        assert network.get_submodule(name).scaling["default"] == adapter.scaling(name) == stated
        assert config["lora_alpha"] / rank == stated  # llama.cpp: by the rank of the stored tensor
        if len(set(ranks)) == 1:
            assert config["lora_alpha"] / config["r"] == stated  # older vLLM: by the configuration's rank
    assert (multipliers(of_linear)[max(of_linear, key=of_linear.__getitem__)]) == 1


def test_a_configuration_without_alpha_means_what_it_means_to_peft(tmp_path: Path) -> None:
    adapter, _ = saved(tmp_path, r=4)
    config = json.loads((tmp_path / CONFIG).read_text())
    del config["lora_alpha"]
    (tmp_path / CONFIG).write_text(json.dumps(config))
    expected = LoraConfig.from_pretrained(tmp_path).lora_alpha / 4
    assert open_adapter(tmp_path).scaling(adapter.names[0]) == expected


def test_an_alpha_that_is_no_number_is_refused_by_file_and_linear(tmp_path: Path) -> None:
    adapter, _ = saved(tmp_path, r=4)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | {"alpha_pattern": {"first": "8"}}))
    with pytest.raises(CheckpointError, match=r"adapter_config\.json.*block\.first"):
        open_adapter(tmp_path).scaling("block.first")
    assert adapter.scaling("block.second") == 2
