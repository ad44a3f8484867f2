"""PASER's concept consistency graph (arXiv 2502.12594): accepted concepts are nodes, concepts of one sample are joined.

A candidate conflicts where it pairs two concepts that are both known and were never seen together.

Differs from the paper, which leaves the key phrases open: a sample's concepts are its `MOST` rarest words of the pool
that occur in at least two samples. Words that occur once cannot conflict, frequent ones would always. Loads no torch.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Sequence

MOST = 6
"""Concepts of one sample."""
WORD = re.compile(r"[^\W\d_]{3,}")


def concepts_of(texts: Sequence[str]) -> list[frozenset[str]]:
    """The concepts of every text of the pool."""
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
        """Pairs of known concepts that were never seen together."""
        known = [concept for concept in concepts if concept in self.joined]
        return sum(second not in self.joined[first] for first, second in itertools.combinations(known, 2))

    def accept(self, concepts: frozenset[str]) -> None:
        """Add a sample's concepts, all joined with each other."""
        for concept in concepts:
            self.joined.setdefault(concept, set()).update(concepts - {concept})
