"""Selections: budgets as a property, the graph and the clusters against planted structure, compressors by hand."""

from __future__ import annotations

import inspect
import itertools
import math
import zlib
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compresskit.errors import NumericalError, RequestError
from compresskit.methods import METHODS, method_class
from compresskit.recovery.budget import members_of, split_budget
from compresskit.recovery.data.encoding import Sample
from compresskit.recovery.data.held_back import hold_back
from compresskit.recovery.data.instructions import Instruction
from compresskit.recovery.method import Lost, Pool
from compresskit.recovery.selection.clustering import diffusion_clusters, eigengap, kmeans, nearest
from compresskit.recovery.selection.concepts import ConceptGraph, concepts_of
from compresskit.recovery.selection.dsir import distribution, hashed_ngrams
from compresskit.recovery.selection.paser import Paser, efficiency
from compresskit.recovery.selection.zip_fit import alignments
from compresskit.recovery.training.batches import order_of, rectangles, rows, steps_of
from compresskit.recovery.training.finetune import loss_curve
from compresskit.recovery.training.ranks import block_ranks, known_importances

CLUSTERS = 3
PAPER: dict[str, Any] = {"lost_by": "divergence", "share_by": "degradation", "pick_by": "efficiency"}
"""What brings `paser` back to its paper."""


@given(st.data())
def test_a_budget_is_dealt_exactly_and_never_above_a_clusters_size(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(0, 60), min_size=1, max_size=12))
    weight = st.floats(0, 1, allow_subnormal=False)
    weights = data.draw(st.lists(weight, min_size=len(sizes), max_size=len(sizes)))
    budget = data.draw(st.integers(0, sum(sizes)))
    counts = split_budget(weights, sizes, budget)
    assert sum(counts) == budget
    assert all(0 <= count <= size for count, size in zip(counts, sizes, strict=True))


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=12), st.integers(0, 500))
def test_without_caps_every_cluster_gets_its_quota_rounded_down_or_up(weights: list[float], budget: int) -> None:
    counts = split_budget(weights, [10_000] * len(weights), budget)
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count - budget * weight / math.fsum(weights)) < 1 + 1e-9


def test_what_a_full_cluster_cannot_take_flows_on_in_proportion() -> None:
    assert split_budget([0.8, 0.1, 0.1], [2, 50, 50], 12) == [2, 5, 5]
    assert split_budget([1.0, 0.0], [3, 9], 5) == [3, 2]
    with pytest.raises(RequestError, match="12 are there"):
        split_budget([1.0], [12], 13)


def blobs(size: int = 40) -> tuple[torch.Tensor, np.ndarray]:
    generator = torch.Generator().manual_seed(0)
    centres = torch.eye(CLUSTERS, 8) * 4
    points = torch.cat([centre + 0.3 * torch.randn(size, 8, generator=generator) for centre in centres])
    return points, np.repeat(np.arange(CLUSTERS), size)


def same_partition(first: np.ndarray, second: np.ndarray) -> bool:
    return len(set(zip(first.tolist(), second.tolist(), strict=True))) == len(set(first.tolist())) == len(set(second.tolist()))


def test_nearest_neighbours_are_those_of_the_whole_distance_matrix() -> None:
    points, _ = blobs(10)
    distances = torch.cdist(points, points).fill_diagonal_(torch.inf)
    indices, squared = nearest(points, 4)
    assert torch.allclose(squared.sqrt(), distances.topk(4, largest=False).values, atol=1e-3)
    assert torch.equal(indices.sort().values, distances.topk(4, largest=False).indices.sort().values)


def test_planted_clusters_and_their_number_are_found() -> None:
    pytest.importorskip("scipy")
    points, planted = blobs()
    assert same_partition(diffusion_clusters(points, 0, 10, 8, seed=0), planted)
    assert same_partition(kmeans(points, CLUSTERS, seed=0), planted)


def test_rings_that_k_means_cannot_tell_apart_are_clusters_of_the_neighbour_graph() -> None:
    pytest.importorskip("scipy")
    angles = torch.linspace(0, 2 * math.pi, 121)[:-1]
    ring = torch.stack([angles.cos(), angles.sin()], dim=1)
    points, planted = torch.cat([ring, 3 * ring]), np.repeat([0, 1], 120)
    assert same_partition(diffusion_clusters(points, 2, 6, 8, seed=0), planted)
    assert not same_partition(kmeans(points, 2, seed=0), planted)


def test_the_eigengap_is_where_the_spectrum_falls_most() -> None:
    assert eigengap(np.array([1.0, 0.99, 0.98, 0.5, 0.4])) == 3


def test_a_sample_conflicts_where_it_pairs_known_concepts_never_seen_together() -> None:
    graph = ConceptGraph()
    graph.accept(frozenset({"river", "bank"}))
    graph.accept(frozenset({"money", "loan"}))
    assert graph.conflicts(frozenset({"river", "bank", "boat"})) == 0
    assert graph.conflicts(frozenset({"bank", "loan", "money"})) == 2
    assert concepts_of(["river bank", "bank loan", "unique"]) == [{"bank"}, {"bank"}, frozenset()]


