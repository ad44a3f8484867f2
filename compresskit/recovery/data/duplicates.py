"""Find exact and near duplicates, with memory proportional to the number of samples.

Near duplicates have an estimated Jaccard similarity of at least `SIMILAR` between their sets of 3-word shingles. MinHash
(Broder 1997): under a random hash, two sets have the same minimum with probability J, so the share of equal minima over
many hashes estimates J. Only pairs that agree on a whole band of minima are compared; at J = 0.9 one band of 16 agrees with
probability 1 - (1 - 0.9^4)^16 > 0.9999.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

SHINGLE_WORDS = 3
HASHES = 64
BAND = 4
SIMILAR = 0.8


def normalised(text: str) -> list[str]:
    """Split into lower-case words without punctuation."""
    return re.findall(r"\w+", text.lower())


def signature(words: Sequence[str], factors: NDArray[np.uint64]) -> NDArray[np.uint32]:
    """MinHash of the shingles; factors (2, HASHES) odd 64-bit numbers -> (HASHES,)."""
    count = max(1, len(words) - SHINGLE_WORDS + 1)
    shingles = [zlib.crc32(" ".join(words[i : i + SHINGLE_WORDS]).encode()) for i in range(count)]
    values = np.array(shingles, dtype=np.uint64)[:, None]
    # Multiply-shift: the upper half of a x + b modulo 2^64 is nearly universal and needs no modulus.
    minima: NDArray[np.uint32] = ((values * factors[0] + factors[1]) >> np.uint64(32)).min(axis=0).astype(np.uint32)
    return minima


def drop_duplicates(texts: Sequence[str]) -> tuple[list[int], dict[str, int]]:
    """Return (positions to keep, the first of each group; number of dropped samples by reason)."""
    factors = np.random.default_rng(0).integers(1, 1 << 63, size=(2, HASHES), dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    seen: set[bytes] = set()
    bands: dict[int, list[int]] = {}
    signatures: list[NDArray[np.uint32]] = []
    kept: list[int] = []
    dropped = {"duplicate": 0, "near duplicate": 0}
    for position, text in enumerate(texts):
        words = normalised(text) or [text]
        digest = hashlib.sha256(" ".join(words).encode("utf-8", "surrogatepass")).digest()
        if digest in seen:
            dropped["duplicate"] += 1
            continue
        seen.add(digest)
        minima = signature(words, factors)
        # The checksum stands for the band; a collision only costs one more comparison.
        keys = [start << 32 | zlib.crc32(minima[start : start + BAND].tobytes()) for start in range(0, HASHES, BAND)]
        rivals = {rival for key in keys for rival in bands.get(key, ())}
        if any(float((signatures[rival] == minima).mean()) >= SIMILAR for rival in rivals):
            dropped["near duplicate"] += 1
            continue
        for key in keys:
            bands.setdefault(key, []).append(len(signatures))
        signatures.append(minima)
        kept.append(position)
    return kept, dropped
