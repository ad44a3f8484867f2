"""pruning/experts/merge.py: copies merge without loss, and what is written is the aligned mean of the groups. End to end."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from expert_networks import logits_of, stock
from families import build
from family_stages import walked, write_tokenizer
from small_runs import options, slow_but
from tiny_models import make_model

from compresskit.errors import CompresskitError
from compresskit.pruning.experts.m_smoe import MSMoE
from compresskit.pruning.experts.method import MergingMethod
from compresskit.pruning.experts.ream import REAM
from compresskit.pruning.experts.request import open_request
from compresskit.pruning.experts.run import remove_experts

NEARLY = 1 + 1e-5
"""By this a copy's router row is longer, so that tokens are sent to both."""

pytestmark = pytest.mark.usefixtures("own_structures")


def facts_of(out: Path) -> list[dict[str, Any]]:
    return [each for each in json.loads((out / "compresskit.json").read_text())["facts"]["blocks"] if each]


@pytest.mark.parametrize(("method", "kinds"), [(MSMoE(experts=2), 2), (REAM(experts=2, group_size=2), 1)])
def test_permuted_copies_merge_without_loss(method: MergingMethod, kinds: int, text_file: Path, tmp_path: Path) -> None:
    """Experts 2 and 3 are 0 and 1, or all are 0, with their neurons in another order; a token goes to one of four."""
    source = make_model(tmp_path / "source", "qwen3_moe", num_experts_per_tok=1, norm_topk_prob=True)
    network = stock(source)
    for number, block in enumerate(network.model.layers):
        experts, router, width = block.mlp.experts, block.mlp.gate.weight.data, 64
        router[:2] -= router[:2].mean(dim=0)  # two opposite rows: both get half of the tokens
        router[2:] = router[:2] * NEARLY
        for copy in range(kinds, 4):
            order = torch.randperm(width, generator=torch.Generator().manual_seed(10 * number + copy))
            gate, up = experts.gate_up_proj.data[copy % kinds].chunk(2)
            experts.gate_up_proj.data[copy] = torch.cat([gate[order], up[order]])
            experts.down_proj.data[copy] = experts.down_proj.data[copy % kinds][:, order]
    network.save_pretrained(source)
    expected = logits_of(network)
    remove_experts(method, str(source), tmp_path / "out", options(text_file))
    for facts in facts_of(tmp_path / "out"):
        assert all(facts["tokens_by_expert"])
        assert kinds == 1 or sorted(map(sorted, facts["groups"])) == [[0, 2], [1, 3]]
    assert torch.allclose(logits_of(stock(tmp_path / "out")), expected, atol=1e-5)


@pytest.mark.parametrize("method", [MSMoE(experts=2, refit=False), REAM(experts=2, refit=False)])
@pytest.mark.parametrize("model_type", slow_but("mixtral", of=("mixtral", "gpt_oss", "qwen2_moe", "olmoe", "qwen3_moe")))
def test_what_is_written_is_the_mean_of_the_groups(
    method: MergingMethod, model_type: str, text_file: Path, tmp_path: Path
) -> None:
    """By sums over the neurons, which no order of them changes; stock transformers runs what our walk runs."""
    source, out = build(model_type, tmp_path / "source"), tmp_path / "out"
    write_tokenizer(source)
    remove_experts(method, str(source), out, options(text_file))
    assert torch.allclose(logits_of(stock(out)), walked(out), atol=1e-5)
    before, after = stock(source).state_dict(), stock(out).state_dict()
    names = sorted(name for name in before if name.endswith("experts.down_proj"))
    for name, facts in zip(names, facts_of(out), strict=True):
        router = next(n for n in before if n.startswith(name.split("mlp")[0]) and n.endswith((".gate.weight", "router.weight")))
        kept = [group[0] for group in facts["groups"]]
        assert sorted(itertools.chain(*facts["groups"])) == [0, 1, 2, 3] and facts["kept_experts"] == kept
        assert facts["router_refitted"] is not torch.equal(after[router], before[router][kept])
        sums = before[name].sum(dim=1 if model_type == "gpt_oss" else 2)
        for number, group in enumerate(facts["groups"]):
            found = after[name][number].sum(dim=0 if model_type == "gpt_oss" else 1)
            if len(group) == 1:
                assert torch.equal(found, sums[group[0]])
            elif isinstance(method, MSMoE):
                weights = torch.tensor([float(facts["tokens_by_expert"][expert]) for expert in group])
                assert torch.allclose(found, (weights / weights.sum()) @ sums[group], atol=1e-5)
            else:  # somewhere between its members
                low, high = sums[group].min(dim=0).values, sums[group].max(dim=0).values
                assert bool(((found >= low - 1e-5) & (found <= high + 1e-5)).all())


def test_groups_that_do_not_hold_all_are_refused(tiny: dict[str, Path], text_file: Path, tmp_path: Path) -> None:
    source = make_model(tmp_path / "source", "qwen3_moe", num_experts=8)
    with pytest.raises(
        CompresskitError, match="--group-size 2: 3 groups of it do not hold 8 experts; pass --group-size 3 or more"
    ):
        open_request(REAM(experts=3, group_size=2), str(source), tmp_path / "out", options(text_file))
