"""report/figures.py: the figures of the last evaluation, and every evaluated model in the chart. Against hand-written pages."""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path
from typing import Any

from fuzz_runs import EVALUATED, result_of

from compresskit.report.figures import before_after, tiles, tradeoff


def texts(html: str) -> str:
    return " ".join(unescape(re.sub("<[^>]+>", " ", html)).split())


def run_of(*reports: dict[str, Any]) -> dict[str, Any]:
    return result_of(Path("out"), {f"e{i}": report for i, report in enumerate(reports)})


def test_the_tiles_hold_size_quality_agreement_and_speed() -> None:
    found = texts(tiles(run_of(EVALUATED)))
    assert found == (
        "Size 2.00 KB was 4.00 KB Perplexity 20.50 was 10.25 Same next token 75.0% as the original's most likely "
        "Decoding 5.0 tokens a second"
    )
    alone = EVALUATED | {"reference_bytes": None, "reference_perplexity": None, "speed": None, "top1_agreement": None}
    assert texts(tiles(run_of(EVALUATED, alone))) == (
        "Size 2.00 KB of the weights Perplexity 20.50 lower is better Stored bits 4.50 a weight, embedding included"
    )
    assert tiles(run_of()) == before_after(run_of()) == tradeoff(run_of(), {}) == ""


def test_a_speedup_is_the_one_that_was_measured_in_turn() -> None:
    speed = {
        "decode_tokens_per_second": 9.0, "reference_decode_tokens_per_second": 4.5, "decode_speedup": 1.875,
        "peak_memory_bytes": 100, "reference_peak_memory_bytes": 400,
    }  # fmt: skip
    found = texts(before_after(run_of(EVALUATED | {"speed": speed})))
    assert "Decoding, tokens a second 4.5 9.0 x 1.875" in found
    assert "Memory when running 400 B 100 B x 0.250" in found


def test_models_that_are_far_apart_are_drawn_on_a_scale_of_powers_of_ten() -> None:
    reports = [EVALUATED | {"perplexity_ratio": ratio, "bytes": 1000 * i + 1000} for i, ratio in enumerate((1.1, 30.0, 2000.0))]
    html = tradeoff(run_of(*reports), {})
    heights = [float(each) for each in re.findall(r'<circle class="c0"[^>]* cy="([\d.]+)"', html)]
    gaps = heights[0] - heights[1], heights[1] - heights[2]
    assert 0.7 < gaps[0] / gaps[1] < 0.9  # log10 of 30 / 1.1 and of 2000 / 30
    assert "e2 3.00 KB 2000" in texts(html)