@pytest.mark.parametrize("failures", [0, 2, 3])
def test_a_sparse_solver_that_runs_out_of_vectors_is_given_more(failures: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many equal samples in a small graph do that to it, by the rounding of the machine."""
    solver = pytest.importorskip("scipy.sparse.linalg")
    eigsh, asked = solver.eigsh, []

    def failing(operator: object, ncv: int, **how: Any) -> tuple[np.ndarray, np.ndarray]:
        asked.append(ncv)
        if len(asked) <= failures:
            raise solver.ArpackError(3)
        found: tuple[np.ndarray, np.ndarray] = eigsh(operator, ncv=ncv, **how)
        return found

    failing.__signature__ = inspect.signature(eigsh)  # type: ignore[attr-defined]
    points, planted = blobs(20)
    monkeypatch.setattr("compresskit.recovery.selection.clustering.DENSE_SAMPLES", 0)
    monkeypatch.setattr(solver, "eigsh", failing)
    if failures == 3:
        with pytest.raises(NumericalError, match="--cluster-by kmeans"):
            diffusion_clusters(points, CLUSTERS, 10, 8, 0)
    else:
        assert same_partition(diffusion_clusters(points, CLUSTERS, 10, 8, 0), planted)
    assert asked == [19, 37, 60][: failures + 1]


def pool_of(
    texts: list[str], lengths: list[int], jsd: list[float], vectors: torch.Tensor, losses: list[float] | None = None
) -> Pool:
    samples = [
        Sample(Instruction(i, "f", [{"role": "user", "content": text}], "yes", f"s{i % 2}"), [1] * length, 1)
        for i, (text, length) in enumerate(zip(texts, lengths, strict=True))
    ]
    return Pool(samples, 0, lambda _: vectors, lambda: Lost(jsd, losses or jsd), lambda: ["seven quiet engineers"] * 3)


def planted_pool() -> Pool:
    points, planted = blobs(20)
    texts = [f"topic{k} item{i}" for i, k in enumerate(planted)]
    return pool_of(texts, [10 + i % 7 for i in range(len(texts))], [0.3 if k == 1 else 0.05 for k in planted], points)


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


@pytest.mark.parametrize("name", METHODS["recover"])
def test_every_selection_takes_its_budget_once_each_and_the_same_again(name: str) -> None:
    pytest.importorskip("scipy")
    method = method_class("recover", name)(**({} if name == "full" else {"budget": 0.2}))
    first, second = (method.select(planted_pool()).choices for _ in range(2))
    assert first == second
    assert len({choice.sample for choice in first}) == len(first) == (60 if name == "full" else 12)


def test_hashed_frequencies_and_compression_distances_are_those_of_the_definitions() -> None:
    assert len(hashed_ngrams("One two, three", 100)) == 5
    assert distribution([[0, 0, 1]], 4).tolist() == pytest.approx([3 / 7, 2 / 7, 1 / 7, 1 / 7])
    x, y = b"the quick brown fox " * 5, b"jumps over"
    size = {text: len(zlib.compress(text, 6)) for text in (x, y, x + y)}
    expected = 1 - (size[x + y] - min(size[x], size[y])) / max(size[x], size[y])
    assert alignments([x], [y]) == [pytest.approx(expected)]


@given(st.lists(st.floats(0, 10), min_size=1, max_size=20), st.integers(1, 64))
def test_ranks_keep_their_total_and_no_block_goes_without(importances: list[float], rank: int) -> None:
    ranks = block_ranks(rank, importances)
    assert sum(ranks) == rank * len(importances)
    assert min(ranks) >= 1


def test_importances_come_from_the_pruning_in_the_chain_of_manifests() -> None:
    pruned = {"stage": "prune", "facts": {"importances": [1.0, 3.0]}, "source": None}
    assert known_importances({"stage": "quantize", "facts": {}, "source": pruned}, 2) == [1.0, 3.0]
    assert known_importances(pruned, 3) is None
    assert known_importances(None, 2) is None


@given(
    st.lists(st.integers(1, 900), min_size=1, max_size=40),
    st.integers(1, 9),
    st.integers(1, 12),
    st.sampled_from([300, 1024, 4096]),
)
def test_a_course_shows_every_sample_before_any_twice_in_bounded_micro_batches(
    lengths: list[int], batch: int, steps: int, most: int
) -> None:
    order = order_of(len(lengths), batch, 1.0, steps, 0)
    padded = steps_of(lengths, order, partial(rectangles, most_tokens=most))
    packed = steps_of(lengths, order, partial(rows, most_tokens=most))
    assert len(padded) == len(packed) == steps
    seen = [i for step in padded for micro in step for i in micro]
    counts = np.bincount(seen, minlength=len(lengths))
    assert counts.max() - counts.min() <= 1 + (batch > len(lengths))
    for micro in (micro for step in padded for micro in step):
        assert len(micro) == 1 or len(micro) * max(lengths[i] for i in micro) <= most
    for micro in (micro for step in packed for micro in step):
        assert len(micro) == 1 or sum(lengths[i] for i in micro) <= most
    for rectangular, rowed in zip(padded, packed, strict=True):
        assert sorted(itertools.chain(*rectangular)) == sorted(itertools.chain(*rowed))
        assert all(rowed)


def test_a_loss_curve_is_one_line_from_the_highest_to_the_lowest_mark() -> None:
    assert loss_curve([3.0, 2.0, 1.0]) == "█▅▁"
    assert loss_curve([float(i) for i in range(1000)])[0] == "▁"
    assert len(loss_curve([1.0] * 1000)) == 40
    assert loss_curve([]) == ""


def test_each_source_of_a_file_gives_its_share_to_what_is_held_back() -> None:
    sources = ["a"] * 40 + ["b"] * 20
    samples = [Sample(Instruction(i, "one.jsonl", [], "", name), [i], 1) for i, name in enumerate(sources)]
    pool, held = hold_back(samples, 0.1, 0)
    assert sorted(sample.instruction.source for sample in held) == ["a"] * 4 + ["b"] * 2
    assert sorted(sample.tokens[0] for sample in pool + held) == list(range(60))
    assert hold_back(samples, 0.1, 0)[1] == held != hold_back(samples, 0.1, 1)[1]


def test_members_are_the_positions_of_each_label() -> None:
    assert members_of([1, 0, 1, 3]) == [[1], [0, 2], [], [3]]
