"""recovery/selection/paser.py: who gets how much and what is taken, on planted pools. Oracle and property tests."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TEXT
from planted_pools import planted_pool, pool_of
from recovery_data import options
from tiny_models import make_model
from transformers import AutoTokenizer

from compresskit.recovery.run import recover
from compresskit.recovery.selection.paser import Paser, efficiency

PAPER: dict[str, Any] = {"lost_by": "divergence", "share_by": "degradation", "pick_by": "efficiency"}
"""What brings `paser` back to its paper."""


@pytest.mark.parametrize("settings", [PAPER, {}])
def test_the_capability_that_was_lost_gets_the_largest_share_and_the_best_of_it_are_taken(settings: dict[str, Any]) -> None:
    pytest.importorskip("scipy")
    pool = planted_pool()
    selection = Paser(budget=0.25, **settings).select(pool)
    assert len(selection.choices) == 15
    lost = next(cluster for cluster in selection.facts["clusters"] if cluster["degradation"] > 0.2)
    assert lost["budget"] == max(cluster["budget"] for cluster in selection.facts["clusters"]) >= 11
    scores = [choice.score for choice in selection.choices if choice.divergence == 0.3]
    assert (scores == sorted(scores, reverse=True)) == bool(settings)
    assert all(
        choice.score == efficiency(choice.divergence or 0, len(pool.samples[choice.sample].tokens))
        for choice in selection.choices
    )


def test_a_conflicting_sample_gives_way_and_only_fills_what_is_missing() -> None:
    texts = ["river bank", "money loan", "bank loan", "river boat", "boat money"]
    pool = pool_of(texts, [10] * 5, [0.5, 0.4, 0.3, 0.2, 0.1], torch.zeros(5, 2))
    taken = [choice.sample for choice in Paser(budget=0.6, cluster_by="none", **PAPER).select(pool).choices]
    assert taken == [0, 1, 3]
    others = Paser(budget=0.6, cluster_by="none", consistency=False, **PAPER).select(pool).choices
    assert [choice.sample for choice in others] == [0, 1, 2]
    filled = Paser(budget=1, cluster_by="none", **PAPER).select(pool).choices
    assert sorted(choice.sample for choice in filled) == [0, 1, 2, 3, 4]
    assert "conflicts" in filled[-1].reason


@pytest.mark.parametrize(
    ("share_by", "small_lost", "budgets"),
    [("total", 0.1, (2, 6)), ("total", 0.3, (4, 4)), ("degradation", 0.1, (4, 4)), ("size", 0.3, (2, 6))],
)
def test_a_budget_goes_by_what_clusters_lost_in_the_mean_or_in_all_or_by_their_size(
    share_by: str, small_lost: float, budgets: tuple[int, int]
) -> None:
    small = [i < 10 for i in range(40)]
    points = torch.tensor([[10.0 if each else 0.0, i % 3] for i, each in enumerate(small)])
    pool = pool_of([f"topic item{i}" for i in range(40)], [10] * 40, [small_lost if each else 0.1 for each in small], points)
    clusters = Paser(budget=0.2, cluster_by="kmeans", clusters=2, share_by=share_by).select(pool).facts["clusters"]
    assert sorted((cluster["size"], cluster["budget"]) for cluster in clusters) == [(10, budgets[0]), (30, budgets[1])]


def test_lost_losses_say_in_place_of_divergences_what_was_lost() -> None:
    small = [i < 10 for i in range(40)]
    points = torch.tensor([[10.0 if each else 0.0, i % 3] for i, each in enumerate(small)])
    losses = [(0.9 if i % 2 else 0.7) if each else -0.1 for i, each in enumerate(small)]
    pool = pool_of([f"topic item{i}" for i in range(40)], [10] * 40, [0.1] * 40, points, losses)
    method = Paser(budget=0.1, cluster_by="kmeans", clusters=2, lost_by="loss", pick_by="lost")
    selection = method.select(pool)
    # A better answer is no loss: the large cluster has lost nothing, and of the small one the most lost are taken.
    assert sorted((each["degradation"], each["budget"]) for each in selection.facts["clusters"]) == [
        (0.0, 0),
        (pytest.approx(0.8), 4),
    ]
    assert {(choice.lost_loss, choice.divergence, choice.score) for choice in selection.choices} == {
        (0.9, 0.1, efficiency(0.9, 10))
    }
    assert all(choice.sample % 2 for choice in selection.choices)


def test_samples_are_drawn_in_proportion_to_what_they_lost_whatever_they_cost() -> None:
    # Of two samples that lost 3 : 1 the first comes first in three of four draws (a sum of 4,000 Bernoulli trials, 5 sigma).
    pool = pool_of(["one", "two"], [100, 5], [0.3, 0.3], torch.zeros(2, 2), [0.3, 0.1])
    method = Paser(budget=0.5, cluster_by="none")
    firsts = sum(method.select(replace(pool, seed=seed)).choices[0].sample == 0 for seed in range(4_000))
    assert abs(firsts / 4_000 - 0.75) < 5 * math.sqrt(0.75 * 0.25 / 4_000)


def test_what_lost_nothing_is_drawn_last() -> None:
    pool = pool_of(["one", "two", "three"], [10] * 3, [0.3] * 3, torch.zeros(3, 2), [-0.5, 0.1, -0.2])
    firsts = {Paser(budget=0.34, cluster_by="none").select(replace(pool, seed=seed)).choices[0].sample for seed in range(50)}
    assert firsts == {1}


def test_a_capability_lost_on_purpose_gets_the_largest_share(tiny: dict[str, Path], tmp_path: Path) -> None:
    """Arithmetic and words; the damaged model can no longer read digits."""
    pytest.importorskip("scipy")
    from checkpoint_damage import edit_tensors

    generator, words = random.Random(1), TEXT.split()
    number = lambda: str(generator.randrange(10**7, 10**8))  # noqa: E731
    rows = [{"prompt": f"{number()} {number()}", "response": f"{number()} {number()}", "source": "digits"} for _ in range(20)]
    for _ in range(40):
        prompt, response = (" ".join(generator.choices(words, k=5)) for _ in range(2))
        rows.append({"prompt": prompt, "response": response, "source": "words"})
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    tokenizer = AutoTokenizer.from_pretrained(tiny["llama"])
    digits = tokenizer("0123456789", add_special_tokens=False).input_ids
    damaged = make_model(tmp_path / "damaged", "llama")

    def without_digits(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.embed_tokens.weight"][digits] = 0

    edit_tensors(damaged, without_digits)
    asked = options(tiny["llama"], file, select_only=True, sequence_length=256)
    clusters = recover(Paser(budget=0.2, clusters=2), str(damaged), tmp_path / "out", asked)["clusters"]
    largest = max(clusters, key=lambda cluster: cluster["budget"])
    assert largest["sources"].get("digits", 0) > largest["sources"].get("words", 0)
    assert largest["budget"] > sum(cluster["budget"] for cluster in clusters) / 2
