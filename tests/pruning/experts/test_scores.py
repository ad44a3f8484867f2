"""pruning/experts/scores.py, pruning/experts/reap.py and pruning/experts/frequency.py: by a loop over tokens. Oracle."""

from __future__ import annotations

import pytest
import torch
from expert_problems import CHOSEN, COUNT, experts, routed

from compresskit.pruning.experts.frequency import Frequency
from compresskit.pruning.experts.random import RandomExperts
from compresskit.pruning.experts.reap import REAP
from compresskit.pruning.experts.scores import ExpertStatistics, watched


@torch.no_grad()
def test_scores_are_those_of_a_loop_over_tokens() -> None:
    made, seen = experts(), ExpertStatistics(COUNT)
    batches = [routed(seed, tokens, used=4) for seed, tokens in ((1, 9), (2, 1), (3, 14))]
    with watched(made, seen):
        for batch in batches:
            made(*batch)
    made(*routed(4, 3))  # not watched any more
    strengths: list[list[float]] = [[] for _ in range(COUNT)]
    for x, chosen, weights in batches:
        for token in range(len(x)):
            for place in range(CHOSEN):
                expert = made.get_submodule(str(int(chosen[token, place])))
                gate, up = expert["gate_up_proj"](x[token]).chunk(2)  # type: ignore[index]
                output = expert["down_proj"](torch.tanh(gate) * up)  # type: ignore[index]
                strengths[int(chosen[token, place])].append(float(weights[token, place] * output.norm()))
    assert seen.tokens == 24 and seen.tokens_of.tolist() == [len(each) for each in strengths]
    means = [sum(each) / len(each) if each else 0.0 for each in strengths]
    assert REAP().scores(seen, 0).tolist() == pytest.approx(means, rel=1e-5)
    assert REAP(score="total").scores(seen, 0).tolist() == pytest.approx([sum(each) for each in strengths], rel=1e-5)
    assert Frequency().scores(seen, 0).tolist() == pytest.approx([len(each) / (CHOSEN * 24) for each in strengths])
    assert means[4] == 0.0
    weights = [sum(float(w[c == e].sum()) for _, c, w in batches) for e in range(COUNT)]
    assert seen.weight_share([0, 3]) == pytest.approx((weights[0] + weights[3]) / sum(weights), rel=1e-5)


def test_drawn_experts_differ_by_block_and_seed_and_come_again() -> None:
    seen = ExpertStatistics(COUNT)
    drawn = [RandomExperts(draw=draw).scores(seen, block).tolist() for draw, block in ((0, 0), (0, 1), (1, 0), (0, 0))]
    assert drawn[0] == drawn[3] and len({tuple(each) for each in drawn}) == 3
