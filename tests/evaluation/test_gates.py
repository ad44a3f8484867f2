"""evaluation/gates.py: gates are parsed strictly and judged by the report's own numbers. Property tests."""

from __future__ import annotations

import math

import pytest

from compresskit.errors import RequestError
from compresskit.evaluation.gates import METRICS, Gate, check_gates, parse_gate
from compresskit.evaluation.scores import Scores
from compresskit.evaluation.speed import Speed

REPORT = {
    "perplexity": 12.0,
    "perplexity_ratio": 1.5,
    "kl": math.nan,
    "tasks": {"arc_easy": 0.4, "mmlu": {"acc": 0.3, "acc.norm": 0.35}, "piqa": True},
    "speed": {"prefill_speedup": 1.25, "decode_speedup": None},
}


@pytest.mark.parametrize(
    ("text", "passed", "missed_by"),
    [
        ("perplexity_ratio<=1.5", True, 0.0),
        ("perplexity_ratio<=1.2", False, 0.3),
        ("perplexity_ratio>=1.5", True, 0.0),
        ("perplexity_ratio>=2", False, 0.5),
        ("perplexity_ratio<1.6", True, 0.0),
        ("perplexity_ratio<1.5", False, 0.0),
        ("perplexity_ratio>1.4", True, 0.0),
        ("perplexity_ratio>1.5", False, 0.0),
        ("perplexity==12", True, 0.0),
        ("perplexity==11", False, 1.0),
        (" speed.prefill_speedup >= 1.1 ", True, 0.0),
        ("tasks.arc_easy >= 5e-1", False, 0.1),
        ("tasks.mmlu.acc>0.2", True, 0.0),
        ("tasks.mmlu.acc.norm>0.2", True, 0.0),
    ],
)
def test_every_operator_judges_as_it_reads(text: str, passed: bool, missed_by: float) -> None:
    (result,) = check_gates([parse_gate(text)], REPORT)
    assert result.passed is passed
    assert result.missed_by == pytest.approx(missed_by)
    assert result.needs is None
    assert ("missed by" in str(result)) is not passed


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("perplexity_ratoi<=1.2", r"unknown metric 'perplexity_ratoi'; Did you mean 'perplexity_ratio'\?"),
        ("speed.prefil_speedup>1", r"Did you mean 'speed.prefill_speedup'\?"),
        ("prefill_speedup>1", r"Did you mean 'speed.prefill_speedup'\?"),
        ("tasks.>1", "unknown metric 'tasks.'"),
        ("tasks>1", "unknown metric 'tasks'"),
        ("perplexity", "no operator after perplexity"),
        ("perplexity 1.2", "no operator after perplexity"),
        ("perplexity=1.2", "unknown operator '='"),
        ("perplexity=<1.2", "unknown operator '=<'"),
        ("perplexity!=1.2", "unknown operator '!='"),
        ("perplexity<= =1.2", "'=1.2' is not a number"),
        ("perplexity<=", "'' is not a number"),
        ("perplexity<=low", "'low' is not a number"),
        ("perplexity<=1.2 <= 3", "is not a number"),
        ("perplexity<=inf", "must be finite"),
        ("perplexity<=nan", "must be finite"),
        ("<=1.2", "no metric"),
        ("", "no metric"),
    ],
)
def test_a_bad_spelling_is_refused_by_what_is_wrong_with_it(text: str, words: str) -> None:
    with pytest.raises(RequestError, match=words) as caught:
        parse_gate(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "needs"),
    [
        ("size_ratio<=0.5", "--against"),
        ("kl<=1", "--against"),
        ("speed.decode_speedup>=1", "--speed and --against"),
        ("speed.peak_memory_bytes<=1", "--speed"),
        ("tasks.boolq>=0.5", "--tasks"),
        ("tasks.piqa>=0.5", "--tasks"),
        ("tasks.mmlu>=0.5", "--tasks"),
        ("bytes<=1", None),
    ],
)
def test_a_metric_without_a_finite_number_fails_and_names_the_flag(text: str, needs: str | None) -> None:
    (result,) = check_gates([parse_gate(text)], REPORT)
    assert (result.value, result.passed, result.missed_by, result.needs) == (None, False, None, needs)
    assert needs is None or f"pass {needs}" in str(result)


def test_a_gate_reads_back_what_it_prints() -> None:
    gate = Gate(metric="speed.prefill_speedup", operator=">=", limit=1.25)
    assert parse_gate(str(gate)) == gate


def test_every_reported_metric_can_be_gated() -> None:
    reported = {*Scores.model_fields, *(f"speed.{name}" for name in Speed.model_fields)} - {"vocabulary_size"}
    elsewhere = {"parameters", "bytes", "bits_per_byte", "bits_per_weight", "size_ratio", "size_ratio_16bit"}
    assert set(METRICS) == reported | elsewhere
