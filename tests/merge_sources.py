"""Values and weights to merge, drawn by hypothesis."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

FLOATS = st.one_of(st.just(0.0), st.floats(-2, 2, width=32))


@st.composite
def sources(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    count, entries = draw(st.integers(2, 5)), draw(st.integers(1, 30))
    values = draw(arrays(np.float32, (count, entries), elements=FLOATS))
    weights = draw(arrays(np.float32, count, elements=st.floats(0.25, 2, width=32)))
    return values, weights
