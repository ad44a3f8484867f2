"""pruning/vocabulary/choice.py: what must stay, what is frequent, what fits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compresskit.errors import RequestError
from compresskit.pruning.vocabulary.choice import check_scripts, kept_tokens, of_scripts
from compresskit.pruning.vocabulary.method import Vocabulary

KNOWN = range(64)


def closure(token: int) -> set[int]:
    """As if each token were made of its half."""
    found = {token}
    while token > 1:
        token //= 2
        found.add(token)
    return found


@given(
    st.floats(0, 0.9), st.integers(1, 8), st.sets(st.sampled_from(KNOWN), max_size=4),
    st.dictionaries(st.sampled_from(KNOWN), st.integers(1, 9), max_size=20),
)  # fmt: skip
def test_a_share_is_met_closed_and_by_frequency(
    sparsity: float, round_to: int, required: set[int], counts: dict[int, int]
) -> None:
    method = Vocabulary(keep_from=("a",), sparsity=sparsity, round_to=round_to)
    must = set[int]().union(*map(closure, required))
    most = max(round((1 - sparsity) * len(KNOWN)) // round_to * round_to, 1)
    if len(must) > most:
        with pytest.raises(RequestError, match="must stay"):
            kept_tokens(method, required, counts, (), KNOWN, closure)
        return
    kept = set(kept_tokens(method, required, counts, (), KNOWN, closure))
    assert must <= kept
    assert all(closure(token) <= kept for token in kept)
    assert len(kept) == most
    for token in sorted(counts, key=lambda each: (-counts[each], each)):
        if token not in kept:  # then what it needs did not fit beside what is more frequent
            before = set(must)
            for other in sorted(counts, key=lambda each: (-counts[each], each)):
                if other == token:
                    break
                if len(before | closure(other)) <= most:
                    before |= closure(other)
            assert len(before | closure(token)) > most


def test_without_a_share_all_that_the_texts_need_stays_rounded_up() -> None:
    kept = kept_tokens(Vocabulary(keep_from=("a",), round_to=16), {0}, {40: 1, 41: 5}, {7}, KNOWN, closure)
    needed = closure(40) | closure(41) | closure(7) | {0}
    assert needed <= set(kept)
    assert len(kept) == 16
    assert len(kept_tokens(Vocabulary(keep_from=("a",), round_to=1), {0}, {40: 1, 41: 5}, {7}, KNOWN, closure)) == len(needed)


def test_tokens_of_scripts() -> None:
    texts = {0: " the", 1: " лиса", 2: "größer", 3: "\ufffd", 4: "日本", 5: "!?", 6: "🙂", 7: "лиса a", 8: "ли\ufffd"}
    assert of_scripts(texts, ["latin"]) == {0, 2, 3, 5}
    assert of_scripts(texts, ["Cyrillic"]) == {0, 1, 3, 5, 7, 8}
    assert of_scripts(texts, ["latin", "cjk"]) == {0, 2, 3, 4, 5}
    assert of_scripts(texts, []) == set()


def test_unknown_scripts_are_refused() -> None:
    check_scripts(["latin", "Hiragana"])
    with pytest.raises(RequestError, match="--keep-scripts klingon"):
        check_scripts(["klingon"])
