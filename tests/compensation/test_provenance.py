"""compensation/provenance.py: what a manifest says of the weights decides whether they can be compared with the original's."""

from __future__ import annotations

from pathlib import Path

import pytest

from compresskit.compensation.provenance import check_same_scales, trained_by_block
from compresskit.errors import RequestError


def test_rescaled_weights_are_refused_wherever_they_stand_in_the_chain() -> None:
    smoothed = {"stage": "quantize", "method": "gptq", "settings": {"smoothing": 0.5}}
    for record in (smoothed, {"stage": "recover", "settings": {}, "source": smoothed}):
        with pytest.raises(RequestError, match="x: its weights were rescaled by --smoothing; quantize without it"):
            check_same_scales(record, Path("x"))


def test_others_pass() -> None:
    for record in (None, {"settings": None}, {"settings": {"smoothing": 0}}, {"source": {"settings": {"format": "int8"}}}):
        check_same_scales(record, Path("x"))


def test_only_methods_that_train_blocks_count_as_such() -> None:
    assert trained_by_block({"stage": "quantize", "method": "apiq"})
    assert not trained_by_block({"stage": "quantize", "method": "gptq"})
    assert not trained_by_block({"stage": "quantize", "method": "unknown"})
    assert not trained_by_block(None)
