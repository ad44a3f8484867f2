"""`--drop`: drop entries of task vectors at random and scale the others up, before they are merged (DARE).

Yu, Yu, Yu, Huang, Li, arXiv 2311.03099, section 3.2.

    tau'_i = m_i tau_i / (1 - p),    m_i ~ Bernoulli(1 - p) for each entry                                      (1)

The mean of tau'_i is tau_i. The draw is a function of the seed, the source's place, the tensor's name and the section, so that
it depends neither on the order of reading nor on the machine.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import numpy as np

from compresskit.formats.ternary.threshold import Values
from compresskit.task_vectors.trimming import Sections


def dropped(sections: Sections, probability: float, seed: int, source: int) -> Sections:
    """Equation 1 on a source's values; the sections as they are where the probability p is 0."""
    if not probability:
        return sections
    rescale = np.float32(1 / (1 - probability))

    def read(name: str) -> Iterator[Values]:
        for number, values in enumerate(sections(name)):
            generator = np.random.Generator(np.random.Philox([seed, source, zlib.crc32(name.encode()), number]))
            yield np.where(generator.random(len(values)) >= probability, rescale * values, np.float32(0))

    return read
