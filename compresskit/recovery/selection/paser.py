"""PASER: spend the budget on the capabilities that the compressed model lost, on the samples that repair most per cost.

PASER, arXiv 2502.12594, section 3. For clusters k of the pool and a budget of b samples:

    CDS_k = mean over the cluster's samples of their degradation                     (degradation.py)
    n_k   = b CDS_k / sum CDS, whole numbers, at most the cluster's size             (budget.py)
    IES(i) = JSD_i / log(cost_i),  cost_i = (tokens of sample i)^2
    taken: the n_k of largest IES that do not contradict the concept graph           (concepts.py)

symbol  meaning                           shape        name here
JSD_i   degradation of a sample, nats     (samples,)   lost
CDS_k   degradation of a cluster          (clusters,)  degradations
n_k     samples of a cluster              (clusters,)  counts
IES     efficiency score                  (samples,)   scores

Differs from the paper, by default, in three choices; the option in each line selects the paper's:

    lost_i replaces JSD_i: the increase of the response's loss, at least 0                  --lost-by divergence
    n_k by size_k CDS_k: a mean gives a cluster of 40 samples as much as one of 800         --share-by degradation
    taken: a draw in proportion to lost_i; the largest IES are all short and similar        --pick-by efficiency

In five comparisons at 10% these choices lowered the held-back loss by 0.04 nats on average, in three of them by 0.003
(docs/evidence/recover.md, Which selection).

Also differs: clusters are found in a sparse neighbour graph (clustering.py). A cluster that runs out of consistent samples
is filled with the skipped ones of fewest conflicts, so that n_k stays exact. Each of the five parts can be switched off by
its own setting.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from compresskit.recovery.budget import members_of, split_budget
from compresskit.recovery.method import BudgetMethod, Choice, Pool, Selection
from compresskit.recovery.selection.concepts import ConceptGraph, concepts_of


def cost(tokens: int) -> int:
    """Cost of a sample: quadratic in its length."""
    return tokens**2


def efficiency(lost: float, tokens: int) -> float:
    """IES of a sample's loss in nats; the logarithm uses a cost of at least 2 tokens, so that it is positive."""
    return lost / math.log(cost(max(2, tokens)))


REASONS = {
    "efficiency": "best score of its cluster",
    "drawn": "drawn from its cluster by what was lost",
    "lost": "most lost of its cluster",
    "random": "drawn from its cluster",
}
"""Reason for a selected sample, by `pick_by`."""


