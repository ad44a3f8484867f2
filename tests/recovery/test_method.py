"""recovery/method.py: every selection takes its budget, once each, and the same again. Property test."""

from __future__ import annotations

import pytest
from planted_pools import planted_pool

from compresskit.methods import METHODS, method_class


@pytest.mark.parametrize("name", METHODS["recover"])
def test_every_selection_takes_its_budget_once_each_and_the_same_again(name: str) -> None:
    pytest.importorskip("scipy")
    method = method_class("recover", name)(**({} if name == "full" else {"budget": 0.2}))
    first, second = (method.select(planted_pool()).choices for _ in range(2))
    assert first == second
    assert len({choice.sample for choice in first}) == len(first) == (60 if name == "full" else 12)
