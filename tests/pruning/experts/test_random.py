"""pruning/experts/random.py: without a refit no text is walked, and what stays is drawn by the seed."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from small_runs import options

from compresskit.job import HELD_BACK
from compresskit.pruning.experts.grouping import best
from compresskit.pruning.experts.random import RandomExperts
from compresskit.pruning.experts.request import open_request
from compresskit.pruning.experts.run import remove_experts
from compresskit.pruning.experts.scores import ExpertStatistics


def test_drawn_experts_need_no_text_but_for_the_judgement(tiny: dict[str, Path], text_file: Path, tmp_path: Path) -> None:
    method, out = RandomExperts(experts=3, refit=False, draw=5), tmp_path / "out"
    request = open_request(method, str(tiny["mixtral"]), out, options(text_file))
    assert request.text.samples == HELD_BACK
    remove_experts(method, str(tiny["mixtral"]), out, options(text_file))
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny["mixtral"], out))
    for index, facts in enumerate(json.loads((out / "compresskit.json").read_text())["facts"]["blocks"]):
        kept = best(method.scores(ExpertStatistics(4), index).tolist(), 3)
        assert facts == {"kept_experts": kept}
        prefix = f"model.layers.{index}.block_sparse_moe."
        assert torch.equal(after[f"{prefix}gate.weight"], before[f"{prefix}gate.weight"][kept])
        for new, old in enumerate(kept):
            assert torch.equal(after[f"{prefix}experts.{new}.w2.weight"], before[f"{prefix}experts.{old}.w2.weight"])
