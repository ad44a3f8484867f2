"""recovery/selection/concepts.py: pairs of concepts never seen together. Against hand-written expectations."""

from __future__ import annotations

from compresskit.recovery.selection.concepts import ConceptGraph, concepts_of


def test_a_sample_conflicts_where_it_pairs_known_concepts_never_seen_together() -> None:
    graph = ConceptGraph()
    graph.accept(frozenset({"river", "bank"}))
    graph.accept(frozenset({"money", "loan"}))
    assert graph.conflicts(frozenset({"river", "bank", "boat"})) == 0
    assert graph.conflicts(frozenset({"bank", "loan", "money"})) == 2
    assert concepts_of(["river bank", "bank loan", "unique"]) == [{"bank"}, {"bank"}, frozenset()]
