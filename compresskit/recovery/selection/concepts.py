"""PASER's concept consistency graph (arXiv 2502.12594): accepted concepts are nodes, concepts of one sample are connected.

A candidate conflicts if it pairs two known concepts that no accepted sample contains together.

Differs from the paper, which does not define the key phrases: a sample's concepts are its `MOST` rarest words that occur in
at least two samples of the pool. Words that occur once cannot conflict, and frequent words always would. Does not import
torch.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Sequence

MOST = 6
"""Maximum number of concepts per sample."""
WORD = re.compile(r"[^\W\d_]{3,}")


def concepts_of(texts: Sequence[str]) -> list[frozenset[str]]:
    """Concepts of every text in the pool."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(_words(text))
    found = []
    for text in texts:
        shared = [word for word in _words(text) if counts[word] > 1]
        found.append(frozenset(sorted(shared, key=lambda word: (counts[word], word))[:MOST]))
    return found


def _words(text: str) -> set[str]:
    return {word.lower() for word in WORD.findall(text)}


class ConceptGraph:
    """Nodes and edges of the accepted samples."""

    def __init__(self) -> None:
        self.joined: dict[str, set[str]] = {}

    def conflicts(self, concepts: frozenset[str]) -> int:
        """Number of pairs of known concepts that were never seen together."""
        known = [concept for concept in concepts if concept in self.joined]
        return sum(second not in self.joined[first] for first, second in itertools.combinations(known, 2))

    def accept(self, concepts: frozenset[str]) -> None:
        """Add a sample's concepts, all connected with each other."""
        for concept in concepts:
            self.joined.setdefault(concept, set()).update(concepts - {concept})
