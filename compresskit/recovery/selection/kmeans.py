"""kmeans: equally many samples from every cluster of the vectors, for diversity alone.

arXiv 2409.11378 clusters sentence embeddings and draws the same number from each cluster. Differs from the paper: the draw
is uniform, because the paper's quality scores come from a second model, and it is not iterated.
"""

from __future__ import annotations

import random
from typing import Annotated, ClassVar

from pydantic import Field

from compresskit.recovery.budget import members_of, split_budget
from compresskit.recovery.method import BudgetMethod, Choice, Pool, Selection


class KMeans(BudgetMethod):
    """Diversity: split the budget equally over clusters."""

    passes: ClassVar[float] = 1.0

    clusters: Annotated[int, Field(ge=1)] = 20
    """Number of clusters."""
    embedder: str = ""
    """Folder of an encoder; default: the compressed model's own hidden states."""

    def select(self, pool: Pool) -> Selection:
        """Cluster, split the budget, draw."""
        from compresskit.recovery.selection import clustering

        labels = [int(k) for k in clustering.kmeans(pool.embeddings(self.embedder), self.clusters, pool.seed)]
        members = members_of(labels)
        sizes = [len(each) for each in members]
        counts = split_budget([1.0] * len(sizes), sizes, self.count(pool))
        generator = random.Random(pool.seed)  # noqa: S311
        choices = [
            Choice(sample, "drawn from its cluster", cluster)
            for cluster, (each, count) in enumerate(zip(members, counts, strict=True))
            for sample in generator.sample(each, count)
        ]
        clusters = [{"size": size, "budget": count} for size, count in zip(sizes, counts, strict=True)]
        return Selection(choices, {"clusters": clusters}, labels)
