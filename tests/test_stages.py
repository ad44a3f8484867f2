"""stages.py: sizes as users write them. Against hand-written expectations."""

from __future__ import annotations

import pytest

from compresskit.errors import RequestError
from compresskit.stages import Options, parse_bytes


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("1.5 kb", 1500), ("2MiB", 2 << 20), ("17", 17)])
def test_sizes_are_read_as_written(text: str, size: int) -> None:
    assert parse_bytes(text) == Options(max_shard_size=text).shard_bytes == size


@pytest.mark.parametrize("text", ["", "GB", "5 apples", "-1GB", "0", "1e3"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(RequestError, match="not a size"):
        parse_bytes(text)
