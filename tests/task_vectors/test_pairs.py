"""task_vectors/pairs.py: the parts of a pair know each other. Against names written by hand."""

from __future__ import annotations

from compresskit.task_vectors.pairs import pair_of


def test_the_parts_of_a_pair_know_each_other() -> None:
    names = ("m.lora_A.weight", "m.lora_B.weight")
    assert pair_of(names[0]) == pair_of(names[1]) == names
    assert pair_of("m.ia3_l") is None
