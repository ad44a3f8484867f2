"""task_vectors/merge_entries.py: the table of patterns gives what the floats give. Oracle."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from compresskit.task_vectors.merge_entries import pattern_table
from compresskit.task_vectors.merging.average import Average
from compresskit.task_vectors.merging.method import MergeMethod
from compresskit.task_vectors.merging.task_arithmetic import TaskArithmetic
from compresskit.task_vectors.merging.ties import Ties


@pytest.mark.parametrize("method", [Average(), TaskArithmetic(), Ties()])
@given(st.data())
def test_the_table_of_patterns_gives_exactly_what_the_floats_give(method: MergeMethod, data: st.DataObject) -> None:
    count = data.draw(st.integers(2, 5))
    signs = data.draw(arrays(np.int8, (count, 40), elements=st.sampled_from([-1, 0, 1])))
    scales = data.draw(st.lists(st.floats(2**-20, 3, width=32), min_size=count, max_size=count))
    weights = data.draw(arrays(np.float32, count, elements=st.floats(0.25, 2, width=32)))
    codes = sum(3**power * (row.astype(int) + 1) for power, row in enumerate(signs))
    floats = signs.astype(np.float32) * np.array(scales, np.float32)[:, None]
    assert np.array_equal(pattern_table(method, scales, weights)[codes], method.merge(floats, weights))
