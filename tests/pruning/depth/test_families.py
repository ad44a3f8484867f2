"""prune depth: every structure without some of its blocks is what stock transformers makes of it, or is refused. End to end.

The oracle is the stock original whose removed blocks hand on what they are given. `benchmarks/family_table.py --stages depth`
runs all model types.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from families import build
from family_stages import WORKS, cells
from small_runs import slow_but

pytestmark = pytest.mark.usefixtures("own_structures")

EXPECTED = {
    "smollm3": "",  # a list of blocks that rotate
    "deepseek_v3": "",  # one leading dense block, experts and shared ones
    "falcon": "",  # blocks that return tuples
    "gemma3": "",  # images; kinds of attention inside text_config
    "qwen2_moe": "",  # a list of block numbers
    "lfm2": "",  # convolutions between blocks of attention
    "bamba": "",  # numbers of the blocks of attention
    "gpt_neo": "",  # kinds of attention as pairs and repeats
    "llama4_text": "",  # several lists, one of block numbers
    "nemotron_h": "one of each kind has to stay",
    "gemma3n_text": r"its last 2 blocks take keys and values of earlier ones (num_kv_shared_layers)",
    "minimax": "would be another one as block",  # decays by the block's number
    "diffllama": "lambda_init is",  # a constant by the block's number
    "jamba": "would be another one as block",  # kinds by period and offset
    "mllama": "runs on images alone",
}
"""A part of the reason why a type is refused, "" if it works."""


@pytest.mark.parametrize("model_type", slow_but("smollm3", "gemma3n_text", "diffllama", of=EXPECTED))
def test_a_model_without_blocks_is_the_stock_one_or_is_refused(model_type: str, text_file: Path, tmp_path: Path) -> None:
    found = cells(model_type, build(model_type, tmp_path / "source"), tmp_path / "work", text_file, ("depth",))["depth"]
    expected = EXPECTED[model_type]
    assert (found == WORKS) if not expected else (found.startswith("refused: ") and expected in found), found
