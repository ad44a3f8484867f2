"""formats/patterns.py: what `re` matches is matched, and nothing takes for ever. Oracle: `re`, on patterns that it bears."""

from __future__ import annotations

import re
import time

import pytest

from compresskit.errors import CheckpointError
from compresskit.formats.patterns import Patterns

NAMES = [
    "model.layers.0.mlp.up_proj",
    "up_proj",
    "a.up_projx",
    "layers.11.q",
    "x{e}",
    "a{e<=1}",
    "b",
    "A.É",
    "a",
    "",
    "a\nb",
    "[",
    "{,}",
]
PATTERNS = [
    "up_proj", "model.layers.0.mlp.up_proj", r"layers\.(0|1\d)\..*", "x{e}", "a{e<=1}", "(?i)UP_PROJ", "a{1,2}", "a{,3}",
    "[ab]|c", "b)|(up_proj", r"\{e\}|b", "x{", ".*", "", r"(?P<n>u)p_proj", "[[]", "é", r"\w+", "(?:a|b){1}",
    "b{,}",
]  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.filterwarnings("ignore:Possible nested set")
def test_a_pattern_matches_what_re_matches(pattern: str) -> None:
    if pattern.startswith("(?i)"):
        with pytest.raises(CheckpointError, match="not valid"):  # as re, which takes flags only at the start
            Patterns("f").match(r"(.*\.)?(", pattern, ")$", "a")
        return
    found = [Patterns("f").match(r"(.*\.)?(", pattern, ")$", name) for name in NAMES]
    assert found == [re.match(rf"(.*\.)?({pattern})$", name) is not None for name in NAMES]


def test_all_patterns_of_a_file_together_have_two_seconds() -> None:
    patterns, started, refused = Patterns("file: alpha_pattern"), time.monotonic(), 0
    for number in range(4):
        try:
            patterns.match(r"(.*\.)?(", r"(?:(x+)(?=\1|x))+y", ")$", "x" * 60 + str(number))
        except CheckpointError as error:
            assert "file: alpha_pattern: the pattern '(?:(x+)" in str(error)
            assert "takes too long" in str(error)
            refused += 1
    assert refused
    assert time.monotonic() - started < 6


@pytest.mark.parametrize("pattern", ["(", "[", "*", "(?P<a", "(?:" * 400 + "a" + "){2}" * 400, "a" * 30_000])
def test_a_pattern_that_is_none_is_refused(pattern: str) -> None:
    with pytest.raises(CheckpointError, match="is not valid"):
        Patterns("f").match("", pattern + "|.b", "", "name")
