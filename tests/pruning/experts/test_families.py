"""prune reap and m-smoe: every form of experts loads in stock transformers with the logits of our own walk, or is refused.

End to end. `benchmarks/family_table.py --stages experts` runs all model types.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from families import TINY, build
from family_stages import WORKS, cells, stock, walked, write_tokenizer
from small_runs import options

from compresskit.pruning.experts.reap import REAP
from compresskit.pruning.experts.run import remove_experts

pytestmark = [pytest.mark.usefixtures("own_structures"), pytest.mark.slow]

EXPECTED = {
    "minimax_m2": "",  # a sigmoid's scores, corrected by a bias that lies beside the router
    "ernie4_5_moe": "",  # a correction with an axis before the experts'
    "granitemoe": "",  # stored as one tensor, under other names
    "nemotron_h": "",  # no gate; state-space blocks between
    "jamba": "",  # experts in some blocks by a period
    "qwen3_vl_moe": "",  # inside text_config
    "dbrx": "dbrx has no experts that can be removed",
    "llama4_text": "llama4_text: holds its experts in a form of its own",
}
"""A part of the reason why a type is refused, "" if it works."""


@pytest.mark.parametrize("model_type", EXPECTED)
def test_fewer_experts_are_a_stock_model_or_refused(model_type: str, text_file: Path, tmp_path: Path) -> None:
    found = cells(model_type, build(model_type, tmp_path / "source"), tmp_path / "work", text_file, ("experts",))["experts"]
    expected = EXPECTED[model_type]
    assert (found == WORKS) if not expected else (found.startswith("refused: ") and expected in found), found


def test_a_router_with_groups_keeps_as_many_of_each(text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSeek-V3 with two groups of four; a token takes both of its experts from one."""
    monkeypatch.setitem(TINY, "deepseek_v3", TINY["deepseek_v3"] | {"n_routed_experts": 8})
    source, out = build("deepseek_v3", tmp_path / "source"), tmp_path / "out"
    write_tokenizer(source)
    remove_experts(REAP(experts=4), str(source), out, options(text_file))
    blocks = [each for each in json.loads((out / "compresskit.json").read_text())["facts"]["blocks"] if each]
    assert blocks and all([expert // 4 for expert in each["kept_experts"]] == [0, 0, 1, 1] for each in blocks)
    assert (stock("deepseek_v3", out) - walked(out)).abs().max() < 1e-4
