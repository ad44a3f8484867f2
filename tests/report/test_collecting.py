"""report/collecting.py: what a run left is read, a folder that holds no run is refused. End to end."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from fuzz_runs import EVALUATED, result_of

from compresskit.errors import RequestError
from compresskit.report.collecting import final_model, manifests, per_block, read_result


def test_a_folder_without_a_run_is_refused(tmp_path: Path, out: Path) -> None:
    with pytest.raises(RequestError, match="holds no finished run"):
        read_result(tmp_path)
    with pytest.raises(RequestError, match="is the report of one step"):
        read_result(out / "evaluate-bits-3")


@pytest.mark.parametrize(("source", "is_read"), [("model", True), (["a", "b"], True), (["a", 3], False), (3, False)])
def test_a_step_names_one_source_or_those_of_a_merge(source: Any, is_read: bool, tmp_path: Path) -> None:
    result = result_of(tmp_path, {"merge": {"stage": "merge", "source": source}})
    (tmp_path / "report.json").write_text(json.dumps(result))
    if is_read:
        assert read_result(tmp_path) == result
    else:
        with pytest.raises(RequestError, match=r"report\.json: states .* for 'source' of step 'merge', expected a text or"):
            read_result(tmp_path)


@pytest.mark.parametrize("source", [[], ["a"], {"a": "b"}, 3])
def test_an_evaluation_measures_one_model(source: Any, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(json.dumps(result_of(tmp_path, {"e": EVALUATED | {"source": source}})))
    with pytest.raises(RequestError, match=r"report\.json: states .* for 'source' of step 'e', expected a text"):
        read_result(tmp_path)


@pytest.mark.parametrize("changed", [{"stage": None}, {"method": [1]}, {"facts": [1]}, {"source": {"method": "gptq"}}])
def test_a_manifest_that_does_not_say_what_made_a_step_is_refused_by_name(changed: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    made = {"stage": "prune", "method": "cfsp", "facts": {}, "source": None}
    (tmp_path / "a" / "compresskit.json").write_text(json.dumps(made))
    result = result_of(tmp_path, {"a": {"stage": "prune"}, "b": None})
    assert manifests(tmp_path, result) == {"a": made}
    (tmp_path / "a" / "compresskit.json").write_text(json.dumps(made | changed))
    with pytest.raises(RequestError, match=r"a/compresskit\.json: states "):
        manifests(tmp_path, result)


def test_a_step_whose_end_was_not_recorded_is_not_the_final_model(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "compresskit.json").write_text("{}")
    assert final_model(tmp_path, result_of(tmp_path, {"a": {"stage": "prune"}, "b": None})) == "a"


@pytest.mark.parametrize("value", [None, True, "4", [], [[]], {}, {"a": "b"}, 10**400, math.nan, math.inf, 1e308])
def test_facts_that_are_no_numbers_are_not_drawn(value: Any) -> None:
    assert per_block({key: [value, value] for key in ("widths", "bits", "blocks")} | {"blocks": value}) in (
        {},
        {"widths": {"": [0.0, 0.0]}, "bits": {"": [0.0, 0.0]}},
    )
    assert per_block({"blocks": [{"rank": value, "error": value}]}) == {}


def test_the_errors_of_a_quantised_block_are_its_mean() -> None:
    blocks = [{"relative_output_errors": {"a": 0.25, "b": 0.75}}, {"relative_output_errors": {"a": 0.5, "b": None}}]
    assert per_block({"blocks": blocks}) == {"error": {"output error": [0.5, 0.5]}}
