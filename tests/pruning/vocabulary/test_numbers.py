"""pruning/vocabulary/numbers.py: which numbers of a configuration are tokens, and their new ones."""

from __future__ import annotations

import pytest

from compresskit.errors import UnsupportedArchitecture
from compresskit.pruning.vocabulary.numbers import named_tokens, renumbered, renumbered_tokens

CONFIG = {
    "eos_token_id": [5, 9], "pad_token_id": -1, "bos_token_id": None, "hidden_size": 5, "num_hidden_layers": 9,
    "text_config": {"eos_token_id": 9, "vocab_size": 5}, "image_token_index": 700, "suppress_tokens": [5],
}  # fmt: skip


def test_tokens_are_found_at_any_depth() -> None:
    assert named_tokens(CONFIG, 100) == {5, 9}


def test_only_tokens_are_renumbered() -> None:
    assert renumbered(CONFIG, {5: 0, 9: 1}) == CONFIG | {
        "eos_token_id": [0, 1], "text_config": {"eos_token_id": 1, "vocab_size": 5}, "suppress_tokens": [0],
    }  # fmt: skip


def test_added_tokens_are_renumbered_and_the_rest_stays() -> None:
    config = {"added_tokens_decoder": {"9": {"content": "<e>"}, "3": {"content": "<x>"}}, "model_max_length": 9}
    assert renumbered_tokens(config, {9: 1}) == {"added_tokens_decoder": {"1": {"content": "<e>"}}, "model_max_length": 9}


def test_unknown_forms_are_refused() -> None:
    with pytest.raises(UnsupportedArchitecture, match="bad_words_ids"):
        renumbered({"bad_words_ids": [[5]]}, {5: 0})
