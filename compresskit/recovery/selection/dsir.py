"""dsir: select samples whose words are likelier in the target text than in the pool (importance resampling).

DSIR, arXiv 2302.03169, section 3: texts are counts of hashed unigrams and bigrams, both distributions are bags of them.

    log w(x) = sum over its n-grams of log p_target(h) - log p_pool(h)
    taken: the largest log w(x) + g, g ~ Gumbel(0, 1)                     (the same as drawing by w without replacement)

Differs from the paper: the target is the calibration text, by default text from the original model itself, because
recovery has no target task. The weight is a mean over n-grams times their typical number, which follows the released code's
length correction: with a sum, length alone decides between short and long samples.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Sequence
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from compresskit.recovery.data.duplicates import normalised
from compresskit.recovery.method import BudgetMethod, Choice, Pool, Selection

Counts = NDArray[np.float64]


def hashed_ngrams(text: str, buckets: int) -> list[int]:
    """Buckets of all unigrams and bigrams."""
    words = normalised(text)
    grams = [*words, *(f"{first} {second}" for first, second in itertools.pairwise(words))]
    return [zlib.crc32(gram.encode("utf-8", "surrogatepass")) % buckets for gram in grams]


def distribution(texts: Sequence[list[int]], buckets: int) -> Counts:
    """Smoothed frequencies of the buckets, (buckets,); sums to 1."""
    counts: Counts = np.ones(buckets)
    for grams in texts:
        np.add.at(counts, grams, 1.0)
    counts /= counts.sum()
    return counts


class DSIR(BudgetMethod):
    """Importance resampling towards the calibration text."""

    buckets: Annotated[int, Field(ge=2)] = 10_000
    """Hash buckets for n-grams."""

    def select(self, pool: Pool) -> Selection:
        """Weight every sample, perturb, and take the largest."""
        grams = [hashed_ngrams(sample.instruction.text, self.buckets) for sample in pool.samples]
        target = distribution([hashed_ngrams(text, self.buckets) for text in pool.target()], self.buckets)
        gain = np.log(target) - np.log(distribution(grams, self.buckets))
        typical = float(np.median([len(each) for each in grams]))
        weights = np.array([typical * float(gain[each].mean()) if each else -np.inf for each in grams])
        perturbed = weights + np.random.default_rng(pool.seed).gumbel(size=len(weights))
        taken = np.argsort(-perturbed, kind="stable")[: self.count(pool)]
        return Selection([Choice(int(i), "likelier in the target text", score=float(weights[i])) for i in taken])
