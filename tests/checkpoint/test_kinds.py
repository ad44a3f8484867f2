"""checkpoint/kinds.py: a value of another kind is one line with the file and the value. Against literals."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from compresskit.checkpoint import kinds
from compresskit.checkpoint.kinds import Kind, Stated
from compresskit.errors import CheckpointError

VALUES: dict[str, list[Any]] = {
    "TEXT": ["", "a"], "TEXTS": ["a", [], ["a", "b"]], "NUMBER": [0, -1.5, 10**400, 1e308],
    "NUMBERS": [{}, {"a": 1, "b": None}], "WHOLE_NUMBER": [3, -(10**30)], "TRUE_OR_FALSE": [True, False],
    "OBJECT": [{}, {"a": "b"}], "LIST": [[], [None]],
}  # fmt: skip
NONE_OF_THEM: dict[str, list[Any]] = {
    "TEXT": [3, ["a"], {}], "TEXTS": [3, ["a", 3], [["a"]], {}], "NUMBER": ["3", True, [3], math.nan, math.inf, -math.inf],
    "NUMBERS": [3, [3], {"a": "3"}, {"a": {}}], "WHOLE_NUMBER": [3.0, True, "3"], "TRUE_OR_FALSE": [0, 1, "true"],
    "OBJECT": [[], "a", 3], "LIST": [{}, "a", 3],
}  # fmt: skip


@pytest.mark.parametrize("name", VALUES)
def test_values_are_of_a_kind_or_not(name: str) -> None:
    kind: Kind = getattr(kinds, name)
    file = Stated(Path("a.json"), "of step 'x'", "run again")
    for value in (*VALUES[name], None):
        file.check({"k": value}, {"k": kind})
    file.check({}, {"k": kind})
    for value in NONE_OF_THEM[name]:
        with pytest.raises(CheckpointError) as caught:
            file.check({"k": value}, {"k": kind})
        assert str(caught.value) == f"a.json: states {value!r} for 'k' of step 'x', expected {kind.words}; run again"


@pytest.mark.parametrize(("found", "said"), [({}, "states no 'k'"), ({"k": None}, "states None for 'k'")])
def test_a_needed_value_is_neither_missing_nor_null(found: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError, match=f"^a.json: {said}, expected a text; restore"):
        Stated(Path("a.json")).check(found, {"k": kinds.TEXT.always})


def test_a_long_value_is_shortened() -> None:
    with pytest.raises(CheckpointError) as caught:
        Stated(Path("a.json")).check({"k": "x" * 10_000 + "\n"}, {"k": kinds.LIST})
    assert len(str(caught.value)) < 300
