"""Merging methods against slow statements of their definitions, an entry at a time (oracle)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from compresskit.task_vectors.merge_entries import pattern_table
from compresskit.task_vectors.merging.average import Average
from compresskit.task_vectors.merging.method import MergeMethod
from compresskit.task_vectors.merging.pcb import PCB
from compresskit.task_vectors.merging.task_arithmetic import TaskArithmetic
from compresskit.task_vectors.merging.ties import Ties

FLOATS = st.one_of(st.just(0.0), st.floats(-2, 2, width=32))


@st.composite
def sources(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    count, entries = draw(st.integers(2, 5)), draw(st.integers(1, 30))
    values = draw(arrays(np.float32, (count, entries), elements=FLOATS))
    weights = draw(arrays(np.float32, count, elements=st.floats(0.25, 2, width=32)))
    return values, weights


def ties_by_entry(column: np.ndarray, weights: np.ndarray) -> float:
    mass = sum(w * v for w, v in zip(weights, column, strict=True))
    agreeing = [(w, v) for w, v in zip(weights, column, strict=True) if v * mass > 0]
    return sum(w * v for w, v in agreeing) / sum(w for w, _ in agreeing) if agreeing else 0.0


@given(sources())
def test_the_average_is_the_weighted_mean(given_sources: tuple[np.ndarray, np.ndarray]) -> None:
    values, weights = given_sources
    np.testing.assert_allclose(Average().merge(values, weights), np.average(values, axis=0, weights=weights), atol=1e-5)
    np.testing.assert_allclose(TaskArithmetic().merge(values, weights), weights @ values, atol=1e-5)


@given(sources())
def test_ties_averages_those_that_agree_with_the_elected_sign(given_sources: tuple[np.ndarray, np.ndarray]) -> None:
    values, weights = given_sources
    clear = np.abs(weights.astype(np.float64) @ values) > 1e-5
    expected = [ties_by_entry(column, weights.astype(np.float64)) for column in values.T.astype(np.float64)]
    np.testing.assert_allclose(Ties().merge(values, weights)[clear], np.array(expected)[clear], atol=1e-5)


def test_pcb_keeps_what_the_written_out_definition_keeps() -> None:
    values = np.random.default_rng(0).normal(size=(3, 200)).astype(np.float32)
    weights = np.ones(3, np.float32)
    total, mass = np.zeros(200), np.zeros(200)
    for row in values.astype(np.float64):
        size = np.abs(row)
        intra = np.exp(3 * ((size - size.min()) / (size.max() - size.min())) ** 2)
        beta = intra * np.tanh(row * values.sum(axis=0))
        floor = sorted(beta)[180]
        kept = np.where(beta > floor, (beta - floor) / (beta.max() - floor), 0)
        total += kept * row
        mass += kept
    expected = np.divide(total, mass, out=np.zeros(200), where=mass > 0)
    np.testing.assert_allclose(PCB().merge(values, weights), expected, atol=1e-4)


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
