"""evaluation/table.py: every number with its unit, and only what was measured. Against hand-written expectations."""

from __future__ import annotations

from compresskit.evaluation.table import aligned, answers, shown_score, table

REPORT = {
    "against": "dense", "text": "prose", "bytes": 2_000_000, "reference_bytes": 4_000_000, "parameters": 5e6,
    "reference_parameters": 1e7, "perplexity": 12.34, "reference_perplexity": 10.0, "kl": 0.25, "top1_agreement": 0.755,
}  # fmt: skip
SPEED = {
    "prefill_tokens_per_second": 300.0, "reference_prefill_tokens_per_second": 200.0, "prefill_speedup": 1.45,
    "decode_tokens_per_second": 30.0, "reference_decode_tokens_per_second": 20.0, "decode_speedup": 1.4,
    "peak_memory_bytes": 3e8, "reference_peak_memory_bytes": 6e8,
}  # fmt: skip


def test_sizes_perplexity_and_speed_are_compared() -> None:
    lines = table({**REPORT, "speed": SPEED}).splitlines()
    found = {line[:34].strip(): line[34:].split() for line in lines[1:-1]}
    assert found["size on disk"] == ["4.00", "MB", "2.00", "MB", "x", "0.500"]
    assert found["perplexity (lower is better)"] == ["10.00", "12.34", "x", "1.234"]
    assert found["prefill tokens/s"] == ["200.0", "300.0", "x", "1.450"]
    assert found["memory when running"] == ["600", "MB", "300", "MB", "x", "0.500"]
    assert found["same most likely token"] == ["75.5%"]
    assert lines[-1] == "measured on: prose"


def test_a_tiny_model_is_not_rounded_to_nothing() -> None:
    tiny = {"bytes": 4_100, "reference_bytes": 149_000, "parameters": 1_900, "reference_parameters": 36_900}
    lines = table({**REPORT, **tiny}).splitlines()
    assert lines[1].split()[3:7] == ["149", "KB", "4.10", "KB"]
    assert lines[2].split()[1:3] == ["36.9K", "1.90K"]


def test_without_a_reference_there_is_one_column() -> None:
    alone = {**REPORT, "against": None, "reference_bytes": None, "reference_parameters": None, "reference_perplexity": None}
    text = table({**alone, "kl": None, "speed": None})
    assert "before" not in text
    assert " x " not in text
    assert "tokens/s" not in text


def test_columns_are_aligned() -> None:
    assert aligned([("a", "1", "22", ""), ("bbb", "333", "4", "x")]) == "a      1  22\nbbb  333   4  x"


def test_answers_stand_below_their_questions_in_lines_of_a_terminal() -> None:
    asked = [
        {"prompt": "a?", "before": "one\n\n two", "after": "word " * 60},
        {"prompt": "b?", "before": None, "after": ""},
        {"prompt": "c?", "before": "x", "after": "y"},
    ]
    lines = answers({"generations": asked}, 2).splitlines()
    assert lines[:2] == ["a?", "  before  one two"]
    assert lines[2].startswith("  after   word word")
    assert all(line.startswith("          word") for line in lines[3:5])
    assert max(map(len, lines)) <= 100
    assert lines[-3:] == ["", "b?", "  answer  (nothing)"]
    assert answers({"generations": None}) == ""


def test_scores_are_in_percent() -> None:
    assert shown_score(0.125) == "12.5%"
    assert shown_score({"a": 0.5, "b": 2}) == "a 0.5, b 2"
