"""pruning/experts/evidence.py, pruning/experts/m_smoe.py and pruning/experts/ream.py: by loops over tokens. Oracle."""

from __future__ import annotations

import pytest
import torch
from expert_problems import COUNT, HIDDEN, experts, routed

from compresskit.pruning.experts.evidence import Evidence, Router, collect, compare_activations, compare_outputs
from compresskit.pruning.experts.m_smoe import MSMoE
from compresskit.pruning.experts.ream import REAM
from compresskit.pruning.experts.scores import ExpertStatistics


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.flatten() @ b.flatten()) / (a.norm() * b.norm()))


@torch.no_grad()
def test_similarities_are_those_of_the_definitions() -> None:
    made, router = experts(3), Router(torch.randn(COUNT, HIDDEN, generator=torch.Generator().manual_seed(5)), None)
    batches = [routed(seed, 150)[0] for seed in (1, 2)]  # more than are held at a time
    evidence = Evidence(collect(router, batches), compare_outputs(made, router, [(x, x) for x in batches]))
    x = torch.cat(batches)
    logits = x @ router.weight.T
    outputs = [made.down(e)(made.inner(e, x)) * logits.softmax(dim=-1)[:, e, None] for e in range(COUNT)]
    by_router, by_both = MSMoE().similarity(evidence), REAM().similarity(evidence)
    for i in range(COUNT):
        for j in range(COUNT):
            ours = cosine(logits[:, i], logits[:, j])
            apart = float((logits[:, i] / logits[:, i].norm() - logits[:, j] / logits[:, j].norm()).norm())
            assert float(by_router[i, j]) == pytest.approx(ours, abs=1e-5)
            both = ((cosine(outputs[i], outputs[j]) + 1) / 2 + 1 - apart / 2) / 2
            assert float(by_both[i, j]) == pytest.approx(both, abs=1e-3)
    activations = compare_activations(made, 1, 2, batches)
    ours, theirs = made.inner(1, x), made.inner(2, x)
    assert float(activations[3, 4]) == pytest.approx(cosine(ours[:, 3], theirs[:, 4]), abs=1e-5)


def test_scores_and_weights_are_counts_or_what_an_expert_adds() -> None:
    seen = ExpertStatistics(3)
    seen.tokens_of += torch.tensor([4.0, 0.0, 1.0])
    seen.strengths += torch.tensor([2.0, 0.0, 3.0])
    assert MSMoE().scores(seen, 0).tolist() == MSMoE().weights(seen).tolist() == [4.0, 0.0, 1.0]
    assert REAM().scores(seen, 0).tolist() == REAM().weights(seen).tolist() == [0.5, 0.0, 3.0]
