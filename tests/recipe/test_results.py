"""recipe/results.py: what a run says is shown whole, or refused with one line that names the file and the value. Property."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fuzz_mutations import VALUES
from fuzz_runs import EVALUATED, GATE, STEPS, result_of

from compresskit.checkpoint.kinds import Stated
from compresskit.errors import CheckpointError
from compresskit.recipe import verdict
from compresskit.recipe.reading import load
from compresskit.recipe.results import EVALUATION, RUN, STEP, check_run, check_step
from compresskit.recipe.results import GATE as GATE_KINDS
from compresskit.recipe.work import recovered_result
from compresskit.report.page import page

WHOLE = result_of(Path("out"), STEPS) | {"gates": [GATE], "passed": False}
MISSING = object()


def changed() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(key, value, result) with one value that is shown replaced, or left out."""
    for value in (MISSING, *VALUES):
        for key in RUN:
            yield key, repr(value), _with(WHOLE, key, value)
        for name, key in [("prune", key) for key in STEP] + [("evaluate", key) for key in (STEP | EVALUATION)]:
            yield key, repr(value), WHOLE | {"steps": STEPS | {name: _with(STEPS[name], key, value)}}
        for key in GATE_KINDS:
            yield key, repr(value), WHOLE | {"gates": [_with(GATE, key, value)]}


def _with(found: dict[str, Any], key: str, value: object) -> dict[str, Any]:
    kept = {name: each for name, each in found.items() if name != key}
    return kept if value is MISSING else kept | {key: value}


def test_whatever_stands_in_a_report_is_shown_or_refused(tmp_path: Path) -> None:
    check_run(WHOLE, Stated(Path("report.json")))
    refused = 0
    for key, value, result in changed():
        try:
            check_run(result, Stated(Path("report.json"), remedy="run the recipe again"))
        except CheckpointError as error:
            assert str(error).startswith("report.json: s"), (key, value)
            assert str(error).endswith("; run the recipe again"), (key, value)
            refused += 1
        else:
            said = verdict.markdown(result) + verdict.gate_table(result) + verdict.ending(result)
            assert page(tmp_path, result) + said, (key, value)
    assert refused > 500


def test_the_line_names_the_step_and_the_value() -> None:
    with pytest.raises(CheckpointError, match=r"^r\.json: states \['a'\] for 'source' of step 'e', expected a text; "):
        check_step(EVALUATED | {"source": ["a"]}, "e", Stated(Path("r.json")))
    with pytest.raises(CheckpointError, match=r"^r\.json: says of e 3, expected a step's report; "):
        check_step(3, "e", Stated(Path("r.json")))
    with pytest.raises(CheckpointError, match=r"^r\.json: states no 'limit' of the gate \{'step': "):
        check_run(WHOLE | {"gates": [_with(GATE, "limit", MISSING)]}, Stated(Path("r.json")))


@pytest.mark.parametrize("steps", [[{"evaluate": None}], [{"prune": "cfsp"}]])
def test_a_step_that_finished_before_a_kill_is_checked_when_it_is_taken_up(steps: list[Any], tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(json.dumps({"source": "m", "steps": steps}))
    (step,) = load(tmp_path / "r.yaml").steps
    file = tmp_path / ("report.json" if step.stage == "evaluate" else "compresskit.json")
    facts = {"bytes": [1], "perplexity": 2.0}
    made = {"stage": "prune", "method": "cfsp", "settings": {}, "facts": facts, "source": None}
    file.write_text(json.dumps(EVALUATED | facts if step.stage == "evaluate" else made))
    with pytest.raises(CheckpointError, match=rf"{file.name}: states \[1\] for 'bytes' of step '{step.name}', expected a number"):
        recovered_result(step, tmp_path)
