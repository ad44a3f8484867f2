"""models/load.py: names without the outer module's are read, and shapes that the configuration rules out are refused. Oracle."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_damage import edit_tensors
from tiny_models import VOCABULARY
from transformers import AutoModelForCausalLM

from compresskit.machine.device import Where
from compresskit.models.load import open_model
from compresskit.walk.walk import Walk


@pytest.mark.parametrize(("family", "prefix"), [("gpt2", "transformer."), ("opt", "model.")])
def test_files_of_the_hub_that_leave_out_the_outer_name_are_read(
    family: str, prefix: str, tiny: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny[family], tmp_path / "model"))

    def shorten(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix(prefix)] = tensors.pop(name)

    edit_tensors(folder, shorten)
    tokens = torch.randint(3, VOCABULARY, (2, 20))
    walk = Walk(open_model(folder), tokens, Where(torch.device("cpu"), torch.float32))
    for _ in walk:
        pass
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tiny[family], dtype=torch.float32).eval()(tokens).logits
    assert (torch.cat([logits for _, _, logits in walk.logits()]) - expected).abs().max() < 1e-4


def test_a_config_without_n_inner_means_four_times_the_hidden_size(tiny: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny["gpt2"], tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    del config["n_inner"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(Exception, match=r"expected \[32, 128\]"):
        open_model(folder)