class Paser(BudgetMethod):
    """Clusters, their degradation, an exact budget, a draw in proportion, consistency."""

    passes: ClassVar[float] = 2.0

    clusters: Annotated[int, Field(ge=0)] = 0
    """Number of clusters; 0 finds it by the eigengap."""
    most_clusters: Annotated[int, Field(ge=2)] = 20
    """Maximum number of clusters that the eigengap may find."""
    neighbours: Annotated[int, Field(ge=1)] = 15
    """Neighbours per sample in the graph."""
    embedder: str = ""
    """Folder of an encoder; default: the compressed model's own hidden states."""
    lost_by: Literal["loss", "divergence"] = "loss"
    """Degradation of a sample: loss (increase of its response's loss) or divergence (of its predictions)."""
    cluster_by: Literal["diffusion", "kmeans", "none"] = "diffusion"
    """Clustering of the samples: diffusion, kmeans, or none (one cluster)."""
    share_by: Literal["total", "degradation", "size"] = "total"
    """Split of the budget over clusters: by total degradation, mean degradation (degradation), or number of samples (size)."""
    pick_by: Literal["drawn", "efficiency", "lost", "random"] = "drawn"
    """Order of samples in a cluster: drawn (at random, in proportion to what was lost), efficiency, lost or random."""
    consistency: bool = True
    """Skip samples that pair known concepts never seen together."""

    def select(self, pool: Pool) -> Selection:
        """Run the five parts in order."""
        divergences, losses = pool.lost()  # first: the pass that measures them also computes the vectors
        lost = [max(0.0, each) for each in losses] if self.lost_by == "loss" else divergences
        scores = [efficiency(each, len(sample.tokens)) for each, sample in zip(lost, pool.samples, strict=True)]
        labels = self._labels(pool)
        members = members_of(labels)
        sizes = [len(each) for each in members]
        degradations = [statistics.fmean(lost[i] for i in each) for each in members]
        counts = split_budget(self._weights(sizes, degradations), sizes, self.count(pool))
        order = self._order(pool.seed, lost, scores)
        concepts = concepts_of([sample.instruction.text for sample in pool.samples]) if self.consistency else None
        graph = ConceptGraph()
        choices: list[Choice] = []
        skipped = 0
        # The most degraded cluster first: its concepts constrain the later clusters.
        for k in sorted(range(len(members)), key=lambda k: -degradations[k]):
            taken, passed = _take(sorted(members[k], key=lambda i: -order[i]), counts[k], graph, concepts, REASONS[self.pick_by])
            skipped += passed
            for i, reason in taken:
                choices.append(Choice(i, reason, k, divergences[i], cost(len(pool.samples[i].tokens)), scores[i], losses[i]))
        clusters = [
            {"size": size, "degradation": degradation, "budget": count, "sources": _sources(pool, each)}
            for size, degradation, count, each in zip(sizes, degradations, counts, members, strict=True)
        ]
        return Selection(choices, {"clusters": clusters, "conflicting": skipped}, labels if self.cluster_by != "none" else [])

    def _labels(self, pool: Pool) -> list[int]:
        """Cluster of every sample."""
        if self.cluster_by == "none":
            return [0] * len(pool.samples)
        from compresskit.recovery.selection import clustering

        points = pool.embeddings(self.embedder)
        if self.cluster_by == "kmeans":
            labels = clustering.kmeans(points, self.clusters or self.most_clusters, pool.seed)
        else:
            labels = clustering.diffusion_clusters(points, self.clusters, self.neighbours, self.most_clusters, pool.seed)
        return [int(k) for k in labels]

    def _weights(self, sizes: Sequence[int], degradations: Sequence[float]) -> list[float]:
        """Weights for splitting the budget."""
        totals = [size * degradation for size, degradation in zip(sizes, degradations, strict=True)]
        return {"degradation": [*degradations], "total": totals, "size": [float(size) for size in sizes]}[self.share_by]

    def _order(self, seed: int, lost: Sequence[float], scores: Sequence[float]) -> list[float]:
        """Sort keys of the samples in a cluster, largest first."""
        generator = random.Random(seed)  # noqa: S311
        return {
            "efficiency": lambda: [*scores],
            "drawn": lambda: [_drawn(each, generator) for each in lost],
            "lost": lambda: [*lost],
            "random": lambda: [generator.random() for _ in scores],
        }[self.pick_by]()


def _drawn(weight: float, generator: random.Random) -> float:
    """Random sort key; taking the largest keys draws without replacement in proportion to the weights.

    Source: Efraimidis and Spirakis, Weighted random sampling with a reservoir, 2006, algorithm A.

    Returns:
        log u^(1 / weight) for a uniform u, at most 0; a weight of 0 sorts last.
    """
    chance = 1 - generator.random()  # (0, 1]: the logarithm is finite
    return math.log(chance) / weight if weight > 0 else -math.inf


def _take(
    ordered: Sequence[int], count: int, graph: ConceptGraph, concepts: Sequence[frozenset[str]] | None, reason: str
) -> tuple[list[tuple[int, str]], int]:
    """Return (`count` samples with reasons, number skipped): consistent samples first, then those of fewest conflicts."""
    if concepts is None:
        return [(i, reason) for i in ordered[:count]], 0
    taken: list[tuple[int, str]] = []
    skipped: list[int] = []
    for i in ordered:
        if len(taken) == count:
            break
        if graph.conflicts(concepts[i]):
            skipped.append(i)
        else:
            graph.accept(concepts[i])
            taken.append((i, f"{reason}, consistent"))
    missing = count - len(taken)
    place = {i: position for position, i in enumerate(skipped)}
    for i in sorted(skipped, key=lambda i: (graph.conflicts(concepts[i]), place[i]))[:missing]:
        taken.append((i, f"fills the budget, {graph.conflicts(concepts[i])} conflicts"))
    return taken, len(skipped) - missing


def _sources(pool: Pool, members: Sequence[int]) -> dict[str, int]:
    """Number of a cluster's samples per data source, largest first."""
    counts: dict[str, int] = {}
    for i in members:
        name = pool.samples[i].instruction.source
        counts[name] = counts.get(name, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1]))
