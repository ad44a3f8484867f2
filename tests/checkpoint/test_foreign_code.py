"""checkpoint/foreign_code.py: no key that fetches code passes, at any depth, and all others do. Property test."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compresskit.checkpoint.foreign_code import FOREIGN_CODE, without_foreign_code

KEYS = st.one_of(st.sampled_from(sorted(FOREIGN_CODE)), st.sampled_from(["model_type", "text_config", "rope_scaling"]))
VALUES = st.recursive(
    st.text(max_size=3),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(KEYS, inner, max_size=3)),
    max_leaves=12,
)


def keys_in(value: Any) -> set[str]:
    if isinstance(value, dict):
        return set(value).union(*map(keys_in, value.values()))
    return set().union(*map(keys_in, value)) if isinstance(value, list) else set()


@settings(max_examples=25)
@given(st.dictionaries(KEYS, VALUES, max_size=4))
def test_no_such_key_is_left_at_any_depth(config: dict[str, Any]) -> None:
    before = repr(config)
    assert not keys_in(without_foreign_code(config)) & FOREIGN_CODE
    assert repr(config) == before


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation", "kernel_config"])
def test_all_other_keys_stay_in_order(key: str) -> None:
    kept = {"model_type": "llama", "rope_scaling": {"rope_type": "yarn", "factor": [1, {"a": None}]}, "tie": True}
    given_ = {"model_type": "llama", key: "who/what", "rope_scaling": {key: {}, **kept["rope_scaling"]}, "tie": True}
    assert list(without_foreign_code(given_).items()) == list(kept.items())
