"""The real model through the whole path: prune, load with stock transformers, evaluate. Needs the demo checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from compresskit.checkpoint.demo import demo_checkpoint
from compresskit.evaluation.request import EvaluateOptions
from compresskit.evaluation.run import evaluate
from compresskit.pruning.cfsp import CFSP
from compresskit.pruning.run import prune
from compresskit.stages import Options


@pytest.mark.slow
def test_the_demo_model_survives_pruning_and_loads_in_stock_transformers(tmp_path: Path) -> None:
    result = prune(
        CFSP(), str(demo_checkpoint()), tmp_path / "out", Options(calibration="builtin", samples=4, sequence_length=128)
    )
    assert result["sparsity_achieved"] == pytest.approx(0.2, abs=16 / 1536)
    assert result["layout"] == "ragged"
    report = evaluate(str(tmp_path / "out"), EvaluateOptions(against=str(demo_checkpoint()), windows=4, sequence_length=128))
    assert 1 < report["perplexity_ratio"] < 2.5
    assert report["size_ratio"] == pytest.approx(0.882, abs=0.01)
    assert report["warning"] is None
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    with torch.no_grad():
        assert stock(torch.arange(5, 25)[None]).logits.isfinite().all()
